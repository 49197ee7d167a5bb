"""Cores and GPUs of parallel jobs, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Cli
from sslcli.sweeps.queue import Relay, Running, pinned


def test_a_process_started_on_cores_stays_there_and_its_parent_does_not() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned((core,)):
        process = subprocess.Popen([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], stdout=-1)
    assert os.sched_getaffinity(0) == before
    assert process.communicate()[0].decode().strip() == str({core})


def test_jobs_run_at_once_on_slots_of_their_own(
    quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ended = cli("ssl-train", "-m", "seed=range(0,3)", "hydra.sweep.dir=here")
    assert ended.code == 0
    assert "2 jobs in parallel: GPU 0" in ended.out
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("here/*/starts")]
    assert sorted(start["gpus"] for start in starts) in (["0", "0", "1"], ["0", "1", "1"])
    if len(os.sched_getaffinity(0)) > 1:
        assert len({tuple(start["cores"]) for start in starts}) == 2


@pytest.mark.parametrize(("ends_with", "called"), [("75", [signal.SIGUSR2]), ("0", [])])
def test_a_scheduler_queues_its_job_again_once_the_run_is_saved_and_not_when_it_is_finished(
    ends_with: str, called: list[int]
) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    code = f"import signal, sys; signal.signal(15, lambda *_: sys.exit({ends_with})); print(flush=True); signal.pause()"
    try:
        with Relay() as relay:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            relay.add(Running(None, process, 0, ()))  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGUSR2)
            assert process.wait(60) == int(ends_with)
            relay.unfinished = process.returncode != 0
            assert relay.is_stopping
            assert seen == []
        assert seen == called
    finally:
        signal.signal(signal.SIGUSR2, before)
