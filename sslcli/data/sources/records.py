"""What is noted of every image of a set, so that a later start can tell which images changed since.

A record is a row of plain numbers and a name. Records are cheap to take: they need the listing of the files and one
question to the file system per file, and the contents of the files only on request.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslcli.errors import ConfigError, nearest

VERIFY = ("times", "sizes", "contents", "none")
UNKNOWN = 0  # of a hash: not taken, so there is nothing to compare
FORMAT = 1
SHOWN = 3  # names a message lists per kind of change

Tell = Callable[[int, int], None]  # how many of how many are done


def check_verify(value: str) -> str:
    """Return the value of `dataset.verify`. Raises ValueError unless it is one that is known."""
    if value not in VERIFY:
        raise ValueError(
            f"dataset.verify is {value!r}, but it must be one of {', '.join(VERIFY)}.{nearest(value, VERIFY)}"
        )
    return value


@dataclass(frozen=True, eq=False)
class Records:
    """One row per image in position order, or per shard or file where an image has several.

    Attributes:
        names: the names of all rows in bytes, joined by NUL, which no file name contains.
        labels: (n,) int64, a hash of the name of the class; 0 = no label.
        sizes: (n,) int64, bytes; -1 = cannot be told.
        stamps: (n,) int64, the modification time in nanoseconds, or a hash that changes as it does; 0 = there is none.
        contents: (n,) uint64, a hash of the contents, or `UNKNOWN`.
        unit: what a row is, in the plural, for messages.
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
        """Yield all columns, with modification times only where the contents are not known."""
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
    """Return records of which the columns that are left out are empty."""
    nothing = np.zeros(len(labels), np.int64)
    return Records(
        names=b"\0".join(names),
        labels=labels,
        sizes=nothing if sizes is None else sizes,
        stamps=nothing if stamps is None else stamps,
        contents=nothing.astype(np.uint64) if contents is None else contents,
        unit=unit,
    )


def label_codes(labels: Tensor, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return a hash of the class name of each label, so that a further class does not change the labels of others."""
    numbers = labels.numpy()
    count = max(int(numbers.max(initial=-1)) + 1, len(classes))
    names = [*classes, *map(str, range(len(classes), count))]
    codes = np.array([0, *(code_of(name.encode("utf-8", "surrogateescape")) for name in names)], np.int64)
    found: NDArray[np.int64] = codes[np.maximum(numbers, -1) + 1]
    return found


def code_of(*parts: bytes) -> int:
    """Return 63 bits that tell these parts from all others, never 0."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return (int.from_bytes(state.digest(), "little") >> 1) or 1


def pack(records: Records) -> bytes:
    """Return the contents of an .npz file with the records."""
    told = json.dumps({"sslcli": "image records", "format": FORMAT, "unit": records.unit}).encode()
    file = io.BytesIO()
    # The level of numpy itself takes four times as long for a tenth of the size.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, column in [
            ("told", np.frombuffer(told, np.uint8)),
            ("names", np.frombuffer(records.names, np.uint8)),
            *((name, getattr(records, name)) for name in ("labels", "sizes", "stamps", "contents")),
        ]:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(column), allow_pickle=False)
    return file.getvalue()


def unpack(content: bytes) -> Records:
    """Return the records in an .npz file. Raises ValueError where it holds no records or is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            told = json.loads(arrays["told"].tobytes())
            if told["sslcli"] != "image records" or told["format"] != FORMAT:
                raise ValueError(f"it has format {told['format']!r}, and {FORMAT} is the one that can be read")
            columns = {name: arrays[name] for name in ("labels", "sizes", "stamps")}
            if any(column.dtype != np.int64 for column in columns.values()) or arrays["contents"].dtype != np.uint64:
                raise ValueError("the columns have other types")
            return Records(arrays["names"].tobytes(), **columns, contents=arrays["contents"], unit=str(told["unit"]))
    except (KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error


@dataclass(frozen=True)
class Changes:
    """What differs between the records of two times; names, and `order` = how many have another position."""

    total: int  # rows then
    unit: str
    changed: list[str]  # another label, size or contents
    touched: list[str]  # another modification time alone
    appeared: list[str]
    vanished: list[str]
    order: int

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self) if field.name not in ("total", "unit"))

    @property
    def times_alone(self) -> bool:
        """Whether nothing but modification times differs."""
        return bool(self.touched) and not (self.changed or self.appeared or self.vanished or self.order)

    def text(self) -> str:
        """Return the counts with a few names, such as "of 40 images, 4 changed (a/1.jpg, a/2.jpg, a/3.jpg, ...)"."""
        parts = [
            f"{len(names)} {verb} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for names, verb in (
                (self.changed, "changed in label, size or contents"),
                (self.touched, "changed in modification time"),
                (self.appeared, "appeared"),
                (self.vanished, "vanished"),
            )
            if names
        ]
        if self.order:
            parts.append(f"{self.order} have another place in the order")
        return f"of {self.total} {self.unit}, {', '.join(parts)}"


def compare(then: Records, now: Records, *, times: bool) -> Changes:
    """Return what changed. Contents are compared where both know them; else modification times, if `times`."""
    if then.names == now.names:
        before = after = np.arange(len(then))
        appeared, vanished, order = list[str](), list[str](), 0
    else:
        places_then, places_now = _places(then), _places(now)
        both = [key for key in places_then if key in places_now]
        before = np.array([places_then[key] for key in both], np.int64)
        after = np.array([places_now[key] for key in both], np.int64)
        appeared = [_shown(name) for name, count in places_now if (name, count) not in places_then]
        vanished = [_shown(name) for name, count in places_then if (name, count) not in places_now]
        order = int((after.argsort(kind="stable") != np.arange(len(after))).sum())
    known = (then.contents[before] != UNKNOWN) & (now.contents[after] != UNKNOWN)
    changed = then.labels[before] != now.labels[after]
    changed |= then.sizes[before] != now.sizes[after]
    changed |= known & (then.contents[before] != now.contents[after])
    touched = ~changed & ~known & (then.stamps[before] != now.stamps[after]) & times
    names = now.names.split(b"\0") if changed.any() or touched.any() else []
    return Changes(
        total=len(then),
        unit=now.unit,
        changed=[_shown(names[at]) for at in after[changed].tolist()],
        touched=[_shown(names[at]) for at in after[touched].tolist()],
        appeared=appeared,
        vanished=vanished,
        order=order,
    )


def _places(records: Records) -> dict[tuple[bytes, int], int]:
    """Return the position by name and by how often the name came before."""
    seen: dict[bytes, int] = {}
    places = {}
    for position, name in enumerate(records.names.split(b"\0")):
        count = seen[name] = seen.get(name, -1) + 1
        places[name, count] = position
    return places


def _shown(name: bytes) -> str:
    """Return the name as text that no terminal takes for a command."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refusal(changes: Changes, *, name: str, known: bool) -> ConfigError:
    """Return the error for a run that would go on with other images.

    name: of the set. known: whether the contents were stored, so that they can be compared.
    """
    remedy = "Put them back, or start another run"
    if changes.times_alone:
        way = "dataset.verify=contents, which compares the contents" if known else "dataset.verify=sizes"
        remedy += f"; if only the times differ, as after copying, go on with {way}"
    return ConfigError(f"the images of {name} changed since this run began: {changes.text()}. {remedy}")
