"""Functions that find the keys `_target_` of a configuration, and check that their classes are in trusted packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sslcli.config.annotations import fits
from sslcli.config.plugins import plugins
from sslcli.errors import ConfigError


def trust_list(value: Any) -> list[str]:
    """Return the value of the setting `trust` as a list of package names.

    Raises ConfigError if the value is not a list of non-empty strings.
    """
    if not fits(value, "list[str]") or not all(value):
        raise ConfigError(f"trust is {value!r}, but it must be a list of package names, as in trust=[torch,mypackage]")
    return list(value)


def trusted_packages(trust: Iterable[str]) -> list[str]:
    """Return the packages whose classes a `_target_` may name: sslcli, torch.optim, plug-ins, and `trust`.

    `trust` are the names of the packages that the user trusts.
    """
    return ["sslcli", "torch.optim", *plugins(), *trust]


def check_target(target: Any, trust: Iterable[str], where: str) -> None:
    """Raise ConfigError unless `target` is a dotted name in a trusted package.

    Args:
        target: value of a key `_target_`.
        trust: names of the packages that the user trusts in addition to sslcli, torch.optim and the plug-ins.
        where: dotted key of the value, for the message.
    """
    packages = trusted_packages(trust)
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{where} is {target!r}, but it must be the dotted name of a class, as in mypackage.MyClass")
    if not any(target.startswith(package + ".") for package in packages):
        raise ConfigError(
            f"{where} is {target!r}, but classes are built only from trusted packages: {', '.join(packages)}. If you "
            f"trust that package, add trust=[{target.split('.')[0]}]"
        )


def targets(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every key `_target_` in a configuration, at any depth.

    `value` is the configuration, and `where` is its dotted key ("" for a whole configuration). Raises ConfigError if a
    value is "???", which marks a mandatory value that is not set.
    """
    if value == "???":
        raise ConfigError(f"{where} has no value, but it is mandatory: set it with {where}=...")
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                yield path, inner
            else:
                yield from targets(path, inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from targets(f"{where}.{number}", inner)
