"""Only regular files are opened; a FIFO does not block a process."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch

from sslcli.data import decode
from sslcli.data.bad_images import BadImage
from sslcli.errors import ConfigError
from sslcli.system.regular_files import open_regular, read_regular
from sslcli.weights.files import load_weights


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "003.png")
    return tmp_path / "003.png"


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "b"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"abc"
        assert read_regular(tmp_path / name, most=3) == b"abc"
    with pytest.raises(OSError, match="it has more than 0 MB"):
        read_regular(tmp_path / "a", most=2)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "c")


def test_anything_else_is_refused_at_once(fifo: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(fifo)
    start = time.monotonic()
    for path, kind in [(fifo, "FIFO"), (tmp_path / "link", "FIFO"), ("/dev/zero", "device"), (tmp_path, "folder")]:
        with pytest.raises(OSError, match=f"it is a {kind}, not a regular file"):
            open_regular(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s"))
        with pytest.raises(OSError):  # noqa: PT011  # the system itself refuses to open it
            open_regular(tmp_path / "s")
    assert time.monotonic() - start < 5


def test_a_fifo_among_images_is_a_bad_image(fifo: Path) -> None:
    with pytest.raises(BadImage, match=r"003.png: it is a FIFO, not a regular file"):
        decode.open_file(str(fifo))


def test_an_image_file_larger_than_memory_allows_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    with pytest.raises(BadImage, match="it has more than 0 MB"):
        decode.open_file(str(tmp_path / "a.png"))


def test_weights_are_read_from_regular_files(fifo: Path) -> None:
    with pytest.raises(ConfigError, match=r"003.png cannot be read \(.*it is a FIFO, not a regular file"):
        load_weights(fifo, device=torch.device("cpu"))
