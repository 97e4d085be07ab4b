"""What a run's datasets are, and what a model has to beat on each: corpus_stats.py CONFIG [key.path=value ...]"""

import argparse
import sys

from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, load_config
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
        show(load_config(arguments.config, arguments.overrides, read_model=read_model))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def show(config: Config) -> None:
    """Print a block of figures for each dataset of the blend; most runs have one."""
    choose_device("cpu")
    if config.data.format == "messages":
        show_conversations(config)
        return
    from megatron_ee.data.corpus import bigram_cross_entropy
    from megatron_ee.data.dataset import check_sources, sources_of, write_built_in
    from megatron_ee.data.indexed import read_tokens
    from megatron_ee.tokenizer import BYTES, open_tokenizer

    tokenizer = open_tokenizer(config.data.tokenizer)
    sources = sources_of(config.data, tokenizer)
    write_built_in(sources, tokenizer)
    total_weight = sum(source.weight for source in sources)
    unit = "byte" if tokenizer.name == BYTES else "token"
    for source, index in zip(sources, check_sources(sources, config, tokenizer), strict=True):
        tokens = read_tokens(source.prefix)
        print(f"dataset: {source.prefix}")
        if len(sources) > 1:
            print(f"share: {source.weight / total_weight:.1%}")
        print(f"documents: {len(index.lengths):,}")
        print(f"tokens: {len(tokens):,}")
        print(f"{unit}-bigram cross-entropy: {bigram_cross_entropy(tokens):.4f} nats")


def show_conversations(config: Config) -> None:
    """Print a block of figures for each file of conversations."""
    from megatron_ee.data.chat_samples import open_conversations
    from megatron_ee.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(config.data.tokenizer)
    for name in ("dataset", "validation"):
        if getattr(config.data, name) is not None:
            conversations = open_conversations(config.data, name, tokenizer)
            print(f"{name}: {conversations.path}")
            print(f"conversations: {len(conversations):,}")
            print(f"tokens: {len(conversations.tokens):,}")
            print(f"learned: {conversations.learned.mean():.1%}")
            print(f"longest: {conversations.lengths.max() + 1:,}")


if __name__ == "__main__":
    sys.exit(main())
