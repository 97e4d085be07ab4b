"""Writing aside: leftovers of dead processes go, those of live ones stay."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ee.data.aside import aside_of, remove_leftovers, written_aside


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_still_lies_aside_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a[b]"
    with pytest.raises(ZeroDivisionError), written_aside(target) as aside:  # noqa: PT012
        assert aside == aside_of(target)
        (aside.with_name(aside.name + ".bin")).write_text("half")
        aside.mkdir()
        (tmp_path / "new" / "other").write_text("")
        _ = 1 / 0
    assert [path.name for path in target.parent.iterdir()] == ["other"]


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    host, dead, alive = socket.gethostname(), _dead_pid(), os.getpid()
    names = [f"a.{host}.{dead}.tmp.bin", f"a.{host}.{dead}.tmp", f"a.{host}.{alive}.tmp", f"a.elsewhere.{dead}.tmp"]
    names += [f"ab.{host}.{dead}.tmp", f"a.{host}.me.tmp", "a.bin"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / f"a.{host}.{dead}.tmp.folder").mkdir()
    remove_leftovers(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
