"""Search for the backbone whose weights a checkpoint contains, to suggest it to the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isqrt

import torch
from torch import nn

from sslcli.backbones.resnet import ARCHS, ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.vit import VisionTransformer
from sslcli.weights.fitting import names_of, places
from sslcli.weights.key_layouts import Flat

VITS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}  # width -> choice of conf/backbone
TIMM_VITS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
DEPTH, WIDTH_OF_HEAD = 12, 64  # of all choices in `VITS`
STEMS = {"imagenet": "the ImageNet stem", "cifar": "the CIFAR stem"}


def nearest_backbone(flat: Flat) -> str | None:
    """Return a sentence with the backbone whose weights a flattened checkpoint contains, and how to choose it.

    Candidates are the backbones of sslcli. Their networks are built without memory and compared with the checkpoint.
    Returns None if none of them fits.
    """
    return next((sentence for sentence, net in _candidates(flat) if net is None or _fits(flat, net)), None)


def _fits(flat: Flat, net: nn.Module) -> bool:
    return any(place.fits for place in places(flat, names_of(net)))


def _candidates(flat: Flat) -> Iterator[tuple[str, nn.Module | None]]:
    """Yield sentences and networks. Where the sentence alone is the answer, the network is None."""
    flat = {key: value for key, value in flat.items() if value.numel()}  # no layer has a width of 0
    with torch.device("meta"):
        for key in flat:
            if key.endswith("patch_embed.proj.weight"):
                yield from _vision_transformers(flat, key.removesuffix("patch_embed.proj.weight"))
            if key.endswith("block1.0.weight") and flat[key].ndim == 4:
                width = len(flat[key])
                yield (
                    f"the file holds the small backbone: backbone=small backbone.width={width}",
                    Small(image_size=32, width=width),
                )
        if any(key.endswith("conv1.weight") for key in flat):
            for arch in ARCHS:
                for stem, name in STEMS.items():
                    sentence = f"the file holds a {arch} with {name}: backbone={arch} backbone.stem={stem}"
                    yield sentence, ResNet(arch, image_size=64, stem=stem)


def _vision_transformers(flat: Flat, prefix: str) -> Iterator[tuple[str, nn.Module | None]]:
    projection = flat[f"{prefix}patch_embed.proj.weight"]
    positions, registers = flat.get(f"{prefix}pos_embed"), flat.get(f"{prefix}reg_token")
    hidden = flat.get(f"{prefix}blocks.0.mlp.fc1.weight")
    if projection.ndim != 4 or positions is None or positions.ndim != 3 or hidden is None or hidden.ndim != 2:
        return
    width, channels, patch = len(projection), projection.shape[1], projection.shape[2]
    # The number of blocks with weights, not the largest number in the keys: it limits the size of the network.
    depth = len({found[1] for key in flat if (found := re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", key))})
    size = patch * isqrt(positions.shape[1])
    what = f"the file holds a vision transformer of width {width}, depth {depth} and patches of {patch} pixels"
    if f"{prefix}cls_token" not in flat:
        name = f"vit_{TIMM_VITS.get(width, 'base')}_patch{14 if width == 1280 else 16}_224"
        options = {"class_token": "false", "global_pool": "avg", "fc_norm": "false", "patch_size": patch}
        options |= {} if width in TIMM_VITS else {"embed_dim": width, "depth": depth}
        added = " ".join(f"+backbone.options.{key}={value}" for key, value in options.items())
        remedy = f"backbone=timm backbone.name={name} {added}"
        yield f"{what} without a class token, as I-JEPA, so it needs timm's network: {remedy}", None
        return
    count = 0 if registers is None or registers.ndim != 3 else registers.shape[1]
    scale = 1e-5 if f"{prefix}blocks.0.ls1.gamma" in flat else None
    ratio = len(hidden) / width
    choice = [f"backbone={VITS.get(width, 'vit_base')} backbone.patch_size={patch}"]
    if width not in VITS:
        choice.append(f"backbone.width={width} backbone.num_heads={max(1, width // WIDTH_OF_HEAD)}")
    choice += [f"backbone.depth={depth}"] if depth != DEPTH else []
    choice += [f"backbone.mlp_ratio={ratio:g}"] if ratio != 4 else []
    choice += [f"backbone.registers={count}"] if count else []
    choice += [f"backbone.layer_scale={scale:g}"] if scale else []
    try:
        net = VisionTransformer(
            image_size=patch * 4,
            patch_size=patch,
            width=width,
            depth=depth,
            num_heads=1,  # the weights do not depend on it
            mlp_ratio=ratio,
            in_channels=channels,
            registers=count,
            layer_scale=scale,
        )
    except ValueError:
        return
    yield f"{what}, trained at {size} pixels: {' '.join(choice)}", net
