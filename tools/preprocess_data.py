"""Turn text into a dataset: preprocess_data.py INPUT [INPUT ...] --output PREFIX [--tokenizer bytes|FILE|FOLDER]

An INPUT is a text file, which is one document, or a .jsonl with one document a line; either may be gzipped. The dataset
is PREFIX.bin and PREFIX.idx, in Megatron's format.
"""

import argparse
import sys
from pathlib import Path

from megatron_ee.data.preprocess import Job, Summary, describe_skipped, preprocess
from megatron_ee.errors import UserError


def main() -> int:
    arguments = parse_arguments()
    job = Job(
        inputs=arguments.inputs,
        output=arguments.output,
        tokenizer=arguments.tokenizer,
        bpe_vocab_size=arguments.train_bpe,
        json_key=arguments.json_key,
        num_workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    try:
        show(preprocess(job), job)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX")
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument("--tokenizer", default="bytes", help="bytes, a tokenizer.json or a Hugging Face folder")
    tokens.add_argument(
        "--train-bpe",
        type=_positive,
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE on the input first; it becomes PREFIX.tokenizer.json",
    )
    parser.add_argument("--json-key", default="text", help="the key of a document's text (default: text)")
    parser.add_argument("--workers", type=_positive, default=1, help="processes; the output is the same (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this name")
    return parser.parse_args()


def show(summary: Summary, job: Job) -> None:
    """Print what was written, and how to name it in a config."""
    workers = f"{job.num_workers} worker{'s' * (job.num_workers > 1)}"
    print(
        f"{summary.num_documents:,} documents, {summary.num_bytes:,} bytes, {summary.num_tokens:,} tokens "
        f"({summary.num_bytes / summary.num_tokens:.2f} bytes/token, vocabulary {summary.vocab_size:,})"
    )
    if job.bpe_vocab_size:
        print(f"BPE trained in {summary.training_seconds:.1f} s")
    speed = summary.num_bytes / 1e6 / summary.seconds
    print(f"encoded in {summary.seconds:.1f} s, {speed:.1f} MB/s with {workers}")
    if summary.skipped:
        print(f"skipped: {describe_skipped(summary.skipped)}")
    print(f"data: {{dataset: {job.output}, tokenizer: {summary.tokenizer}}}")


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
