"""Reading of weight files without executing code, and strict loading into a network."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.errors import ConfigError, printable
from sslcli.system.regular_files import open_regular
from sslcli.weights.renamed import with_current_names

MAX_KEY = 200  # characters of a key in a message


def load_weights(path: Path, *, device: torch.device) -> dict[str, Any]:
    """Load a dictionary from a file that torch.save wrote, without executing code from the file.

    The tensors are moved to `device`. Raises ConfigError if the file cannot be read or does not contain a dictionary.
    """
    try:
        with open_regular(path) as file:
            return read_weights(file, path, device=device)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error


def read_weights(file: BinaryIO, path: Path, *, device: torch.device) -> dict[str, Any]:
    """Load a dictionary from an open file that torch.save wrote, without executing code from the file.

    `path` is the name of the file for error messages. For the errors, see `load_weights`.
    """
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} was refused: it is damaged, or holds more than tensors and plain values") from error
    except Exception as error:  # damaged files can cause nearly any type of exception
        reason = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({reason}): it is damaged, or not a file of weights") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(state).__name__}, but a dictionary of tensors is needed")
    return state


def unwrapped(net: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of the backbone `net` with the names that the wrapped network itself uses.

    If `net` only wraps a network of another package, the attribute that holds this network is a prefix of all names.
    For example, `model.conv1.weight` becomes `conv1.weight`, see `Backbone.wrapped_name`. If `net` wraps no network,
    the names do not change.
    """
    prefix = _prefix(net)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def wrapped(net: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with the names that the backbone `net` uses. This is the inverse of `unwrapped`.

    If `net` only wraps a network of another package, its names may begin with a prefix such as `model.` that the names
    of `state` lack. Therefore the names of `state` are compared with the names of `net` twice: with the prefix and
    without it. If more names are equal with the prefix, the prefix is added, else `state` is returned unchanged.
    """
    prefix, own = _prefix(net), net.state_dict().keys()
    renamed = {f"{prefix}{name}": value for name, value in state.items()}
    return renamed if len(own & renamed.keys()) > len(own & state.keys()) else state


def _prefix(net: nn.Module) -> str:
    return f"{type(net).wrapped_name}." if isinstance(net, Backbone) and type(net).wrapped_name else ""


def broken_part(path: Path) -> str | None:
    """Verify the checksums in a file written by torch.save, because torch.load does not verify them.

    The file is a ZIP archive, and each of its entries has a checksum. Returns the name of the first entry whose
    checksum is wrong, or None if all checksums are correct.
    """
    with ZipFile(path) as archive:
        return archive.testzip()


def with_noise_states(state: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with the states of random number generators that a network has, and no others.

    `own` is the state dict of the network. A vision transformer has such a generator only with stochastic depth, which
    does not change its weights. Generators that `state` lacks keep their states.
    """
    kept = {name: value for name, value in state.items() if name in own or not is_noise_state(name)}
    return {name: value for name, value in own.items() if is_noise_state(name)} | kept


def is_noise_state(name: str) -> bool:
    """Return True if `name` is the name of the state of a `Noise` module in a state dict."""
    return name.endswith("noise._extra_state")


def short(key: str) -> str:
    """Return a key of a file for a message of one line. The middle of a very long key is omitted."""
    text, half = printable(key), MAX_KEY // 2
    return text if len(text) <= MAX_KEY else f"{text[:half]}...{text[-half:]}"


def first_keys(keys: Sequence[str]) -> str:
    """Return the first three of several keys for a message, or "-" if there are none."""
    return ", ".join(map(short, keys[:3])) or "-"


def load_strictly(
    net: nn.Module, state: dict[str, Any], where: str, *, remedy: str = "Give the backbone it belongs to"
) -> None:
    """Load a state dict into `net`. Raises ConfigError if a key or shape differs.

    `where` describes the source of the state dict, such as the path of a file. The message begins with it, lists the
    differences and ends with `remedy`.
    """
    own = net.state_dict()
    state = with_noise_states(with_current_names({str(key): value for key, value in state.items()}, own), own)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{short(key)} is {wrong} and should be {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if isinstance(own[key], Tensor) and (wrong := _wrong_value(state[key], own[key]))
    ]
    if missing or unknown or shapes:
        raise ConfigError(
            f"{where} does not fit this net, and a net with other weights would be measured in its place: "
            f"{len(missing)} keys are missing ({first_keys(missing)}), "
            f"{len(unknown)} are unknown ({first_keys(unknown)}), "
            f"{len(shapes)} differ in shape ({'; '.join(sorted(shapes)[:3]) or '-'}). {remedy}"
        )
    net.load_state_dict(state)


def _wrong_value(value: Any, own: Tensor) -> str:
    """Return a description of a stored value that cannot replace the tensor `own` of a network, or "" if it can."""
    if not isinstance(value, Tensor):
        return f"a value of the type {type(value).__name__}"
    if value.is_meta or value.layout != own.layout:
        return "a tensor without values" if value.is_meta else f"a tensor of the layout {value.layout}"
    return "" if value.shape == own.shape else str(tuple(value.shape))
