"""Record of the bad images, which are those that cannot be read. A run with too many of them stops with an error."""

from __future__ import annotations

import math
import os
from pathlib import Path

from sslcli.errors import ConfigError, printable

# Surrogate characters. Python decodes each byte of a file name that is not valid UTF-8 to one of them.
RAW_BYTES = os.fsdecode(bytes(range(0x80, 0x100)))


class BadImage(Exception):
    """Raised when the image at `path` cannot be read. `reason` is the cause as text."""

    def __init__(self, path: str, reason: str) -> None:
        # Both values are passed to Exception, because pickle needs them to restore an exception from a worker process.
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class TooManyBadImages(ConfigError):
    """Raised when more images cannot be read than `dataset.max_bad` allows."""


class BadImages:
    """Collection of the images that cannot be read, one entry per path.

    Args:
        max_bad: the largest fraction in [0, 1] of the images that may be bad. With 0, the run stops at the first bad
            image.
        total: the number of images in the dataset.
    """

    def __init__(self, *, max_bad: float, total: int) -> None:
        check_fraction("max_bad", max_bad)
        self.max_bad, self.total = max_bad, total
        self.reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Number of distinct bad paths so far."""
        return len(self.reasons)

    def add(self, path: str, reason: str) -> None:
        """Add the bad image at `path`, with the cause as text. If the path was added before, nothing changes."""
        self.reasons.setdefault(path, reason)

    def check(self) -> None:
        """Raise TooManyBadImages if more than max_bad * total images are bad. The message lists up to 20 of them."""
        if self.count <= self.max_bad * self.total:
            return
        lines = [f"  {printable(path)}: {printable(reason)}" for path, reason in list(self.reasons.items())[:20]]
        if self.count > 20:
            lines.append(f"  ... and {self.count - 20} more")
        raise TooManyBadImages(
            f"{self.count} of {self.total} images cannot be read, but dataset.max_bad={self.max_bad:g} allows "
            f"{math.floor(self.max_bad * self.total)}: repair or remove them, or increase dataset.max_bad\n"
            + "\n".join(lines)
        )

    def write(self, path: Path) -> None:
        """Write one line "path<TAB>reason" per bad image, sorted by path. Without bad images, the file is empty.

        Control characters in a path become escapes such as `\\x1b`. Bytes of a path that are not UTF-8 are written
        unchanged.
        """
        lines = [
            f"{printable(name, keep=RAW_BYTES)}\t{printable(' '.join(reason.split()))}\n"
            for name, reason in sorted(self.reasons.items())
        ]
        path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]. The message names the setting `dataset.<name>`."""
    if not 0 <= value <= 1:
        raise ValueError(f"dataset.{name} is {value}, but it must be a fraction of the images in [0, 1]")
