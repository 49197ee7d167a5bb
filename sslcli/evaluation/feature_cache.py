"""Cache of features on disk, one file for all splits of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from sslcli.distributed import collectives, shared_work
from sslcli.errors import ConfigError
from sslcli.evaluation.features import FeatureSet
from sslcli.system import atomic
from sslcli.system.stored import DamagedFile, checked, read_or_set_aside
from sslcli.weights.files import broken_part


def cached(
    path: Path, key: str, compute: Callable[[], dict[str, Tensor]], *, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """Return the tensors that are cached at `path` under `key`. If no tensors are cached, compute and cache them.

    `key` must identify everything on which the tensors depend (weights, data fingerprint, transform, layer, precision).
    Tensors keep their dtype, so cached and recomputed tensors are bit-identical. The file is read memory-mapped with
    `weights_only=True`, and written atomically (temporary file, then rename).

    - A file with another key is replaced.
    - A damaged file is renamed, and a warning is printed.
    - If the file cannot be written, a warning is printed, and the tensors are still returned.

    With several processes, all of them must call the function. They compute together if one of them cannot read the
    file, and rank 0 writes it.
    """
    is_main = collectives.is_main()
    stored = shared_work.agreed(lambda: _load(path, key, warn) if is_main else None)
    if collectives.gather_objects(stored is not None)[0]:
        stored = shared_work.agreed(lambda: stored if is_main else _load(path, key, lambda message: None))
        if all(collectives.gather_objects(stored is not None)):
            assert stored is not None
            return stored
    # clone: torch.save writes the whole storage of a tensor, even if the tensor is only a slice of it
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in compute().items()}
    if not is_main:
        return tensors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, partial(torch.save, {"key": key, "tensors": tensors}), durable=False)
    except (OSError, RuntimeError) as error:
        warn(f"features cannot be saved in {path}: {error}. The next evaluation computes them again")
    return tensors


class CachedFeatures(TypedDict):
    """Content of a cache file."""

    key: str
    tensors: dict[str, Tensor]


def _load(path: Path, key: str, warn: Callable[[str], None]) -> dict[str, Tensor] | None:
    """Return the tensors of a cache file, or None if the file is absent, is damaged or has another key.

    A damaged file is renamed, and a warning is printed.
    """
    stored = read_or_set_aside(partial(_read, path), warn=warn, consequence="its features are computed again")
    return None if stored is None or stored["key"] != key else dict(stored["tensors"])


def _read(path: Path) -> CachedFeatures:
    """Return the content of a cache file. Raises DamagedFile if it is damaged."""
    remedy = "remove it"
    try:
        broken = broken_part(path)
        if broken:
            raise DamagedFile(path, f"the checksum of {broken} is wrong", remedy)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(path)) from error
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except DamagedFile:
        raise
    except Exception as error:  # damaged files can cause nearly any type of exception
        raise DamagedFile(path, (str(error).strip() or type(error).__name__).splitlines()[0], remedy) from error
    found = checked(content, CachedFeatures, path, remedy=remedy)
    names = {field.name for field in fields(FeatureSet)}
    for name, tensor in found["tensors"].items():
        features = found["tensors"].get(name.partition("_")[0])
        if name not in names or features is None or tensor.shape[:1] != features.shape[:1]:
            raise DamagedFile(path, f"its tensor {name!r} does not belong to a split", remedy)
    if not {"train", "train_labels"} <= found["tensors"].keys():
        raise DamagedFile(path, "it has no features of the training split", remedy)
    return found
