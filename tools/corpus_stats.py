"""What a run's dataset is, and what a model has to beat: corpus_stats.py CONFIG [key.path=value ...]"""

import argparse
import sys

from megatron_ee.config import load_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    choose_device("cpu")
    from megatron_ee.data.corpus import bigram_cross_entropy, write_corpus
    from megatron_ee.data.dataset import BUILT_IN, dataset_prefix
    from megatron_ee.data.indexed import index_path, read_tokens
    from megatron_ee.tokenizer import open_tokenizer

    prefix = dataset_prefix(config.data)
    if config.data.dataset == BUILT_IN:
        write_corpus(prefix, open_tokenizer(config.data.tokenizer))
    if not index_path(prefix).exists():
        print(f"data.dataset: {index_path(prefix)} does not exist", file=sys.stderr)
        return 2
    tokens = read_tokens(prefix)
    unit = "byte" if config.data.tokenizer == "bytes" else "token"
    print(f"dataset: {prefix}")
    print(f"tokens: {len(tokens):,}")
    print(f"{unit}-bigram cross-entropy: {bigram_cross_entropy(tokens):.4f} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
