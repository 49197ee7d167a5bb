"""Datasets and their labels: folders, lists, torchvision, Hugging Face, generated shapes and several modalities."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return a class of `sslcli.data.sources.base`.

    Before version 0.2, plug-ins imported these classes from this package.
    """
    if not name[:1].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import sslcli.data.sources.base as module

    return getattr(module, name)
