"""One process of a training run."""

from __future__ import annotations

import gc
import json
from pathlib import Path

from command_line import SMALL, Cli
from small_runs import complete, start_warm
from sslcli.engine.loop import Run

QUICK = [*SMALL, "monitor.knn_every_epochs=0", "monitor.health_every_steps=0", "monitor.pictures=0"]


def test_resume_never_and_must_are_obeyed(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", f"run_dir={run_dir}", "resume=never")
    assert ended.code == 2
    assert "resume is 'never'" in ended.err
    ended = cli("ssl-train", *QUICK, "run_dir=new", "resume=must")
    assert ended.code == 2
    assert "holds no checkpoint" in ended.err
    assert not (tmp_path / "new").exists()
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", f"run_dir={run_dir}", "resume=must")
    assert (ended.code, ended.err) == (0, "")


def note_garbage_collection(told: Path) -> None:
    """Leave in a file whether garbage is looked for when training begins, and among how much of what was there."""
    from sslcli.runs import worker

    train = worker.train

    def noted(job: Run) -> None:
        told.write_text(json.dumps([gc.isenabled(), len(gc.get_objects()), gc.get_freeze_count()]))
        train(job)

    worker.train = noted


def test_training_looks_for_garbage_but_not_among_what_was_imported(tmp_path: Path) -> None:
    told, log = tmp_path / "told", tmp_path / "log"
    arguments = [*QUICK, "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    complete(start_warm(*arguments, log=log, prepare=note_garbage_collection, given=told), log)
    collects, watched, frozen = json.loads(told.read_text())
    assert collects
    assert frozen > 100_000 > 10_000 > watched
