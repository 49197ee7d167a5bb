"""Pretrained weights of timm models. timm is an optional dependency: pip install timm"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sslcli.backbones.timm import without_pickles
from sslcli.errors import ConfigError, first_line


@dataclass(frozen=True)
class TimmWeights:
    """Pretrained weights of a timm model without classifier, and their normalization of images.

    `digest` is the SHA-256 of all values, in the order of the names.
    """

    state: dict[str, Tensor]
    version: str
    digest: str
    mean: Sequence[float] | None
    std: Sequence[float] | None


def timm_weights(name: str) -> TimmWeights:
    """Load the pretrained weights of the timm model `name` from timm's cache, or download them.

    `name` may have a weights tag, such as `vit_small_patch16_224.dino`. Raises ConfigError if timm cannot be imported,
    has no such weights, or cannot download them.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"timm:{name} needs the package timm, which cannot be imported ({error}): pip install timm"
        ) from error
    try:
        with without_pickles():
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # any cause: an unknown name, a failed download, a damaged file
        raise ConfigError(
            f"timm:{name} cannot be loaded from timm's cache or the network ({type(error).__name__}: "
            f"{first_line(error)}): choose a name from timm.list_pretrained(), connect to the network once, or "
            "download the file of the weights and give its path"
        ) from error
    state = model.state_dict()
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    facts: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return TimmWeights(state, timm.__version__, digest.hexdigest(), facts.get("mean"), facts.get("std"))
