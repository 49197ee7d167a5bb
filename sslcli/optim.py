"""LARS, and the parameter groups every optimizer gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslcli.distributed import whole
from sslcli.methods.base import Method

NEVER_DECAYED = ("bias", "pos_embed", "cls_token", "mask_token")


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, https://arxiv.org/abs/1708.03888) with momentum.

    The reference form is that of MoCo v3, DINO, VISSL and BYOL: with g the gradient plus decay,
    q = eta |w| / |g|, m <- momentum m + q g, w <- w - lr m. Where a norm is zero, q = 1.

    Args:
        params: groups; a group with `adapt=False` takes plain momentum steps without decay.
        lr: learning rate.
        weight_decay: of adapted groups.
        momentum: of the buffer.
        eta: the trust coefficient.
        separate_norms: q = eta |w| / (|grad| + weight_decay |w| + 1e-8), as lightly and solo-learn do.
        lr_in_buffer: m <- momentum m + lr q g, w <- w - m, as Google's SimCLR does; differs when lr changes.
        clip_lr: q <- min(q / lr, 1), so that lr is only a cap, as solo-learn's CIFAR recipes do.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        separate_norms: bool = False,
        lr_in_buffer: bool = False,
        clip_lr: bool = False,
    ) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, but LARS needs it to be at least 0")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta, "adapt": True}
        self.separate_norms = separate_norms
        self.lr_in_buffer = lr_in_buffer
        self.clip_lr = clip_lr
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, weight.grad, group)
        return loss

    def move(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Move one parameter tensor."""
        if group["adapt"]:
            grad = self.adapted(weight, grad, group)
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        inside, outside = (group["lr"], 1.0) if self.lr_in_buffer else (1.0, group["lr"])
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(grad, alpha=inside)
        weight.sub_(buffer, alpha=outside)

    def adapted(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient with decay, times the scalar q that makes a step proportional to the length of `weight`.

        Lengths are those of whole tensors, also where these are sharded over processes. Nothing here waits for the
        device.
        """
        length = whole(torch.linalg.vector_norm(weight))
        decayed = grad.add(weight, alpha=group["weight_decay"])
        if self.separate_norms:
            of_gradient = whole(torch.linalg.vector_norm(grad))
            divisor = of_gradient + group["weight_decay"] * length + 1e-8
            usable = (length > 0) & (of_gradient > 0)
            decayed = torch.where(usable, decayed, grad)  # there, a weight without gradient does not decay either
        else:
            divisor = whole(torch.linalg.vector_norm(decayed))
            usable = (length > 0) & (divisor > 0)
        trust = group["eta"] * length / divisor
        if self.clip_lr and group["lr"] > 0:
            trust = (trust / group["lr"]).clamp(max=1.0)
        return decayed * torch.where(usable, trust, 1.0)


def parameter_groups(
    method: nn.Module, *, weight_decay: float, decay_norm_and_bias: bool = False
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed ones, and biases, norms and tokens, which are not.

    The second group also carries `adapt=False` for LARS. With `decay_norm_and_bias` everything is in the first group,
    as in MoCo v1 and v2. A method with its own `param_groups()` is taken at its word.
    """
    own = method.param_groups() if isinstance(method, Method) else None
    if own is not None:
        return own
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            excluded = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED
            (plain if excluded and not decay_norm_and_bias else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay, "adapt": True}]
    return [*groups, {"params": plain, "weight_decay": 0.0, "adapt": False}] if plain else groups


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, but not whether its steps were fused: that is decided where this one was built.

    torch has no fused SGD of sharded parameters, while an optimizer that was built fused is left to undo the scale of
    fp16. Fused steps need numbers in the order that their parameters have in memory.
    """
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, fused, strict=True):
        if "fused" in group:
            group["fused"] = before
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            for name, value in kept.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    kept[name] = torch.empty_like(parameter).copy_(value)
