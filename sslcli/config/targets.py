"""`_target_` entries: where they are, and the packages whose classes may be built from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sslcli.config.annotations import fits
from sslcli.config.plugins import plugins
from sslcli.errors import ConfigError


def trusted_by(value: Any) -> list[str]:
    """The value of `trust` as a list of package names. Raises ConfigError where it is none."""
    if not fits(value, "list[str]") or not all(value):
        raise ConfigError(f"trust is {value!r}, but it must be a list of package names, as in trust=[torch,mypackage]")
    return list(value)


def trusted_packages(trust: Iterable[str]) -> list[str]:
    """Packages whose classes a `_target_` may name: ours, torch.optim, announced plugins, and those the user trusts."""
    return ["sslcli", "torch.optim", *plugins(), *trust]


def check_target(target: Any, trust: Iterable[str], where: str) -> None:
    """Raise ConfigError unless `target` lies in a trusted package."""
    packages = trusted_packages(trust)
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{where} is {target!r}, but it must be the dotted name of a class, as in mypackage.MyClass")
    if not any(target.startswith(package + ".") for package in packages):
        raise ConfigError(
            f"{where} is {target!r}, but classes are built only from trusted packages: {', '.join(packages)}. If you "
            f"know that package, add trust=[{target.split('.')[0]}]"
        )


def targets(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every `_target_` with its path, however deep, in lists too. Raises ConfigError for a value left to be given."""
    if value == "???":
        raise ConfigError(f"{where} has no value, but it must be given: {where}=...")
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
