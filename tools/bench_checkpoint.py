"""Train the checkpoint that other benches decode with: bench_checkpoint.py [key.path=value ...]

First a BPE of the built-in corpus, at data.tokenizer, then the run of configs/bench/checkpoint.yaml. What is there is
kept: stopped at any time, it goes on where it stopped, and it ends at once when the run is trained.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_ee.checkpoint.folders import whole_checkpoints
from megatron_ee.config import Config, load_config
from megatron_ee.data.aside import written_aside
from megatron_ee.data.corpus import documents
from megatron_ee.errors import UserError
from megatron_ee.tokenizer import open_tokenizer, train_bpe

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/bench/checkpoint.yaml"


def main() -> int:
    """Returns the exit status; where there is something to train, it is that of scripts/train.sh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    overrides = parser.parse_args().overrides
    try:
        config = load_config(CONFIG, overrides)
        assert config.model.vocab_size != "auto", "the BPE is learned for the model's size"
        make_tokenizer(Path(config.data.tokenizer), config.model.vocab_size)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if is_trained(config):
        print(f"{run_folder(config)} is trained: {config.training.train_iters} iterations")
        return 0
    command = [str(ROOT / "scripts/train.sh"), str(CONFIG), *overrides]
    sys.stdout.flush()
    os.execv(command[0], command)


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """Learn a BPE of the built-in corpus, unless the file is there."""
    if path.exists():
        return
    with written_aside(path) as aside:
        aside.write_bytes(train_bpe(documents(), vocab_size))
        learned = open_tokenizer(str(aside)).vocab_size
        aside.replace(path)
    print(f"{path}: a BPE of {learned:,} tokens, of the built-in corpus")


def is_trained(config: Config) -> bool:
    return max(whole_checkpoints(run_folder(config)), default=0) >= config.training.train_iters


def run_folder(config: Config) -> Path:
    return Path(config.runs) / config.name


if __name__ == "__main__":
    sys.exit(main())
