"""Files of API keys."""

from pathlib import Path
from typing import Any

from megatron_ee.config.dialect import to_text
from megatron_ee.server.guard.keys import digest_of, new_key


def write_keys(path: Path, **clients: dict[str, Any]) -> tuple[Path, dict[str, str]]:
    """A file of clients, with what it says of each beside name and hash; the keys by name."""
    keys = {name: new_key() for name in clients}
    path.write_text(to_text([{"name": name, "sha256": digest_of(keys[name]), **of} for name, of in clients.items()]))
    path.chmod(0o600)
    return path, keys
