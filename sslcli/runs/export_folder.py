"""Export to a folder for another tool: written beside its place, loaded by the tool, compared, then moved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from sslcli.errors import ConfigError, is_out_of_memory
from sslcli.runs.export_check import Images, check_difference, difference, features_of
from sslcli.runs.model_card import versions
from sslcli.system import atomic
from sslcli.weights.export.formats import TARGETS
from sslcli.weights.export.preprocessing import PREPROCESSING
from sslcli.weights.export.target import Target, Trained, json_text, not_finite

CARD = "README.md"
MAX_REASON = 400  # characters of an error of another library
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".onnx", ".json")


def check_target(target: Target, trained: Trained) -> None:
    """Raise ConfigError if a backbone cannot be exported in a format. The message names the formats that can."""
    space = trained.preprocessing.color_space
    if space != "rgb":
        raise ConfigError(
            f"format is {target.name!r}, but views.color_space is {space}, which other tools cannot convert images to. "
            "Possible formats: torch"
        )
    obstacle = target.obstacle(trained)
    if obstacle:
        others = [name for name, other in TARGETS.items() if other.obstacle(trained) is None]
        raise ConfigError(
            f"format is {target.name!r}, but {obstacle}. Possible formats: {', '.join(['torch', *others])}"
        )
    diverged = not_finite(trained.state)
    if diverged:
        raise ConfigError(f"format is {target.name!r}, but {diverged}")


def check_packages(target: Target) -> None:
    """Raise ConfigError if a package that the format needs is not installed."""
    absent = [name for name in target.packages if find_spec(name) is None]
    if absent:
        raise ConfigError(f"format is {target.name!r}, which needs {', '.join(absent)}: pip install {' '.join(absent)}")


def check_folder(out: Path, target: Target) -> None:
    """Raise ConfigError unless `out` is a path that the export may create or replace.

    A folder is replaced only if all of its files have names that ssl-export writes.
    """
    if out.suffix in FILE_ENDINGS:
        raise ConfigError(
            f"out is {out}, but format={target.name} writes a folder with {target.weights_file}: remove {out.suffix}"
        )
    if not out.is_dir():
        if os.path.lexists(out):
            raise ConfigError(f"out is {out}, a file, but format={target.name} writes a folder: choose another path")
        return
    own = {name for each in TARGETS.values() for name in (each.weights_file, *each.files)} | {CARD, PREPROCESSING}
    found = set(os.listdir(out))
    others = sorted(found - own) or sorted(found if found and PREPROCESSING not in found else [])
    if others:
        raise ConfigError(
            f"out is {out}, a folder with files that ssl-export did not write ({', '.join(others[:3])}): choose "
            "another path, or move these files"
        )


def write_folder(
    target: Target, trained: Trained, out: Path, images: Images, expected: Tensor, card: Callable[[float], str]
) -> float:
    """Write the export to the folder `out`, after the tool has loaded it and computed the same features.

    `images` are the images of the comparison, and `expected` (N, D) their features, computed by the run's network.
    `card` is a function that returns the text of the model card. Its argument is the relative difference of the
    features, which is also returned. Raises ConfigError if it is too large. In this case, nothing is written.
    """
    preprocessing = trained.preprocessing.to_plain(is_normalized_by_model=target.normalizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.beside(out) as temporary:
        temporary.mkdir()
        target.write(trained, temporary)
        (temporary / PREPROCESSING).write_text(json_text(preprocessing), encoding="utf-8")
        found = compare(target, trained, temporary, images, expected)
        (temporary / CARD).write_text(card(found), encoding="utf-8")
        for path in temporary.iterdir():
            atomic.synchronize(path)
        move(temporary, out)
    return found


def compare(target: Target, trained: Trained, folder: Path, images: Images, expected: Tensor) -> float:
    """Return the relative difference between the features of a written folder and the `expected` features (N, D).

    Raises ConfigError if the tool cannot load the folder, or if the difference is too large.
    """
    given = images.images if target.normalizes else trained.preprocessing.normalize(images.images)
    try:
        found = difference(features_of(target.load(trained, folder), given), expected)
    except Exception as error:  # libraries raise any exception
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]  # torch lists keys in further lines
        raise ConfigError(
            f"format={target.name}: the export was removed, since it cannot be loaded again ({reason}): choose another "
            f"format, or another version of one of these packages: {versions(target.packages)}"
        ) from error
    check_difference(found, target.name, images)
    return found


def move(temporary: Path, out: Path) -> None:
    """Move the folder `temporary` to `out`. An older folder at `out` is removed afterwards."""
    older = atomic.temporary_name(out) if out.exists() else None
    if older is not None:
        os.rename(out, older)
    os.rename(temporary, out)
    if older is not None:
        shutil.rmtree(older)
