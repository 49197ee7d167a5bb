"""Start of a run: in this process, in several, or as a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sslcli.distributed import processes
from sslcli.runs import launch as _launch

pytestmark = pytest.mark.usefixtures("restored_signals")


@pytest.mark.parametrize(("saved", "code"), [(False, 1), (True, processes.EXIT_LOST)])
def test_an_error_of_the_program_is_tried_again_only_from_a_newer_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: bool, code: int
) -> None:
    def fail(config: dict[str, str]) -> int:
        if saved:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / "step-00000001.pt").touch()
        raise ZeroDivisionError

    (tmp_path / "config.json").write_text(json.dumps({"run_dir": str(tmp_path), "trust": []}))
    monkeypatch.setattr("sslcli.distributed.processes.die_with_parent", lambda: None)
    monkeypatch.setattr(_launch, "launch", fail)
    monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as ended:
        _launch.main()
    assert ended.value.code == code
    assert capsys.readouterr().err.count("Traceback") == 1
