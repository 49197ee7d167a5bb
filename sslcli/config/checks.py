"""Checks of single values of settings, and the conversion of durations. This module does not import torch."""

from __future__ import annotations

import math
import re

from sslcli.errors import ConfigError, nearest


def check_range(
    name: str,
    value: float | None,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """Raise ConfigError unless `value` is None, or finite and > `above`, >= `least` and <= `most`.

    A bound that is None is not checked. `name` is the key of the value, for the message.
    """
    if value is None:
        return
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}, but it must be a finite number")
    if above is not None and not value > above:
        raise ConfigError(f"{name} is {value}, but it must be greater than {above:g}")
    if least is not None and not value >= least:
        raise ConfigError(f"{name} is {value}, but it must be at least {least:g}")
    if most is not None and not value <= most:
        raise ConfigError(f"{name} is {value}, but it must be at most {most}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`. `name` is the key of the value, for the message."""
    if value not in allowed:
        hint = nearest(value, allowed)
        raise ConfigError(f"{name} is {value!r}, but it must be one of: {', '.join(allowed)}{hint and '.' + hint}")


def check_device(device: str) -> None:
    """Raise ConfigError unless the device name is auto, cpu, mps, cuda or cuda:N.

    Another function checks later whether the device is available.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"device is {device!r}, but it must be one of: auto, cpu, cuda, cuda:N (N = 0, 1, ...), mps")


def check_checkpoint(checkpoint: str | int) -> None:
    """Raise ConfigError unless `checkpoint` is "last" or a step, an integer of at least 0.

    Another function checks later whether the checkpoint exists.
    """
    if isinstance(checkpoint, int):
        check_range("checkpoint", checkpoint, least=0)
    elif checkpoint != "last":
        raise ConfigError(f"checkpoint is {checkpoint!r}, but it must be 'last' or the number of a step")


def check_source(name: str, value: str | None, prefix: str | None) -> None:
    """Raise ConfigError unless `value` is None, or FILE, run:DIR or timm:NAME, and `prefix` applies to it.

    `name` is the key of the value, for the message. Another function checks later whether the file, the run or the
    model exists.
    """
    if value is not None and value.removeprefix("run:").removeprefix("timm:") == "":
        raise ConfigError(f"{name} is {value!r}, but it must be FILE, run:DIR or timm:NAME: add a path or a name")
    if prefix is not None and (value is None or value.startswith("timm:")):
        raise ConfigError(
            f"{name}_prefix is {prefix!r} and {name} is {value!r}, but a prefix selects weights of a file or a run: "
            f"set {name} to a file or to run:DIR, or remove {name}_prefix"
        )


def seconds(name: str, value: str | float | None) -> float | None:
    """Convert a duration such as `90`, `"90s"`, `"10m"`, `"1.5h"` or `"2d"` to seconds. None is returned unchanged.

    Raises ConfigError for other values. `name` is the key of the value, for the message.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(value))
    if not match:
        raise ConfigError(f"{name} is {value!r}, but it must be a duration such as 90s, 10m, 1.5h or 2d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
