from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from sslcli.distributed import watchdog
from sslcli.distributed.watchdog import Progress, stall_message
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.system.launch_variables import Member


@pytest.fixture(autouse=True)
def _from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_own", Progress())


def at(collectives: int, place: str = "step 7", pid: int = 70) -> Progress:
    return Progress(collectives=collectives, place=place, host="node", pid=pid)


def test_the_process_that_is_behind_is_named_once_with_its_place() -> None:
    found = {0: at(5), 1: at(4, "the images of step 7", pid=71), 2: at(5)}
    stalled = [stall_message(rank, found, set(), 600) for rank in range(3)]
    assert stalled[1:] == ["", ""]
    assert "waited 600 s (launcher.timeout) for process 1 (id 71 on node, at the images of step 7)" in stalled[0]
    assert "Run the same command again to resume" in stalled[0]


def test_where_the_main_process_is_behind_the_next_one_tells() -> None:
    found = {0: at(4), 1: at(5), 2: at(5)}
    stalled = [stall_message(rank, found, set(), 600) for rank in range(3)]
    assert "process 0 (id 70" in stalled[1]
    assert (stalled[0], stalled[2]) == ("", "")


def test_a_stopped_process_is_named_even_if_it_had_arrived() -> None:
    stalled = stall_message(0, {0: at(5), 1: at(5)}, {1}, 600)
    assert (
        "process 1 (id 70 on node, at step 7, it does not answer: it is stopped, or its machine has failed)" in stalled
    )


def test_where_none_is_behind_no_process_is_named() -> None:
    stalled = stall_message(0, {0: at(5), 1: at(5, "step 8")}, set(), 600)
    assert "none is behind the others (at step 7, step 8)" in stalled


def test_a_process_alone_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    watchdog.report_progress("step 7")
    assert ended_while_at_work(store, monkeypatch) == []


@pytest.mark.parametrize("joined", [True, False])
def test_a_process_alone_that_waits_too_long_for_images_is_ended(
    joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog.report_progress("the images of step 7")
    store = dist.FileStore(str(tmp_path / "store"), 1) if joined else None
    (message,) = ended_while_at_work(store, monkeypatch)
    assert message.startswith("the images of step 7 did not arrive within 0.1 s (launcher.timeout)")


def ended_while_at_work(store: dist.FileStore | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a process alone is stalled after half a second without progress, with a limit of 0.2 s."""
    monkeypatch.setattr(watchdog, "SLACK", 0.1)
    stalled: list[str] = []
    alone = watchdog.watched_alone(limit=0.1, end=stalled.append)
    with (
        alone
        if store is None
        else watchdog.watched(store, rank=0, size=1, limit=0.1, end=stalled.append, leave=pytest.fail)
    ):
        time.sleep(0.5)
    return stalled


def test_a_store_that_does_not_answer_is_told_by_each() -> None:
    assert "the store of process 0 does not answer" in stall_message(3, {}, {0, 1, 2, 3}, 600)


class Other:
    """A second process as the store shows it."""

    def __init__(self, folder: Path) -> None:
        self.store = dist.FileStore(str(folder / "store"), 2)
        self.progress = Progress(host="elsewhere", pid=2)
        self.publish()

    def publish(self) -> None:
        self.progress.beats += 1
        watchdog.publish(self.store, 1, self.progress)


def test_waiting_for_another_that_works_has_no_limit(tmp_path: Path) -> None:
    ended: list[str] = []
    other = Other(tmp_path)
    watchdog.publish(other.store, 0, Progress())
    with watchdog.watched(other.store, rank=0, size=2, limit=0.4, end=ended.append, leave=pytest.fail):
        for _ in range(10):
            time.sleep(0.1)
            other.progress.actions += 1
            other.publish()
    assert ended == []


def test_a_process_that_beats_and_does_nothing_is_noticed_at_the_limit_and_not_before(tmp_path: Path) -> None:
    ended: list[str] = []
    over = threading.Event()
    other = Other(tmp_path)
    watchdog.publish(other.store, 0, Progress())
    watchdog.record_collective()
    start = time.monotonic()
    with watchdog.watched(
        other.store,
        rank=0,
        size=2,
        limit=0.6,
        end=lambda message: (ended.append(message), over.set()),
        leave=pytest.fail,
    ):
        while not over.wait(0.02):
            other.publish()
            assert time.monotonic() - start < 30
    assert time.monotonic() - start >= 0.6
    assert len(ended) == 1
    assert "process 1 (id 2 on elsewhere, at the start)" in ended[0]


def test_time_in_which_the_process_itself_was_stopped_does_not_count(tmp_path: Path) -> None:
    ended: list[str] = []
    other = Other(tmp_path)
    watchdog.publish(other.store, 0, Progress())
    child = os.fork()
    if child == 0:
        with watchdog.watched(other.store, rank=0, size=2, limit=1.0, end=lambda _: os._exit(3), leave=pytest.fail):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.2)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    time.sleep(1.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ended == []


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("place", "number", "code"),
    [
        ("step 7", signal.SIGTERM, 7),
        ("step 7", signal.SIGUSR1, 3),
        (f"{watchdog.CHECKPOINT} after step 7", signal.SIGTERM, 3),
    ],
)
def test_a_process_blocked_in_c_code_leaves_after_sigterm_if_another_has_ended(
    place: str, number: int, code: int, tmp_path: Path
) -> None:
    """The other process publishes nothing any more, as after its end. Otherwise the process ends at the limit."""
    store = Other(tmp_path).store
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(number, lambda *arguments: os._exit(9))  # not called while the main thread is blocked
        watchdog.report_progress(place)
        end = lambda message: os._exit(3)  # noqa: E731
        with watchdog.watched(store, rank=0, size=2, limit=3.0, end=end, leave=lambda: os._exit(7)):
            os.write(writer, b"x")
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # takes about a minute in C code
        os._exit(0)
    os.read(reader, 1)
    time.sleep(0.2)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_processes_that_do_not_come_are_named() -> None:
    with pytest.raises(TrainingFailed, match=r"of 3 processes, these have not joined within 0\.3 s .*: 1, 2\."):
        watchdog.join(Member(0, 3, 0, "127.0.0.1", free_port()), 0.3)


def test_a_main_process_that_does_not_answer_is_told() -> None:
    with pytest.raises(TrainingFailed, match=r"process 0 did not answer at 127\.0\.0\.1:\d+ within 1 s"):
        watchdog.join(Member(1, 2, 1, "127.0.0.1", free_port()), 1.0)


def test_a_port_of_another_program_is_named_with_the_remedy() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        expected = (
            rf"MASTER_PORT is {port}, but rank 0 .*another process of this machine uses the port: set a free port"
        )
        with pytest.raises(ConfigError, match=expected):
            watchdog.join(Member(0, 2, 0, "127.0.0.1", port), 30.0)


def test_a_store_hands_over_what_a_process_told(tmp_path: Path) -> None:
    other = Other(tmp_path)
    own = Progress(collectives=3, actions=9, place="step 2", beats=4, host="here", pid=5)
    watchdog.publish(other.store, 0, own)
    assert watchdog.read(other.store, 2) == {0: own, 1: other.progress}
    other.store.set_timeout(timedelta(seconds=0.1))
    assert watchdog.read(other.store, 3) == {}
