"""Checks of the contract between a method and the training loop, before the first step.

`sslcli.methods.base` declares the contract.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sslcli.errors import ConfigError, class_name
from sslcli.methods.base import Method

MAX_LENGTH = 60  # characters of a value in a message


def check_members(method: Method) -> None:
    """Raise ConfigError unless a method has the members that every method must define."""
    name, kind = class_name(type(method)), type(method)
    if kind.forward is Method.forward:
        raise ConfigError(f"{name} does not define forward, which computes the loss of a step: define forward(batch)")
    if "backbone" not in vars(method).get("_modules", {}):
        raise ConfigError(f"{name} has no backbone: call super().__init__(backbone) in its constructor")
    views: object = method.num_views
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        found = "has no num_views" if views == 0 else f"has num_views = {views!r}"
        raise ConfigError(
            f"{name} {found}. It must be the number of views per image that forward takes, an integer of at least 1: "
            "set it in the class, as in num_views = 2"
        )
    part = method.evaluated_part
    if part != kind.evaluated_part:
        raise ConfigError(
            f"{name} sets evaluated_part = {part!r} on the instance, but ssl-export reads it from the class: set it in "
            "the class"
        )
    if part not in dict(method.named_modules()):
        raise ConfigError(
            f"{name} has evaluated_part = {part!r}, but no submodule of this name: set it to the dotted name of the "
            'network to evaluate, such as "backbone"'
        )


def check_scalars(scalars: object, method: type) -> Tensor:
    """Return the loss in the dictionary `scalars`, which the `forward` of a method returned.

    Raises ConfigError if `scalars` is not valid. Every entry must be a scalar tensor. The loss must depend on a
    trainable parameter, but may be NaN or infinite.
    """
    name = f"forward of {class_name(method)}"
    right = """a dictionary of scalar tensors with the key 'loss', as in {"loss": loss}"""
    if not isinstance(scalars, Mapping):
        raise ConfigError(f"{name} returned {_describe(scalars)}, but it must return {right}")
    if "loss" not in scalars:
        keys = ", ".join(map(repr, scalars)) or "none"
        raise ConfigError(f"{name} returned a dictionary without 'loss' (its keys: {keys}), but it must return {right}")
    for key, value in scalars.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name} returned a dictionary with the key {key!r}, but all keys must be text")
        if not isinstance(value, Tensor):
            remedy = (
                "return the tensor itself"
                if key == "loss"
                else "convert it, as in torch.tensor(value, device=loss.device)"
            )
            raise ConfigError(
                f"{name} returned {_describe(value)} as {key!r}, but it must be a scalar tensor: {remedy}"
            )
        if value.ndim > 0:
            remedy = "return one number, such as the mean over the batch"
            raise ConfigError(f"{name} returned {_describe(value)} as {key!r}, but it must be a scalar: {remedy}")
    loss: Tensor = scalars["loss"]
    if not loss.requires_grad:
        raise ConfigError(
            f"{name} returned a loss that depends on no trainable parameter, so nothing would be trained: do not "
            "detach the loss, and do not freeze all parameters"
        )
    for key, value in scalars.items():
        if value.device != loss.device:
            raise ConfigError(
                f"{name} returned {key!r} on the device {value.device}, but the loss is on {loss.device}: create the "
                "tensor with device=batch.views[0].device"
            )
    return loss


def check_embeddings(method: Method) -> None:
    """Raise ConfigError unless `method.embeddings` is an empty tuple, or a tuple with one tensor (N, D) per view.

    N is the number of images and D is the number of embedding dimensions.
    """
    found: object = method.embeddings
    if isinstance(found, (tuple, list)) and all(isinstance(view, Tensor) and view.ndim == 2 for view in found):
        return
    has = ", ".join(map(_describe, found)) if isinstance(found, (tuple, list)) else _describe(found)
    raise ConfigError(
        f"forward of {class_name(type(method))} set self.embeddings to {has}, but it must be a tuple with one detached "
        "tensor of shape (N, D) per view, as in (z1.detach(), z2.detach())"
    )


def guard_warning(method: nn.Module) -> str:
    """Return the warning that collapse is not detected, because the method does not set `embeddings`."""
    return (
        f"collapse is not detected, because forward of {class_name(type(method))} does not set self.embeddings: set it "
        "to a tuple with one detached tensor of shape (N, D) per view, as in self.embeddings = (z1.detach(), "
        "z2.detach()), or turn the detection off with monitor.on_collapse=ignore"
    )


def _describe(value: object) -> str:
    """Return the type of a value, with the shape of a tensor, as in `a Tensor of shape (8, 64)`."""
    if isinstance(value, Tensor):
        return "a Tensor" if value.ndim == 0 else f"a Tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"the {type(value).__name__} {value!r}"[:MAX_LENGTH]
