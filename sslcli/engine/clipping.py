"""Gradient clipping: by the norm of the whole gradient, of each tensor, or of each module of a method.

The norms stay on the device, so the host does not wait for them. Norms of sharded gradients are computed over all
shards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import local, whole


def clip_gradients(method: nn.Module, max_norm: float, *, by: str) -> None:
    """Multiply gradients in place by max_norm / (norm + 1e-6), if this factor is below 1.

    `by` selects the norm:
        "all": one norm of the gradient of all parameters (torch's clip_grad_norm_).
        "tensor": a norm for each parameter tensor, as in DINO and iBOT.
        "module": a norm for each direct submodule of `method`, such as the backbone and the head, as in DINOv2. The
            parameters that `method` itself holds count as one submodule.
    """
    named = [(name, parameter) for name, parameter in method.named_parameters() if parameter.grad is not None]
    if by == "tensor":
        clip_each([parameter.grad for _, parameter in named if parameter.grad is not None], max_norm)
        return
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        part = name.rpartition(".")[0].partition(".")[0] if by == "module" else ""
        parts.setdefault(part, []).append(parameter)
    for parameters in parts.values():
        nn.utils.clip_grad_norm_(parameters, max_norm)


def clip_each(gradients: list[Tensor], max_norm: float) -> None:
    """Clip each tensor of `gradients` in place by its own norm."""
    if gradients:
        norms = torch.stack([whole(norm) for norm in torch._foreach_norm(gradients)])
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], list(factors.unbind()))
