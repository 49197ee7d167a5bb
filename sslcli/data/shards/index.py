"""Discovery of the shards of a dataset, and loading of their indices.

The index of a shard contains the label and the location of each image. It is built once and cached in a folder.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from sslcli.config.annotations import fits
from sslcli.data.shards.formats import SHARD_EXTENSIONS, Index, Shard, build_index
from sslcli.data.sources.vision import exclusive_lock
from sslcli.errors import ConfigError
from sslcli.system.atomic import replace
from sslcli.system.stored import DamagedFile, read_bytes, read_or_set_aside

VERSION = 1  # version of the cached index files
MAX_BYTES = 4_000_000_000  # maximum size of an index file; an index of a million images has about 20 MB
_THREADS = 8
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Fields in fsspec's information about a file. They change when the file is rewritten.
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "blob_id")


def expand_ranges(pattern: str) -> list[str]:
    """Expand numeric ranges: `a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`.

    If the pattern has several ranges, all combinations of their numbers are returned.

    Raises ConfigError if a range is descending.
    """
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ConfigError(f"the range {match[0]} in {pattern} is descending: put the smaller number first")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    patterns = [pattern[: match.start()] + number + pattern[match.end() :] for number in numbers]
    return [url for expanded in patterns for url in expand_ranges(expanded)]


def find_shards(path: str | os.PathLike[str] | Sequence[str], *, key: str) -> list[Shard]:
    """Return the shards at `path`, sorted by address, without duplicates.

    `path` is one of the following, or a list of them: a file, a folder, a pattern or a numeric range. `key` is
    the configuration key, for error messages.

    Raises ConfigError if a file is missing, a pattern has no matches, or an address cannot be reached.
    """
    found: dict[str, Shard] = {}
    for pattern in [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else path:
        for url in expand_ranges(os.path.expanduser(pattern)):
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
        raise ConfigError(f"{key} is {url}, but there is no such file or folder: create it, or change {key}") from error
    # A missing package for the protocol, a missing network, or a missing permission may raise nearly any exception
    # type.
    except Exception as error:
        raise ConfigError(
            f"{key} is {url}, which cannot be reached ({type(error).__name__}: {error}): check the address, the "
            "network and your credentials"
        ) from error
    found = [info for info in infos if info["name"].endswith(SHARD_EXTENSIONS)]
    for info in found:
        if info["type"] == "other":  # a FIFO or a device; opening it would block
            raise ConfigError(f"{key} has {info['name']}, which is not a regular file: remove it")
    shards = [_shard(info, url, system) for info in found]
    if not shards:
        others = sorted({info["name"].rpartition("/")[2] for info in infos})[:3]
        content = f"only {', '.join(others)} ..." if others else "nothing"
        is_compressed = any(name.endswith((".gz", ".tgz", ".zst", ".xz")) for name in others)
        hint = ". Compressed archives have no random access: decompress them to .tar" if is_compressed else ""
        raise ConfigError(
            f"{key} is {url}, where there is {content}: choose files that end in {' or '.join(SHARD_EXTENSIONS)}{hint}"
        )
    return shards


def _shard(info: dict[str, Any], url: str, system: Any) -> Shard:
    local = "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))
    chain = url.rpartition("::")[0] + "::" if "::" in url else ""
    address = info["name"] if local else chain + system.unstrip_protocol(info["name"])
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")
    return Shard(address, int(info["size"] or 0), stamp)


def is_local(shard: Shard) -> bool:
    """Return whether the shard is a local file."""
    return "://" not in shard.url


def default_cache() -> Path:
    """Return the default cache folder: `$XDG_CACHE_HOME/sslcli`, or `~/.cache/sslcli` if XDG_CACHE_HOME is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sslcli"


def load_indices(shards: Sequence[Shard], cache: Path, *, image: str, label: str | None) -> list[Index]:
    """Return the index of each shard. If an index is not in `cache`, it is built from the shard and stored in `cache`.

    A lock on `cache` makes concurrent processes wait for each other, so that each index is built only once.

    image, label: the image column and the label column, see `build_index`.

    Raises ConfigError if a shard cannot be read or indexed, or if `cache` cannot be written.
    """

    def load(shard: Shard) -> Index:
        path = cache / f"{_key(shard, image, label)}.npz"
        found = read_or_set_aside(
            partial(_read, path), warn=logging.getLogger("sslcli").warning, consequence="the index is built again"
        )
        if found is not None:
            return found
        index = _open_and_build(shard, image=image, label=label)
        replace(path, _pack(index))
        return index

    try:
        with exclusive_lock(cache), ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(load, shards))
    except OSError as error:
        raise ConfigError(
            f"the index of the shards cannot be written to {cache} ({error.strerror or error}): set dataset.cache to a "
            "writable folder"
        ) from error


def _open_and_build(shard: Shard, *, image: str, label: str | None) -> Index:
    try:
        with fsspec.open(shard.url, "rb") as file:
            return build_index(file, shard, image=image, label=label)
    except ConfigError:
        raise
    except Exception as error:  # fsspec's file systems raise exceptions of many types
        raise read_error(shard, error) from error


def read_error(shard: Shard, error: Exception) -> ConfigError:
    """Return the error for a shard that cannot be read. `error` is the cause."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ConfigError(
        f"{shard.url} cannot be read ({reason.splitlines()[0]}): check that it exists and is readable, then start the "
        "same command again; a run resumes from its last checkpoint"
    )


def _key(shard: Shard, image: str, label: str | None) -> str:
    fields = json.dumps([VERSION, shard.url, shard.size, shard.stamp, image, label])
    return hashlib.sha256(fields.encode()).hexdigest()[:32]


def _pack(index: Index) -> bytes:
    header = json.dumps([index.labels, index.image, index.classes]).encode()
    file = io.BytesIO()
    np.savez(
        file,
        told=np.frombuffer(header, np.uint8),  # "told" is the name in the file format
        starts=index.starts,
        sizes=index.sizes,
        groups=index.groups,
    )
    return file.getvalue()


def _read(path: Path) -> Index:
    """Return the index in a cache file. Raises DamagedFile if the file is damaged."""
    content = read_bytes(path, remedy="remove it", most=MAX_BYTES)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            labels, image, classes = json.loads(arrays["told"].tobytes())
            columns = [arrays[name] for name in ("starts", "sizes", "groups")]
    except Exception as error:  # damaged files can cause nearly any type of exception
        raise DamagedFile(path, (str(error) or type(error).__name__).splitlines()[0], "remove it") from error
    is_whole = fits(labels, "list") and fits(image, "str") and fits(classes, "list[str]")
    is_whole = is_whole and all(column.dtype == np.int64 and column.ndim == 1 for column in columns)
    if not is_whole or any(len(column) not in (0, len(labels)) for column in columns[:2]):
        raise DamagedFile(path, "its columns do not belong together", "remove it")
    return Index(labels, image, classes, *columns)
