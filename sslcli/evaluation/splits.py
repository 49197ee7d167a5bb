"""Checks of the splits of an evaluation before any feature is computed: labels, classes and readable images."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sslcli.data.bad_images import BadImage
from sslcli.data.sources.base import Source
from sslcli.errors import ConfigError


def classes_of(source: Source, positions: Tensor) -> list[int]:
    """Return the sorted distinct classes of the labeled images at `positions`."""
    return sorted(set(source.labels[positions].tolist()) - {-1})


def whole_training_set(source: Source, reported: Iterable[str]) -> Tensor:
    """Return the sorted positions (n,) of the images in "train" and "val" that are in none of the splits `reported`.

    "val" is included even if the images of "val" are not pre-trained on.
    """
    used = torch.zeros(len(source), dtype=torch.bool)
    for name, positions in source.splits.items():
        used[positions] = name != "test"
    for name in reported:
        used[source.splits.get(name, torch.empty(0, dtype=torch.int64))] = False
    return used.nonzero().flatten()


def check_answers(source: Source, bank: Tensor) -> None:
    """Raise ConfigError if the training images at the positions `bank` (n,) have fewer than two classes."""
    found = [source.classes[label] for label in classes_of(source, bank)]
    if len(found) >= 2:
        return
    has = f"a single class, {found[0]!r}" if found else "no labels"
    remedy = ""
    if len(source.classes) >= 2 and source.limit is not None and source.limit < len(source):
        remedy = f". dataset.limit is {source.limit}, which may leave out the other classes: increase it"
    raise ConfigError(
        f"the training images of {source.name} have {has}, so their accuracy has no meaning: a probe needs two "
        f"classes or more{remedy}"
    )


def check_reported(source: Source, names: Iterable[str], bank: Tensor) -> None:
    """Raise ConfigError unless accuracies can be reported on every split in `names`. The message states the remedy.

    Three conditions are checked for each split:

    - At least one image has a label.
    - At least one image has the class of a training image. Otherwise, every prediction would be wrong.
    - At least one labeled image can be read.

    `bank` (n,) contains the positions of the training images.
    """
    for name in names:
        positions = source.splits.get(name, torch.empty(0, dtype=torch.int64))
        if len(positions) == 0:
            raise ConfigError(
                f"no images of {source.name} are held out to report on: {why_not_held_out(source)}{_or_test(source)}"
            )
        labeled = positions[source.labels[positions] >= 0]
        if len(labeled) == 0:
            raise ConfigError(
                f"none of the {len(positions):,} images of {name} of {source.name} has a label, so no accuracy can be "
                f"reported: {_other_split(source, name)}"
            )
        known = torch.tensor(classes_of(source, bank), dtype=torch.int64)
        if not bool(torch.isin(source.labels[labeled], known).any()):
            raise ConfigError(
                f"none of the {len(labeled):,} labeled images of {name} of {source.name} has a class that a training "
                f"image has, so every prediction would be wrong: {_more_training_images(source)}"
            )
        check_readable(source, labeled, name)


def check_readable(source: Source, positions: Tensor, name: str) -> None:
    """Raise ConfigError if none of the images at `positions` (n,) of the split `name` can be read.

    Images are read only until the first readable one.
    """
    if source.images is not None or len(positions) == 0:
        return
    first: BadImage | None = None
    for position in positions.tolist():
        try:
            source.read(position)
        except BadImage as error:
            first = first or error
        else:
            return
    remedy = "repair or remove them" + (", or set dataset.val_fraction=0" if name == "val" else "")
    raise ConfigError(f"none of the {len(positions):,} images of {name} can be read, the first being {first}: {remedy}")


def why_not_held_out(source: Source) -> str:
    """Return the reason why no image is held out for validation, and the remedy."""
    test = source.splits.get("test", torch.empty(0, dtype=torch.int64))
    pool = torch.ones(len(source), dtype=torch.bool)
    pool[test] = False
    count = int((source.labels[pool] >= 0).sum())
    if count == 0:
        return (
            "the training images have no labels, and only labeled images can be held out: choose a labeled dataset=..."
        )
    if source.val_fraction == 0:
        return "dataset.val_fraction is 0: set it above 0"
    return (
        f"dataset.val_fraction is {source.val_fraction:g}, and {source.val_fraction:g} of {count:,} labeled images is "
        f"{source.val_fraction * count:.2g}, which is rounded to 0: set dataset.val_fraction to at least "
        f"{1 / count:.2g}"
    )


def unanswerable(source: Source, bank: Tensor, queries: Tensor) -> str | None:
    """Return a warning if some queries have a class that no image of the bank has, else None.

    `bank` contains the positions of the training images in `source`. `queries` contains the positions of the images to
    classify.
    """
    labels = source.labels[queries]
    labels = labels[labels >= 0]
    lost = labels[~torch.isin(labels, torch.tensor(classes_of(source, bank), dtype=torch.int64))]
    if len(lost) == 0:
        return None
    names = [source.classes[label] for label in sorted(set(lost.tolist()))]
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(lost):,} of {len(labels):,} have classes that no training image has, so no prediction for them can be "
        f"correct: {listed}"
    )


def _has_test_setting(source: Source) -> bool:
    parameters: Mapping[str, object] = inspect.signature(type(source)).parameters
    return "test" in parameters


def _or_test(source: Source) -> str:
    return ", or set dataset.test to labeled images" if _has_test_setting(source) else ""


def _other_split(source: Source, name: str) -> str:
    if name != "test" or not _has_test_setting(source):
        return "choose a labeled dataset=..."
    return "set dataset.test to labeled images, or to null to report on images held out of the training images"


def _more_training_images(source: Source) -> str:
    limited = source.limit is not None and source.limit < len(source)
    start = f"increase dataset.limit, which is {source.limit}" if limited else "add training images of these classes"
    return f"{start}, or check that dataset.label or the class folders contain the right labels"
