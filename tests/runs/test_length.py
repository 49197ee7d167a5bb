"""Extension of runs: the same command with a greater length continues, also after a kill."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from command_line import SMALL, Cli
from small_runs import complete, differences, family, metrics, newest, start_warm, survivors, wait_for_step
from sslcli.engine.phases import Phase
from sslcli.runs import directory, length

FIRST = {"start": 0, "total": 20, "extend": "rescale"}
CONFIG: dict[str, Any] = {
    "train": {"epochs": 10, "max_steps": None},
    "effective": {"steps": 20, "steps per epoch": 2},
}
BYOL = ["method=byol", "method.hidden=16", "method.dim=8", "backbone.width=4", "dataset.limit=64"]
QUICK = [*BYOL, "dataset.train_images=80", "dataset.test_images=20", "train.batch_size=8", "train.save_every_steps=3"]
QUICK += ["train.log_every_steps=1", "monitor.pictures=0", "dataset.workers=0", "train.precision=fp32"]


def values(**train: Any) -> dict[str, Any]:
    return {"train": CONFIG["train"] | train}


def test_the_length_is_read_from_the_stored_configuration_of_any_version() -> None:
    assert length.stored_phases(CONFIG) == (Phase(**FIRST),)
    assert length.requested_steps(CONFIG, values(epochs=15)) == 30
    assert length.requested_steps(CONFIG, values(max_steps=7)) == 7
    old = CONFIG | {"effective": {"steps": 20, "steps an epoch": 2}}
    assert length.requested_steps(old, values(epochs=15)) == 30
    assert length.stored_phases({"train": {}}) == ()
    assert length.has_same_length(CONFIG, values(max_steps=20))
    assert not length.has_same_length(CONFIG, values(epochs=11))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"start": 0}],
        [{**FIRST, "start": 3}],
        [FIRST, FIRST],
        "x",
        [{**FIRST, "total": "a"}],
        [{**FIRST, "extend": "up"}],
    ],
)
def test_invalid_phases_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"^effective\.phases is invalid: "):
        length.stored_phases({"effective": {"phases": rows}})


def test_only_extended_runs_store_their_phases() -> None:
    phases = (Phase(**FIRST), Phase(20, 30, "decay"))
    assert length.phase_rows(phases[:1]) == {}
    assert length.stored_phases({"effective": length.phase_rows(phases)}) == phases


def test_a_run_is_extended_several_times_and_not_shortened(cli: Cli) -> None:
    def train(*more: str) -> tuple[int, str, str]:
        ended = cli("ssl-train", *SMALL, "monitor.knn_every_epochs=0", "run_dir=run", *more)
        return ended.code, ended.out, ended.err

    assert train("train.max_steps=2")[0] == 0
    code, out, err = train("train.max_steps=4")
    assert code == 0, err
    assert "extended from 2 to 4 steps" in out
    assert "the learning rate changes from" in out
    assert train("train.max_steps=4")[1].startswith("this run is finished already")
    code, out, err = train("train.max_steps=6", "train.extend=restart")
    assert code == 0, err
    for earlier in ("2", "4"):
        assert "finished already" in train(f"train.max_steps={earlier}")[1]
    code, _, err = train("train.max_steps=5", "train.extend=restart")
    assert code == 2
    assert "a run cannot be shortened" in err
    stored = directory.read_config(Path("run"))
    assert [row.extend for row in length.stored_phases(stored)] == ["rescale", "rescale", "restart"]
    assert [line["step"] for line in metrics(Path("run")) if "train/loss" in line][-1] == 6
    shutil.rmtree(Path("run") / "checkpoints")
    code, _, err = train("train.max_steps=8", "train.extend=restart")
    assert code == 2
    assert "its checkpoints were deleted" in err
    assert (Path("run") / "done").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_extended_run_that_is_killed_ends_as_one_that_is_not(processes: int, tmp_path: Path) -> None:
    quick = [*QUICK, *(["launcher=multi", "launcher.processes=2"] if processes == 2 else [])]
    log, runs = tmp_path / "log", [tmp_path / name for name in ("whole", "killed")]
    complete(start_warm(*quick, "train.max_steps=8", f"run_dir={runs[0]}", log=log), log)
    shutil.copytree(runs[0], runs[1], symlinks=True)
    command = [*quick, "train.max_steps=20", "train.extend=decay", "train.schedule=cosine"]
    complete(start_warm(*command, f"run_dir={runs[0]}", log=log), log)
    for step in (9, 14):
        process = start_warm(*command, f"run_dir={runs[1]}", log=log)
        wait_for_step(process, runs[1], step)
        members = family(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert process.finish() == -signal.SIGKILL
        assert survivors(members, within=60) == []
        assert not (runs[1] / "done").exists()
    complete(start_warm(*command, f"run_dir={runs[1]}", log=log), log)
    assert newest(runs[0])["step"] == 20
    assert newest(runs[0])["environment"]["processes"] == processes
    assert differences(newest(runs[1]), newest(runs[0])) == []
    assert metrics(runs[1]) == metrics(runs[0])
