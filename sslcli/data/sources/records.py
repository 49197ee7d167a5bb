"""Records of the images of a dataset. A resumed run compares records to detect images that changed since its start.

A record describes an image, a file or a shard. It consists of a name and four integers: size, modification time, hash
of the label, and hash of the contents. The contents are read only with dataset.verify=contents. Otherwise, one `stat`
call per file is enough.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslcli.errors import ConfigError, nearest, printable

VERIFY = ("times", "sizes", "contents", "none")
UNKNOWN = 0  # placeholder for a hash that was not computed; placeholders are not compared
FORMAT = 1
MAX_NAMES = 3  # maximum number of names in a message for each kind of change

ProgressCallback = Callable[[int, int], None]  # called with the number of items done and the total


def check_verify(value: str) -> str:
    """Return `value`, the value of `dataset.verify`. Raises ValueError if the value is unknown."""
    if value not in VERIFY:
        raise ValueError(
            f"dataset.verify is {value!r}, but it must be one of {', '.join(VERIFY)}.{nearest(value, VERIFY)}"
        )
    return value


@dataclass(frozen=True, eq=False)
class Records:
    """Records of the images of a dataset, in position order. One record is called a row.

    A row describes one image. There are two exceptions: in a dataset of shards, a row describes one shard, and in a
    dataset with several files per image, a row describes one file.

    Attributes:
        names: the names of all rows as bytes, joined by NUL. No file name contains NUL.
        labels: (n,) int64, a hash of the class name; 0 = no label.
        sizes: (n,) int64, bytes; -1 = unknown.
        stamps: (n,) int64, the modification time in nanoseconds, or a hash that depends on the modification time;
            0 = none.
        contents: (n,) uint64, a hash of the contents, or `UNKNOWN`.
        unit: plural noun that messages use for the rows, such as "images" or "shards".
    """

    names: bytes
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    contents: NDArray[np.uint64]
    unit: str = "images"

    def __post_init__(self) -> None:
        columns = (self.labels, self.sizes, self.stamps, self.contents)
        if {len(column) for column in columns} != {len(self.labels)} or self.names.count(b"\0") != max(
            0, len(self) - 1
        ):
            raise ValueError("the columns of the records differ in length")

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> Iterator[bytes]:
        """Yield all columns as bytes."""
        yield self.names
        for column in (self.labels, self.sizes, self.stamps, self.contents):
            yield np.ascontiguousarray(column).tobytes()

    def digested(self) -> Iterator[bytes]:
        """Yield the columns of the records as bytes, for a hash that changes if an image changes.

        If a row has a hash of the contents, the modification time of the row is irrelevant, so it is yielded as 0.
        """
        known = self.contents != UNKNOWN
        yield from replace(self, stamps=np.where(known, 0, self.stamps)).columns()


def make_records(
    names: Iterable[bytes],
    labels: NDArray[np.int64],
    *,
    sizes: NDArray[np.int64] | None = None,
    stamps: NDArray[np.int64] | None = None,
    contents: NDArray[np.uint64] | None = None,
    unit: str = "images",
) -> Records:
    """Return records with the given columns, see `Records`. If a column is None, it is filled with 0.

    names: the name of each row.
    """
    zeros = np.zeros(len(labels), np.int64)
    return Records(
        names=b"\0".join(names),
        labels=labels,
        sizes=zeros if sizes is None else sizes,
        stamps=zeros if stamps is None else stamps,
        contents=zeros.astype(np.uint64) if contents is None else contents,
        unit=unit,
    )


def label_codes(labels: Tensor, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return a hash of the class name of each label. Adding a class does not change the hashes of other classes."""
    numbers = labels.numpy()
    count = max(int(numbers.max(initial=-1)) + 1, len(classes))
    names = [*classes, *map(str, range(len(classes), count))]
    codes = np.array([0, *(code_of(name.encode("utf-8", "surrogateescape")) for name in names)], np.int64)
    found: NDArray[np.int64] = codes[np.maximum(numbers, -1) + 1]
    return found


def code_of(*parts: bytes) -> int:
    """Return a 63-bit hash of the values in `parts`. The hash is never 0."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return (int.from_bytes(state.digest(), "little") >> 1) or 1


def pack(records: Records) -> bytes:
    """Serialize records to the bytes of an .npz file."""
    header = json.dumps({"sslcli": "image records", "format": FORMAT, "unit": records.unit}).encode()
    file = io.BytesIO()
    # NumPy's default compression level takes four times as long as level 1 and saves only a tenth of the size.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, column in [
            ("told", np.frombuffer(header, np.uint8)),  # "told" is the name in the file format
            ("names", np.frombuffer(records.names, np.uint8)),
            *((name, getattr(records, name)) for name in ("labels", "sizes", "stamps", "contents")),
        ]:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(column), allow_pickle=False)
    return file.getvalue()


def unpack(content: bytes) -> Records:
    """Deserialize the records in an .npz file. Raises ValueError if the file contains no records or is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            header = json.loads(arrays["told"].tobytes())
            if header["sslcli"] != "image records" or header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, but only format {FORMAT} is supported")
            columns = {name: arrays[name] for name in ("labels", "sizes", "stamps")}
            if any(column.dtype != np.int64 for column in columns.values()) or arrays["contents"].dtype != np.uint64:
                raise ValueError("its columns have wrong dtypes")
            return Records(arrays["names"].tobytes(), **columns, contents=arrays["contents"], unit=str(header["unit"]))
    except Exception as error:  # damaged files can cause nearly any type of exception
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


