"""The run on a GPU: a part that fails or hangs costs no other, and every part is a command that its module takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import gpu


def test_a_part_that_fails_or_hangs_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys; open('seen', 'a').write('x'); sys.exit(int(sys.argv[1]))")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    found = gpu.run(("ends 3", "hangs", "ends 0"), 60.0)
    assert found == {"ends 3": "exit status 3", "hangs": "not done after 1 s"}
    assert (tmp_path / "seen").read_text() == "xx"
    assert gpu.run(("ends 0",), 0.0) == {"ends 0": "no time was left"}


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part.startswith("benchmarks.")])
def test_every_part_is_a_command_that_its_module_takes(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by the module itself, which objects to the last argument alone."""
    name, *arguments = part.split()
    monkeypatch.setattr("sys.argv", [name, *arguments, "--nonsense"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert capsys.readouterr().err.strip().endswith(": error: unrecognized arguments: --nonsense")
