"""LARS optimizer, parameter groups, and loading of optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslcli.distributed.collectives import local, whole
from sslcli.errors import ConfigError
from sslcli.methods.base import GroupOptions, Method

NEVER_DECAYED = ("bias", "pos_embed", "cls_token", "reg_token", "mask_token")


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, https://arxiv.org/abs/1708.03888) with momentum.

    Let w be a weight tensor, grad its gradient, g = grad + weight_decay w, and m its momentum buffer. MoCo v3, DINO,
    VISSL and BYOL use the default form: q = eta |w| / |g|, m <- momentum m + q g, w <- w - lr m. If |w| or |g| is zero,
    q = 1.

    Args:
        params: parameter groups. A group with `adapt=False` is updated by SGD with momentum and without weight decay.
        lr: learning rate.
        weight_decay: weight decay of groups with `adapt=True`.
        momentum: factor of the momentum buffer.
        eta: trust coefficient.
        separate_norms: use q = eta |w| / (|grad| + weight_decay |w| + 1e-8), as in lightly and solo-learn.
        lr_in_buffer: use m <- momentum m + lr q g, w <- w - m, as in Google's SimCLR. If lr is constant, both forms
            give the same result.
        clip_lr: use q <- min(q / lr, 1), as in solo-learn's CIFAR recipes. The step size (lr times q) is then at most
            lr.
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
        """Perform one optimization step for all parameters with a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_type: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_type.setdefault((weight.device, weight.dtype), []).append(weight)
            for weights in by_type.values():
                self.move(weights, group)
        return loss

    def move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameter tensors `weights` in place. `group` is their parameter group.

        All tensors must have a gradient, and the same device and dtype. On a GPU, all tensors are updated by the same
        few kernels.
        """
        grads = [weight.grad for weight in weights if weight.grad is not None]
        steps = self.adapted(weights, grads, group) if group["adapt"] else [local(grad) for grad in grads]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        inside, outside = (group["lr"], 1.0) if self.lr_in_buffer else (1.0, group["lr"])
        buffers = [local(self.state[weight]["momentum_buffer"]) for weight in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps, alpha=inside)
        torch._foreach_sub_([local(weight) for weight in weights], buffers, alpha=outside)

    def adapted(self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return q * (grad + weight_decay * weight) for each of K tensors, with the factors q of `LARS`.

        A factor makes the step proportional to |weight|. Norms of sharded tensors are computed over all shards, and the
        result contains this process's shards. All values stay on the device, so the host does not wait for them.
        `group` is the parameter group of `weights`.
        """
        decay = group["weight_decay"]
        lengths = norms(weights)  # (K,)
        if self.separate_norms:
            of_gradients = norms(grads)
            divisors = of_gradients + decay * lengths + 1e-8
            usable = (lengths > 0) & (of_gradients > 0)
            # If a norm is zero, `separate_norms` turns off weight decay.
            kept = scaled([local(weight) for weight in weights], usable.to(lengths.dtype))
            decayed = torch._foreach_add([local(grad) for grad in grads], kept, alpha=decay)
        else:
            decayed = torch._foreach_add(grads, weights, alpha=decay)
            divisors = norms(decayed)
            usable = (lengths > 0) & (divisors > 0)
        trust = group["eta"] * lengths / divisors
        if self.clip_lr and group["lr"] > 0:
            trust = (trust / group["lr"]).clamp(max=1.0)
        return scaled([local(tensor) for tensor in decayed], torch.where(usable, trust, 1.0))


def norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return the Euclidean norms (K,) of K tensors. The norm of a sharded tensor (DTensor) is that of all shards."""
    if local(tensors[0]) is tensors[0]:
        return torch.stack(torch._foreach_norm(tensors))
    return torch.stack([whole(torch.linalg.vector_norm(tensor)) for tensor in tensors])


def scaled(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Return the product of each of K tensors and its factor in `factors` (K,). The tensors must be dense."""
    if factors.device.type == "cpu":  # one kernel would be slower than K, because of the copy in `scaled_together`
        return list(torch._foreach_mul(tensors, factors.unbind()))
    return scaled_together(tensors, factors)