@dataclass(frozen=True)
class Changes:
    """Differences between the records of a dataset at two times.

    A record describes an image, a file or a shard. The differences are lists of names of records.
    """

    total: int  # number of rows in the older records
    unit: str
    changed: list[str]  # rows whose label, size or contents differ
    times_changed: list[str]  # rows that differ only in the modification time
    appeared: list[str]
    vanished: list[str]
    order: int  # number of rows that are in both records, but at another place in the order of these rows

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self) if field.name not in ("total", "unit"))

    @property
    def only_times_differ(self) -> bool:
        """Whether the two records differ only in the modification times of files."""
        return bool(self.times_changed) and not (self.changed or self.appeared or self.vanished or self.order)

    def describe(self) -> str:
        """Return counts and a few names as text, such as "of 40 images, 4 changed (a/1.jpg, a/2.jpg, a/3.jpg, ...)"."""
        parts = [
            f"{len(names)} {verb} ({', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''})"
            for names, verb in (
                (self.changed, "changed in label, size or contents"),
                (self.times_changed, "changed in modification time"),
                (self.appeared, "appeared"),
                (self.vanished, "vanished"),
            )
            if names
        ]
        if self.order:
            parts.append(f"{self.order} have another position in the order")
        return f"of {self.total} {self.unit}, {', '.join(parts)}"


def compare(then: Records, now: Records, *, times: bool) -> Changes:
    """Return the changes from the older records `then` to the newer records `now`.

    The names, order, labels and sizes are always compared. If a hash of the contents of an item (an image, a file or a
    shard) is known in both `then` and `now`, the hashes are compared, too. If not, the modification times of the item
    are compared, unless `times` is False.
    """
    if then.names == now.names:
        before = after = np.arange(len(then))
        appeared, vanished, order = list[str](), list[str](), 0
    else:
        positions_then, positions_now = _positions(then), _positions(now)
        both = [key for key in positions_then if key in positions_now]
        before = np.array([positions_then[key] for key in both], np.int64)
        after = np.array([positions_now[key] for key in both], np.int64)
        appeared = [
            printable(os.fsdecode(name)) for name, count in positions_now if (name, count) not in positions_then
        ]
        vanished = [
            printable(os.fsdecode(name)) for name, count in positions_then if (name, count) not in positions_now
        ]
        order = int((after.argsort(kind="stable") != np.arange(len(after))).sum())
    known = (then.contents[before] != UNKNOWN) & (now.contents[after] != UNKNOWN)
    changed = then.labels[before] != now.labels[after]
    changed |= then.sizes[before] != now.sizes[after]
    changed |= known & (then.contents[before] != now.contents[after])
    times_changed = ~changed & ~known & (then.stamps[before] != now.stamps[after]) & times
    names = now.names.split(b"\0") if changed.any() or times_changed.any() else []
    return Changes(
        total=len(then),
        unit=now.unit,
        changed=[printable(os.fsdecode(names[at])) for at in after[changed].tolist()],
        times_changed=[printable(os.fsdecode(names[at])) for at in after[times_changed].tolist()],
        appeared=appeared,
        vanished=vanished,
        order=order,
    )


def _positions(records: Records) -> dict[tuple[bytes, int], int]:
    """Return a mapping from the key of each record to its index in `records`.

    The key is the pair (name, number of earlier records with this name).
    """
    counts: dict[bytes, int] = {}
    positions = {}
    for position, name in enumerate(records.names.split(b"\0")):
        count = counts[name] = counts.get(name, -1) + 1
        positions[name, count] = position
    return positions


def changed_images_error(changes: Changes, *, name: str, known: bool) -> ConfigError:
    """Return the error for a run that would resume with changed images.

    name: name of the dataset.
    known: whether the run stored hashes of the contents. If not, the message suggests comparing only the sizes.
    """
    remedy = "Restore them, or start another run"
    if changes.only_times_differ:
        option = "dataset.verify=contents, which compares the contents" if known else "dataset.verify=sizes"
        remedy += f"; if only the times differ, as after copying, resume with {option}"
    return ConfigError(f"the images of {name} changed since this run began: {changes.describe()}. {remedy}")


def digest(parts: Iterable[bytes]) -> str:
    """Return 16 hex digits of the sha256 of `parts`. The length of each part is hashed before the part."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]
