"""Conversion of the keys of published checkpoints to the names of parameters in sslcli, torchvision and timm.

A checkpoint is first flattened: the keys of nested dictionaries are joined with dots. The places of a network in the
checkpoint then only differ in the prefix of its keys, and each layout renames the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sslcli.weights.files import is_noise_state

Flat = dict[str, Tensor]  # dotted key -> tensor

MAX_DEPTH = 8  # of nested dictionaries

HF_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."  # the second form in state_dict() of transformers 5
# Names of Hugging Face's ViT, DINOv2 and ViTMAE -> names of timm
HF_VIT = (
    (r"embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.(?:register_tokens|reg_token)$", "reg_token"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (HF_BLOCK + r"attention\.(?:attention\.query|q_proj)\.", r"blocks.\1.attn.query."),
    (HF_BLOCK + r"attention\.(?:attention\.key|k_proj)\.", r"blocks.\1.attn.key."),
    (HF_BLOCK + r"attention\.(?:attention\.value|v_proj)\.", r"blocks.\1.attn.value."),
    (HF_BLOCK + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (HF_BLOCK + r"(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (HF_BLOCK + r"(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (HF_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (HF_BLOCK + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (HF_BLOCK + r"layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.(weight|bias)$", r"norm.\1"),
)
# Names of Hugging Face's ResNet -> names of torchvision, before 1 is added to the numbers of stages and layers
HF_RESNET = (
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.", r"layer+\1.\2.conv+\3."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.", r"layer+\1.\2.bn+\3."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.", r"layer+\1.\2.downsample.0."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.", r"layer+\1.\2.downsample.1."),
)


def flattened(content: Mapping[Any, Any]) -> Flat:
    """Return all tensors of nested dictionaries by their dotted keys, such as `state_dict.module.conv1.weight`.

    Values that are neither tensors nor dictionaries are omitted, and so are states of random number generators, sparse
    and quantized tensors, and tensors without values (on the device `meta`).
    """
    return {key: value for key, value in _tensors(content, "", MAX_DEPTH) if not is_noise_state(key)}


def _tensors(content: Mapping[Any, Any], start: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor) and _is_dense(value):
            yield f"{start}{key}", value
        elif isinstance(value, Mapping) and depth:
            yield from _tensors(value, f"{start}{key}.", depth - 1)


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def as_stored(flat: Flat) -> Flat:
    """Return `flat` unchanged."""
    return flat


def from_dinov2(flat: Flat) -> Flat | None:
    """Rename the tokens of DINOv2 to those of timm, and join its chunks of blocks.

    DINOv2 calls the registers `register_tokens`. Its training divides the blocks into chunks, and `blocks.1.7.norm1`
    is block 7. timm's EfficientNets have keys of this form as well, so `as_stored` precedes this layout. Returns None
    if there is no such key in `flat`.
    """
    renamed = {
        re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", key.replace("register_tokens", "reg_token")): value
        for key, value in flat.items()
    }
    return renamed if renamed.keys() != flat.keys() else None


def from_sequential(flat: Flat) -> Flat | None:
    """Rename the ResNets of lightly and others, `torch.nn.Sequential(*list(resnet.children())[:-1])`, to torchvision's.

    Their keys are positions: `0.weight` is `conv1.weight`, `1.weight` is `bn1.weight`, and the next four positions that
    contain blocks are `layer1` to `layer4`. lightly's ResNet for small images calls the downsampling `shortcut`.
    Returns None if there is no such network in `flat`.
    """
    blocks = re.compile(r"^(.*?)(\d+)\.\d+\.conv1\.weight$")
    stages: dict[str, set[int]] = {}
    for key in flat:
        if found := blocks.match(key):
            stages.setdefault(found[1], set()).add(int(found[2]))
    names: dict[str, str] = {}
    for prefix, numbers in stages.items():
        if len(numbers) == 4 and f"{prefix}0.weight" in flat and f"{prefix}1.weight" in flat:
            names |= {f"{prefix}0.": f"{prefix}conv1.", f"{prefix}1.": f"{prefix}bn1."}
            names |= {f"{prefix}{n}.": f"{prefix}layer{i}." for i, n in enumerate(sorted(numbers), start=1)}
    if not names:
        return None

    def renamed(key: str) -> str:
        for old, new in names.items():
            if key.startswith(old):
                return new + key.removeprefix(old).replace(".shortcut.", ".downsample.")
        return key

    return {renamed(key): value for key, value in flat.items()}


def from_hugging_face_vit(flat: Flat) -> Flat | None:
    """Rename the keys of transformers' ViT, DINOv2 and ViTMAE to timm's, and join query, key and value.

    Returns None if there is no such network in `flat`.
    """
    if not any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in flat):
        return None
    return _joined_qkv({_renamed(key, HF_VIT): value for key, value in flat.items()})


def _joined_qkv(flat: Flat) -> Flat:
    """Join `attn.query`, `attn.key` and `attn.value` of each block to `attn.qkv`, if all three have the same shape."""
    joined = dict(flat)
    for key in flat:
        start, middle, end = key.partition(".attn.query.")
        three = [f"{start}.attn.{name}.{end}" for name in ("query", "key", "value")]
        shapes = {joined[name].shape if name in joined else None for name in three}
        if middle and len(shapes) == 1 and joined[three[0]].ndim:
            joined[f"{start}.attn.qkv.{end}"] = torch.cat([joined.pop(name) for name in three])
    return joined


def from_hugging_face_resnet(flat: Flat) -> Flat | None:
    """Rename the keys of transformers' ResNet to torchvision's. Returns None if there is no such network in `flat`."""
    if not any(key.endswith("embedder.embedder.convolution.weight") for key in flat):
        return None
    return {
        re.sub(r"\+(\d+)", lambda found: str(int(found[1]) + 1), _renamed(key, HF_RESNET)): value
        for key, value in flat.items()
    }


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply the first rule whose pattern occurs in `key` at its start or after a dot."""
    for pattern, new in rules:
        renamed, number = re.subn(rf"(?:^|(?<=\.)){pattern}", new, key)
        if number:
            return renamed
    return key


LAYOUTS: tuple[Callable[[Flat], Flat | None], ...] = (
    as_stored,
    from_dinov2,
    from_sequential,
    from_hugging_face_vit,
    from_hugging_face_resnet,
)
