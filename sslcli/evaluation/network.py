"""A network with a linear classifier on top, and its parameter groups with layer-wise learning rates.

The layer-wise learning rate decay is as in BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377, appendix A.2). The
parameters below the classifier are divided into L levels, see `levels`. The levels are numbered from 1 at the input.
Level l has the learning rate lr * decay ** (L + 1 - l).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli.engine.optim import NEVER_DECAYED
from sslcli.evaluation import layers
from sslcli.methods.base import Method
from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm
from sslcli.nn.modes import evaluating

Level = dict[str, nn.Parameter]  # parameters of one level, by name


class Classifier(nn.Module):
    """Network `net` with a linear classifier on its features at `layer`: (N, width) -> (N, num_classes).

    The classifier is initialized with zeros. Parameters on which the features do not depend, such as the parameters of
    a predictor, do not require gradients. All other parameters require gradients, even if they were frozen in
    pre-training. Raises ValueError if no gradient can flow through the features.
    """

    def __init__(self, net: nn.Module, layer: str, *, width: int, num_classes: int, images: Tensor) -> None:
        super().__init__()
        self.net, self.layer = net, layer
        self.classify = nn.Linear(width, num_classes, device=images.device)
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)
        for part in net.modules():
            if isinstance(part, SplitBatchNorm):  # training with labels has no keys and queries
                part.__class__ = SyncBatchNorm  # type: ignore[assignment]
        self._open(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(layers.read(self.net, self.layer, images))  # type: ignore[no-any-return]

    def _open(self, images: Tensor) -> None:
        """Set requires_grad to True for the parameters on which the features depend, and to False for all others.

        `images` (2, C, H, W) is an example input. Its pixel values have no effect.
        """
        parameters = list(self.net.requires_grad_(True).parameters())
        with evaluating(self.net), torch.random.fork_rng(devices=[]), torch.enable_grad():
            total = layers.read(self.net, self.layer, images).sum()
            if not total.requires_grad:
                raise ValueError(
                    f"the features of {type(self.net).__name__} at {self.layer!r} carry no gradient, so there is "
                    "nothing to train: choose another feature_layer, or a frozen protocol (linear, knn)"
                )
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def levels(net: nn.Module) -> list[Level]:
    """Return the trainable parameters in levels, from input to output. Each level has one learning rate.

    Each child module of a backbone is a level. If a child is a list of blocks (ViT), each block is a level. A child
    that has only norm layers belongs to the previous level. Parameters of the backbone module itself (tokens) belong to
    the first level. All other parts of a method, such as the projection head, form one further level. If a method has
    no attribute `backbone`, its child module with the most trainable parameters is treated as the backbone.
    """
    if not isinstance(net, Method):
        return _levels_of(net, "")
    parts = {name: part for name, part in net.named_children() if _trainable(part, "")}
    sizes = {name: sum(p.numel() for p in _trainable(part, "").values()) for name, part in parts.items()}
    trunk = "backbone" if "backbone" in parts else max(sizes, key=lambda name: sizes[name])
    above = {
        key: value
        for name, part in parts.items()
        if name != trunk
        for key, value in _trainable(part, f"{name}.").items()
    }
    return [*_levels_of(parts[trunk], f"{trunk}."), *([above] if above else [])]


def _levels_of(trunk: nn.Module, prefix: str) -> list[Level]:
    own = {f"{prefix}{name}": p for name, p in trunk.named_parameters(recurse=False) if p.requires_grad}
    children = [(name, child) for name, child in trunk.named_children() if _trainable(child, "")]
    if not own and len(children) == 1:  # the module only wraps its child
        name, child = children[0]
        return _levels_of(child, f"{prefix}{name}.")
    found: list[Level] = []
    for name, child in children:
        blocks = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and name == "blocks")
        parts = [(f"{name}.{inner}", block) for inner, block in child.named_children()] if blocks else [(name, child)]
        for path, part in parts:
            parameters = _trainable(part, f"{prefix}{path}.")
            if found and all(p.ndim <= 1 for p in parameters.values()):
                found[-1] |= parameters
            elif parameters:
                found.append(parameters)
    if own and found:
        found[0] = own | found[0]
    return found or [own]


def _trainable(module: nn.Module, prefix: str) -> Level:
    return {f"{prefix}{name}": p for name, p in module.named_parameters() if p.requires_grad}


def parameter_groups(classifier: Classifier, *, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups for the optimizer. `lr_scale` is the factor for the learning rate of a group.

    A level is a part of the network that has one learning rate, such as a stage or a block, see `levels`. The highest
    level is the linear layer of `classifier`. Its `lr_scale` is 1. For each lower level, `lr_scale` is `layer_decay`
    times the `lr_scale` of the next higher level. Biases, norms and tokens have no weight decay.
    """
    stack = [*levels(classifier.net), dict(classifier.classify.named_parameters())]
    groups = []
    for depth, level in enumerate(stack):
        scale = layer_decay ** (len(stack) - 1 - depth)
        plain = {n: p for n, p in level.items() if p.ndim <= 1 or n.rpartition(".")[2] in NEVER_DECAYED}
        for decay, members in ((weight_decay, level.keys() - plain.keys()), (0.0, plain.keys())):
            if members:
                chosen = [level[name] for name in level if name in members]
                groups.append({"params": chosen, "weight_decay": decay, "lr_scale": scale})
    return groups


def set_mode(classifier: nn.Module, *, batch_norm: str) -> None:
    """Set training mode. If `batch_norm` is "eval", BatchNorm layers stay in evaluation mode (running statistics)."""
    classifier.train()
    if batch_norm == "eval":
        for part in classifier.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