def scaled_together(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Return the same as `scaled`, with a number of kernels that does not depend on K.

    torch multiplies a list of tensors in one kernel only if all have the same factor. Therefore the tensors are
    concatenated, in the order of their memory.
    """
    flat = torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors])
    flat *= torch.cat([factor.expand(tensor.numel()) for tensor, factor in zip(tensors, factors, strict=True)])
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [
        part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def parameter_groups(
    method: nn.Module, *, weight_decay: float, decay_norm_and_bias: bool = False
) -> list[dict[str, Any]]:
    """Return two groups of trainable parameters: one with weight decay and one without.

    The group without weight decay contains biases, normalization parameters, and the class token, registers, mask token
    and position embeddings of ViT. The optimizer LARS does not adapt the learning rate of this group (`adapt=False`).
    If `decay_norm_and_bias` is True, there is only the group with weight decay, as in MoCo v1 and v2. Parameters for
    which `method.group_options()` returns options get groups of their own. If `method.param_groups()` is not None, the
    function returns these groups. `wd_scale` of each group is the factor of the optimizer's weight decay. A group of
    `param_groups` that has a weight decay of its own has no `wd_scale`, and keeps its weight decay.
    """
    own = method.param_groups() if isinstance(method, Method) else None
    if own is not None:
        return [group if "weight_decay" in group else {"wd_scale": 1.0, **group} for group in own]
    options = method.group_options() if isinstance(method, Method) else {}
    members: dict[tuple[Any, bool], list[Tensor]] = {}  # the keys are the options, and if there is weight decay
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            excluded = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED
            chosen = tuple(sorted(options_of(name, options).items()))
            for adapt in (True, False):  # of groups with the same options, the one with weight decay comes first
                members.setdefault((chosen, adapt), [])
            members[chosen, decay_norm_and_bias or not excluded].append(parameter)
    groups = []
    for (chosen, adapt), parameters in members.items():
        if parameters:
            group = {"wd_scale": 1.0, **dict(chosen), "adapt": adapt, "params": parameters}
            if not adapt:
                group["wd_scale"] = 0.0
            groups.append(group | {"weight_decay": weight_decay * group["wd_scale"]})
    return groups


def freeze_backbone(groups: list[dict[str, Any]], method: Method, *, epochs: float) -> list[dict[str, Any]]:
    """Return `groups` with the parameters of `method.backbone` in groups of their own, which are frozen at first.

    They are frozen in the first `epochs` epochs, see `GroupOptions`. Raises ConfigError if the method does not train
    its backbone, or if it trains nothing else.
    """
    members = {id(parameter) for parameter in method.backbone.parameters()}
    found, counts = [], [0, 0]
    for group in groups:
        parameters = list(group["params"])
        for is_backbone in (True, False):
            chosen = [parameter for parameter in parameters if (id(parameter) in members) == is_backbone]
            if chosen:
                frozen = {"frozen_epochs": max(epochs, group.get("frozen_epochs", 0.0))} if is_backbone else {}
                found.append(group | {"params": chosen} | frozen)
                counts[is_backbone] += 1
    if 0 in counts:
        what = "trains only its backbone" if counts[True] else "does not train its backbone directly"
        raise ConfigError(
            f"train.freeze_backbone_epochs is {epochs:g}, but {type(method).__name__} {what}: set "
            "train.freeze_backbone_epochs=0"
        )
    return found


def options_of(name: str, options: Mapping[str, GroupOptions]) -> GroupOptions:
    """Return the options of the parameter `name`. The longest key of `options` that the name starts with decides.

    A key is the name of a parameter, or of a module that contains the parameter.
    """
    found = [start for start in options if name == start or name.startswith(f"{start}.")]
    return options[max(found, key=len)] if found else {}


def drop_frozen_gradients(optimizer: Optimizer) -> None:
    """Remove the gradients of frozen groups, so that the optimizer changes neither their parameters nor its state."""
    for group in optimizer.param_groups:
        if group.get("is_frozen"):
            for parameter in group["params"]:
                parameter.grad = None


def zero_momentum(optimizer: Optimizer) -> None:
    """Give each parameter of a fused SGD optimizer a momentum buffer of zeros. Other optimizers are left unchanged.

    Call this function before the first step of an fp16 run. In its first step, torch's fused SGD allocates the buffers
    without initializing them, because that step overwrites them. If the gradients of that step overflow, the step is
    skipped, the buffers are not written, and the next step would use the arbitrary contents of the memory.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        if group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer state, but keep the `fused` setting of `optimizer`.

    The `fused` setting of the saved state may not suit the current run, for two reasons:

    - torch has no fused SGD for sharded parameters. The parameters may be sharded in the current run, but not in the
      run that saved the state.
    - With fp16, a fused optimizer divides the gradients by the loss scale itself. Other optimizers do not.

    State tensors are copied to the memory layout of their parameters, because fused optimizers require this layout.
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
