"""Suffixes of result names: the settings of a protocol that change the measured quantity.

Two results have the same name only if they estimate the same quantity: the accuracy of the same kind of classifier,
trained from the same weights and layer, on the same labeled images, for the same number of steps or epochs, and
measured on the same images. All other settings are not part of the name: settings of the optimization (learning rates,
optimizer, weight decay, solver, batch size, crops of fine-tuning), settings that change only the speed, and settings of
the confidence interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def join_parts(*parts: str) -> str:
    """Return the parts of a name that are not empty, joined by underscores."""
    return "_".join(part for part in parts if part)


def suffix(settings: object, defaults: Mapping[str, Any]) -> str:
    """Return the settings that differ from `defaults`, joined by underscores, as in "steps-1000_warm-start".

    Args:
        settings: object with the settings as attributes, such as a protocol.
        defaults: the settings that belong in the name, in order, with the values of the yaml file.
    """
    found = ((name, getattr(settings, name)) for name in defaults)
    return join_parts(*(written(name, value) for name, value in found if plain(value) != plain(defaults[name])))


def plain(value: object) -> object:
    """Convert a tuple to a list, so that it can equal a list from a yaml file. Return any other value unchanged."""
    return list(value) if isinstance(value, tuple) else value


def written(name: str, value: object) -> str:
    """Return a setting as part of a file name: "steps-1000", "crop-scale-0.5-1", "warm-start", "no-warm-start"."""
    readable = name.replace("_", "-")
    if isinstance(value, bool):
        return readable if value else f"no-{readable}"
    parts = value if isinstance(value, (list, tuple)) else [value]
    texts = (
        f"{part:.10g}" if isinstance(part, float) else "none" if part is None else str(part).replace("_", "-")
        for part in parts
    )
    return "-".join((readable, *texts))
