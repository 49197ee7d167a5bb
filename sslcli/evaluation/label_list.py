"""List files: text files with the names of the labeled images of a subset, one name per line.

SimCLR published such lists for 1 % and 10 % of ImageNet:
https://github.com/google-research/simclr/tree/master/imagenet_subsets. A line is a file name (n01440764_10183.JPEG) or
a path. Only the last folders of a path need to match, so a list does not depend on where the images are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_STEM = 40  # maximum characters of a list's file name in the name of a result


@dataclass(frozen=True, kw_only=True)
class LabelList:
    """Content of a list file: the names of the images, and a digest of these names in 6 hex digits."""

    path: Path
    names: Sequence[str]
    digest: str

    @property
    def name(self) -> str:
        """Name of the list in names of results: the stem of `path` and the digest, as in "10percent-3fa2b1"."""
        readable = re.sub(r"[^\w.+-]+", "-", self.path.stem)[:MAX_STEM]
        return f"{readable}-{self.digest}"


def read_list(path: Path) -> LabelList:
    """Read a list file. Empty lines are ignored.

    Raises ValueError if the file cannot be read, is empty or has a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ValueError(
            f"list={path} cannot be read ({reason}): give a text file with one image name per line"
        ) from None
    names = [name for line in lines if (name := line.strip().replace("\\", "/"))]
    if not names:
        raise ValueError(f"list={path} contains no names: write one image name per line")
    check_unique(names, path)
    return LabelList(path=path, names=names, digest=hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:6])


def check_unique(names: Sequence[str], path: Path) -> None:
    """Raise ValueError if a name occurs more than once. The message has the number of such names and an example."""
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if repeated:
        raise ValueError(
            f"list={path} contains {len(repeated):,} names more than once, such as {repeated[0]!r}: remove the "
            "repeated lines"
        )


def rows_of(listed: LabelList, paths: Iterable[str]) -> Tensor:
    """Return the indices (k,) int64, in ascending order, of the images with the k names of a list.

    `paths` (n,) contains the paths of the labeled training images, and the indices refer to `paths`. A name matches a
    path with the same file name. If the name has folders, at least the last folder must also match. If several paths
    match, the path with the most matching folders is used.

    Raises ValueError if a name matches no path, if a name matches several paths equally well, or if two names match the
    same path. The message has the number of such names and an example.
    """
    wanted = {name.rpartition("/")[2] for name in listed.names}
    places: dict[str, list[tuple[int, list[str]]]] = {}
    for row, path in enumerate(paths):
        parts = path.replace("\\", "/").split("/")
        if parts[-1] in wanted:
            places.setdefault(parts[-1], []).append((row, parts))
    found: dict[int, str] = {}
    missing, ambiguous, repeated = [], [], []
    for name in listed.names:
        rows = best_matches(name, places.get(name.rpartition("/")[2], []))
        if not rows:
            missing.append(name)
        elif len(rows) > 1:
            ambiguous.append(name)
        elif rows[0] in found:
            repeated.append((found[rows[0]], name))
        else:
            found[rows[0]] = name
    where, total = f"list={listed.path}", len(listed.names)
    if missing:
        raise ValueError(
            f"{len(missing):,} of the {total:,} names in {where} are not names of labeled training images, such as "
            f"{missing[0]!r}: choose the dataset of the list, or remove these names"
        )
    if ambiguous:
        raise ValueError(
            f"{len(ambiguous):,} of the {total:,} names in {where} match several training images, such as "
            f"{ambiguous[0]!r}: write the class folder before the file name"
        )
    if repeated:
        one, other = repeated[0]
        raise ValueError(
            f"{len(repeated):,} training images have two names in {where}, such as {one!r} and {other!r}: remove one "
            "of the two lines"
        )
    return torch.tensor(sorted(found))


def best_matches(name: str, places: Sequence[tuple[int, Sequence[str]]]) -> Sequence[int]:
    """Return the row numbers of the paths that match a name best.

    A path matches better if more parts at its end (file name and folders) equal those of the name. At least the file
    name must be equal. If the name contains a folder, the last folder must be equal too. If no path fulfills these
    conditions, the result is empty.

    `places` contains, for each path, its row number and its parts.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    counts = [matching_parts(parts, path) for _, path in places]
    most = max(counts, default=0)
    if most < min(2, len(parts)):
        return []
    return [row for (row, _), count in zip(places, counts, strict=True) if count == most]


def matching_parts(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the number of equal parts at the end of two paths."""
    count = 0
    for mine, yours in zip(reversed(one), reversed(other), strict=False):
        if mine != yours:
            break
        count += 1
    return count
