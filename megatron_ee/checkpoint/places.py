"""places.json: where, in the files of shards, the bytes of each tensor begin. A shard lies in a file as torch.save
writes it, and says so itself, but at its end: reading that first, of every shard, keeps a disk from reading ahead."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ee.checkpoint.folders import CheckpointError

PLACES_FILE = "places.json"

Places = dict[str, dict[int, int]]
"""File -> where a shard begins -> where its tensor's bytes begin; both in bytes from the file's beginning."""


def places_json(places: Mapping[str, Mapping[int, int]]) -> bytes:
    """The content of places.json."""
    return json.dumps(places).encode()


def read_places(folder: Path) -> Places:
    """What the places.json of a step folder says; nothing where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / PLACES_FILE
    try:
        content = json.loads(path.read_bytes())
        return {name: {int(start): int(place) for start, place in of.items()} for name, of in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
