"""Self-supervised pre-training of vision models."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sslcli.config.moved import MovedModules

if TYPE_CHECKING:
    from sslcli.api.functions import EvaluationResult as EvaluationResult
    from sslcli.api.functions import TrainingResult as TrainingResult
    from sslcli.api.functions import evaluate as evaluate
    from sslcli.api.functions import train as train
    from sslcli.runs.embed import Embeddings as Embeddings
    from sslcli.runs.embed import embed as embed
    from sslcli.runs.encoder import Encoder as Encoder
    from sslcli.runs.encoder import load as load

__version__ = "0.2.0"


class Package(ModuleType):
    """This package. In version 0.1, `sslcli.train` and `sslcli.evaluate` were modules, and now they are functions.

    A plug-in may still import modules by these names. The import then must not replace the functions.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("evaluate", "train") or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package
sys.meta_path.insert(0, MovedModules())  # else submodules of a moved package would be loaded twice


def __getattr__(name: str) -> Any:
    """Import a part of the Python API when it is first used, because the import of torch takes seconds."""
    if name in ("EvaluationResult", "TrainingResult", "evaluate", "train"):
        from sslcli.api import functions

        return getattr(functions, name)
    if name in ("Embeddings", "embed"):
        from sslcli.runs import embed as embed_module

        return getattr(embed_module, name)
    if name in ("Encoder", "load"):
        from sslcli.runs import encoder as encoder_module

        return getattr(encoder_module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
