"""Datasets: folders, lists, torchvision, Hugging Face, generated shapes and several modalities, with their labels."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return a class of `sslcli.data.sources.base`, which this package was before 0.2; plug-ins import it from here."""
    if not name[:1].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import sslcli.data.sources.base as module

    return getattr(module, name)
