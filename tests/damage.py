"""Functions that damage a file, and an object that creates a file when unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_utf8(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" + content[len(content) // 2 :])


def nul_bytes(path: Path) -> None:
    """Overwrite bytes in the middle, as a crash of the machine does."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(40) + content[middle + 40 :])


def other_type(path: Path) -> None:
    """Replace the content by a number, which is valid JSON and yaml."""
    path.write_bytes(b"3\n")


def doubled_lines(path: Path) -> None:
    path.write_bytes(b"".join(2 * line for line in path.read_bytes().splitlines(keepends=True)))


class Malice:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)
