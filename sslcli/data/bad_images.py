"""Images that cannot be read: each is known by path and reason, and too many of them end the run."""

from __future__ import annotations

import math
from pathlib import Path

from sslcli.errors import ConfigError


class BadImage(Exception):
    """The image at `path` cannot be read, for `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        # Both as args: an exception that crosses from a worker process is rebuilt from them.
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class TooManyBadImages(ConfigError):
    """More images than `dataset.max_bad` allows cannot be read."""


class BadImages:
    """Collects the images that cannot be read, each path once, and says when they are too many.

    Args:
        max_bad: the largest share in [0, 1] of `total` that may be bad; 0 stops at the first one.
        total: the number of images of the set.
    """

    def __init__(self, *, max_bad: float, total: int) -> None:
        check_share("max_bad", max_bad)
        self.max_bad, self.total = max_bad, total
        self.reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """The number of different bad paths so far."""
        return len(self.reasons)

    def add(self, path: str, reason: str) -> None:
        """Note a bad image; a path that is known already does not count again."""
        self.reasons.setdefault(path, reason)

    def check(self) -> None:
        """Raise TooManyBadImages, with up to 20 paths and reasons, once more than max_bad * total images are bad."""
        if self.count <= self.max_bad * self.total:
            return
        lines = [f"  {path}: {reason}" for path, reason in list(self.reasons.items())[:20]]
        if self.count > 20:
            lines.append(f"  ... and {self.count - 20} more")
        raise TooManyBadImages(
            f"{self.count} of {self.total} images cannot be read, but dataset.max_bad={self.max_bad:g} allows "
            f"{math.floor(self.max_bad * self.total)}: repair or remove them, or raise dataset.max_bad\n"
            + "\n".join(lines)
        )

    def write(self, path: Path) -> None:
        """Write one line "path<TAB>reason" a bad image, sorted by path; an empty file where there is none."""
        lines = [f"{name}\t{' '.join(reason.split())}\n" for name, reason in sorted(self.reasons.items())]
        path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"dataset.{name} is {value}, but it is a share of the images, so it must be in [0, 1]")
