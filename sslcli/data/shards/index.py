"""Find the shards of a set and know what is in each, gone through once and kept in a folder for the next time."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from sslcli.data.shards.formats import ENDINGS, Index, Shard, index_of
from sslcli.data.sources.vision import alone
from sslcli.errors import ConfigError
from sslcli.system.atomic import replace

VERSION = 1  # of the files in the folder
_THREADS = 8
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "blob_id")


def expand(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`; several ranges give all pairs."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ConfigError(f"the range {match[0]} in {pattern} runs backwards: put the smaller number first")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [whole for number in numbers for whole in expand(pattern[: match.start()] + number + pattern[match.end() :])]


def find_shards(path: str | os.PathLike[str] | Sequence[str], *, key: str) -> list[Shard]:
    """The shards that paths, folders, patterns and ranges name, ordered by address, each once.

    Raises ConfigError for one that is absent, a pattern that matches nothing, and an address that cannot be reached.
    """
    found: dict[str, Shard] = {}
    for pattern in [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else path:
        for url in expand(os.path.expanduser(pattern)):
            found |= {shard.url: shard for shard in _shards_at(url, key=key)}
    if not found:
        raise ConfigError(f"{key} is empty: name at least one shard, folder or pattern")
    return [found[url] for url in sorted(found)]


def _shards_at(url: str, *, key: str) -> list[Shard]:
    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            infos = list(system.glob(path, detail=True).values())
        else:
            infos = [system.info(path)]
            if infos[0]["type"] == "directory":
                infos = system.ls(path, detail=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{key} names {url}, but there is no such file or folder: bring it there, or change {key}"
        ) from error
    # Whatever it is: no package for the protocol, no network, no permission.
    except Exception as error:
        raise ConfigError(
            f"{key} names {url}, which cannot be reached ({type(error).__name__}: {error}): check the address, the "
            "network and your credentials"
        ) from error
    found = [info for info in infos if info["name"].endswith(ENDINGS)]
    for info in found:
        if info["type"] == "other":  # a FIFO or a device, which would block whoever opens it
            raise ConfigError(f"{key} names {info['name']}, which is not a regular file: leave it out")
    shards = [_shard(info, url, system) for info in found]
    if not shards:
        others = sorted({info["name"].rpartition("/")[2] for info in infos})[:3]
        told = f"only {', '.join(others)} ..." if others else "nothing"
        packed = any(name.endswith((".gz", ".tgz", ".zst", ".xz")) for name in others)
        hint = "; a compressed archive cannot be read from its middle: unpack it to .tar" if packed else ""
        raise ConfigError(
            f"{key} names {url}, where there is {told}: name files that end in {' or '.join(ENDINGS)}{hint}"
        )
    return shards


def _shard(info: dict[str, Any], url: str, system: Any) -> Shard:
    local = "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))
    chain = url.rpartition("::")[0] + "::" if "::" in url else ""
    address = info["name"] if local else chain + system.unstrip_protocol(info["name"])
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")
    return Shard(address, int(info["size"] or 0), stamp)


def is_local(shard: Shard) -> bool:
    """Whether the shard lies on a disk of this machine."""
    return "://" not in shard.url


def default_cache() -> Path:
    """Where what is known of shards is kept: `$XDG_CACHE_HOME/sslcli`, or else `~/.cache/sslcli`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sslcli"


def indices_of(shards: Sequence[Shard], cache: Path, *, image: str, label: str | None) -> list[Index]:
    """The index of each shard: from `cache`, or by going through the shard, and then kept there.

    Processes that ask at the same time wait for each other, so that each shard is gone through once. Raises ConfigError
    as `index_of`, and for a shard that cannot be read.
    """

    def one(shard: Shard) -> Index:
        path = cache / f"{_key(shard, image, label)}.npz"
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return _unpack(path.read_bytes())
        index = _go_through(shard, image=image, label=label)
        replace(path, _pack(index))
        return index

    try:
        with alone(cache), ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(one, shards))
    except OSError as error:
        raise ConfigError(
            f"what is in the shards cannot be kept in {cache} ({error.strerror or error}): set dataset.cache to a "
            "folder that can be written"
        ) from error


def _go_through(shard: Shard, *, image: str, label: str | None) -> Index:
    try:
        with fsspec.open(shard.url, "rb") as file:
            return index_of(file, shard, image=image, label=label)
    except ConfigError:
        raise
    except Exception as error:  # of whatever lies between us and the bytes
        raise unreadable(shard, error) from error


def unreadable(shard: Shard, error: Exception) -> ConfigError:
    """The message for a shard whose bytes are not to be had."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ConfigError(
        f"{shard.url} cannot be read ({reason.splitlines()[0]}): see that it is there and may be read, then start the "
        "same command again; a run goes on from its last checkpoint"
    )


def _key(shard: Shard, image: str, label: str | None) -> str:
    told = json.dumps([VERSION, shard.url, shard.size, shard.stamp, image, label])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _pack(index: Index) -> bytes:
    told = json.dumps([index.labels, index.image, index.classes]).encode()
    file = io.BytesIO()
    np.savez(
        file,
        told=np.frombuffer(told, np.uint8),
        starts=index.starts,
        sizes=index.sizes,
        groups=index.groups,
    )
    return file.getvalue()


def _unpack(content: bytes) -> Index:
    with np.load(io.BytesIO(content)) as arrays:
        labels, image, classes = json.loads(arrays["told"].tobytes())
        return Index(labels, image, classes, arrays["starts"], arrays["sizes"], arrays["groups"])
