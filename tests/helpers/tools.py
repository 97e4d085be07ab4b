"""Programs of tools/, run in this very process: what they import is there already."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


class ToolsHere:
    """Runs a program as its command line does, but for a process of its own."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys

    def __call__(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Its exit status, and what it has written."""
        self._capsys.readouterr()
        command = [str(TOOLS / name), *map(str, arguments)]
        with self._patch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "path", [str(TOOLS), *sys.path])
            patch.setattr("megatron_ee.parallel.mesh.close_mesh", lambda: None)  # it is the tests', which go on
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(command[0], run_name="__main__")
        said = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(command, ended.value.code, said.out, said.err)
