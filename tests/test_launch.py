"""Which device a process takes; what launchers do is tested with the processes they start."""

from __future__ import annotations

import pytest

from sslcli import launch
from sslcli.errors import ConfigError


def has(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    monkeypatch.setattr(launch, "available", lambda: ["cpu", *kinds])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("kinds", "expected"), [((), "cpu"), (("cuda",), "cuda"), (("mps",), "cpu")], ids=str)
def test_auto_is_what_was_tried(kinds: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, *kinds)
    assert str(launch.pick_device("auto")) == expected
    assert str(launch.pick_device("cpu")) == "cpu"


def test_each_process_of_a_node_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "cuda", "mps")
    assert str(launch.pick_device("mps")) == "mps"
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (told | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert str(launch.pick_device("auto")) == str(launch.pick_device("cuda")) == "cuda:1"
    with pytest.raises(ConfigError, match="device is 'mps', on which processes cannot meet"):
        launch.pick_device("mps")
    with pytest.raises(ConfigError, match="device is 'cuda:1', but each process of a run needs a GPU of its own"):
        launch.pick_device("cuda:1")


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("cuda", (), "device is 'cuda', but this machine has only: cpu"),
        ("mps", ("cuda",), "device is 'mps', but this machine has only: cpu, cuda"),
        ("cuda:2", ("cuda",), "device is 'cuda:2', but this machine has 2 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, kinds: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, *kinds)
    with pytest.raises(ConfigError, match=message):
        launch.pick_device(name)
