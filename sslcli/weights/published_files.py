"""Reading of weight files that other programs wrote: torch.save in both of its formats, and safetensors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli.errors import ConfigError
from sslcli.system.regular_files import open_regular
from sslcli.weights.files import read_weights, short
from sslcli.weights.key_layouts import flattened
from sslcli.weights.safetensors import is_safetensors, read_safetensors

LONGEST_KEY = 1000  # characters; the search for prefixes of keys takes quadratic time
# Classes of settings and counters in published checkpoints, such as those of `args` in the files of MAE and DINO
SETTINGS_CLASSES = (
    "argparse.Namespace",
    "builtins.dict",
    "builtins.int",
    "builtins.list",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool")),
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "types.SimpleNamespace",
    "typing.Any",
)
SETTINGS_MAPPINGS = (
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


class Ignored:
    """Placeholder of an object whose class is in `SETTINGS_CLASSES`. It accepts any state and keeps none of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __new__(cls, *_: Any) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class IgnoredMapping:
    """Placeholder of a mapping whose class is in `SETTINGS_MAPPINGS`, which torch.load fills with its items."""

    def __new__(cls, *_: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def placeholders() -> list[Any]:
    """Return one placeholder class for each name in `SETTINGS_CLASSES` and `SETTINGS_MAPPINGS`.

    Each class has the name of the class that it replaces, because torch.load finds it by this name.
    """
    found = []
    for base, names in ((Ignored, SETTINGS_CLASSES), (IgnoredMapping, SETTINGS_MAPPINGS)):
        for module, _, name in (whole.rpartition(".") for whole in names):
            found.append(type(name, (base,), {"__module__": module}))
    return found


def read_published(path: Path) -> dict[str, Any]:
    """Return the content of a weight file on the CPU, without executing code from the file.

    The file may have been written by torch.save or safetensors. Objects that only describe the training, such as an
    argparse.Namespace, are replaced by empty placeholders; no class of the file is imported. Raises ConfigError if the
    file cannot be read, contains other objects, contains no tensors, or has very long keys.
    """
    try:
        with open_regular(path) as file:
            if is_safetensors(file):
                content: dict[str, Any] = dict(read_safetensors(file))
            else:
                with torch.serialization.safe_globals(placeholders()):
                    content = read_weights(file, path, device=torch.device("cpu"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError) and re.search("[Uu]nsupported (?!operand)", str(cause)):
            raise ConfigError(f"{error}: {_remedy(path, str(cause))}") from error
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is a damaged safetensors file ({error}): download or export it again") from error
    if not any(isinstance(value, (Tensor, Mapping)) for value in content.values()):
        raise ConfigError(f"{path} contains no tensors: give a file with the weights of a network")
    check_keys(path, flattened(content))
    return content


def check_keys(path: Path, keys: Collection[str]) -> None:
    """Raise ConfigError if the file `path` has a key of a tensor that is longer than `LONGEST_KEY`."""
    longest = max(keys, key=len, default="")
    if len(longest) > LONGEST_KEY:
        raise ConfigError(
            f"{path} has a key of {len(longest):,} characters ({short(longest)}), but at most {LONGEST_KEY:,} are "
            "read: give the weights shorter names"
        )


def _remedy(path: Path, reason: str) -> str:
    """Return what to do about a file that contains an object of a class that is not allowed, with the class."""
    _, _, rest = reason.partition("GLOBAL ")
    name = rest.split()[0].rstrip(".") if rest else "such an object"
    return (
        f'it contains {name}. If you trust its author, keep only the weights: python -c "import torch; '
        f"torch.save(torch.load('{path.name}', weights_only=False, map_location='cpu')['state_dict'], 'weights.pt')\" "
        "(with the key under which the file keeps its weights)"
    )
