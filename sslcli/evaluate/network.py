"""A net with a linear layer on top, to be trained as a whole, and the learning rates of its parts.

Layer-wise decay of the learning rate is that of BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377, appendix A.2): level
l of L below the classifier learns at rate lr * decay ** (L + 1 - l).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli.evaluate import layers
from sslcli.methods.base import Method
from sslcli.nn import SplitBatchNorm, SyncBatchNorm, evaluating
from sslcli.optim import NEVER_DECAYED

Level = dict[str, nn.Parameter]  # by name


class Classifier(nn.Module):
    """Logits (N, num_classes) from the features (N, width) of `net` at `layer`; the linear layer starts at zero.

    Parameters that the features do not depend on, such as those of a predictor, take no gradient. All others do, those
    that pre-training kept frozen as well. Raises ValueError where the features carry no gradient.
    """

    def __init__(self, net: nn.Module, layer: str, *, width: int, num_classes: int, images: Tensor) -> None:
        super().__init__()
        self.net, self.layer = net, layer
        self.classify = nn.Linear(width, num_classes, device=images.device)
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)
        for part in net.modules():
            if isinstance(part, SplitBatchNorm):  # groups hide keys from queries, which is of no use here
                part.__class__ = SyncBatchNorm  # type: ignore[assignment]
        self._open(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(layers.read(self.net, self.layer, images))  # type: ignore[no-any-return]

    def _open(self, images: Tensor) -> None:
        """Let gradients reach what the features of `images`, any two, depend on."""
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
    """The trainable parameters of a net from input to output, in levels that share a learning rate.

    The levels of a backbone are its children, the blocks of a list of blocks (ViT) each by itself. A child that only
    normalises belongs to the level before, parameters of the backbone itself (tokens) to the first. What a method puts
    on top of its largest part, the layers of a projection head, is one more level.
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
    if not own and len(children) == 1:  # a wrapper
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
    """Groups for an optimizer: `lr_scale` falls from 1 at the classifier by `layer_decay` a level towards the input.

    Biases, norms and tokens do not decay.
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
    """Training mode; BatchNorm keeps the statistics it has where `batch_norm` is eval."""
    classifier.train()
    if batch_norm == "eval":
        for part in classifier.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
