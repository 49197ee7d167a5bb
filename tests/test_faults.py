"""What goes wrong around a run: it ends with one message and the right exit code, and the same command goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from runs import complete, family, last_step, make_folder, start_warm, survivors, wait_for_step


def test_a_killed_data_worker_ends_the_run_with_a_message_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [
        "dataset=folder",
        f"dataset.root={make_folder(tmp_path / 'images', broken=0)}",
        "dataset.image_size=16",
        "dataset.workers=2",
        "dataset.val_fraction=0",
        "backbone.width=4",
        "train.batch_size=8",
        "train.max_steps=400",
        "train.save_every_steps=3",
        "train.log_every=1",
        "monitor.knn_every=0",
        f"run_dir={run_dir}",
    ]
    process = start_warm(*command, log=log)
    wait_for_step(process, run_dir, 5)
    worker, other = family(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert process.finish() == 3
    assert survivors([other], within=5) == []
    told = log.read_text()
    assert "a data worker died" in told
    assert "lower dataset.workers" in told
    assert "Traceback" not in told
    assert not (run_dir / "done").exists()
    before = last_step(run_dir)
    complete(start_warm(*command, "dataset.workers=0", log=log), log)
    assert "continuing from step" in log.read_text().removeprefix(told)
    assert 5 <= before < last_step(run_dir) == 400


def test_a_run_directory_that_cannot_be_made_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = tmp_path / "log"
    process = start_warm("train.max_steps=2", "dataset.limit=300", f"run_dir={tmp_path / 'file' / 'run'}", log=log)
    assert process.finish() == 2
    told = log.read_text()
    assert str(tmp_path / "file") in told
    assert "Traceback" not in told
