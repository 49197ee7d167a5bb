from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from golden_cases import Case, golden_cases
from sslcli.engine import optim
from sslcli.engine.optim import (
    LARS,
    drop_frozen_gradients,
    freeze_backbone,
    load_optimizer,
    parameter_groups,
    zero_momentum,
)
from sslcli.errors import ConfigError
from sslcli.methods.base import GroupOptions, Method

REFERENCE = ("mocov3", "dino", "vissl", "byol")


def recorded_steps(case: Case, **dialect: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weight matrix and excluded bias after each step on the recorded gradients."""
    x, params = case.inputs, case.params
    weight, bias = nn.Parameter(x["w0"]), nn.Parameter(x["b0"])
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0, "adapt": False}]
    values = {"weight_decay": params["weight_decay"], "momentum": params["momentum"], "lr": 1.0}
    optimizer = LARS(groups, eta=params["trust_coefficient"], **values, **dialect)
    weights, biases = [], []
    for lr, grad_w, grad_b in zip(x["lr"], x["grad_w"], x["grad_b"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        weight.grad, bias.grad = grad_w.clone(), grad_b.clone()
        optimizer.step()
        weights.append(weight.detach().clone())
        biases.append(bias.detach().clone())
    return weights, biases


@golden_cases("lars_", but_not="lars_barlow")
def test_reference_form_takes_the_steps_of_four_official_codes(case: Case) -> None:
    weights, biases = recorded_steps(case)
    for code in REFERENCE:
        case.check(weights, f"w_{code}")
        case.check(biases, f"b_{code}")


@golden_cases("lars_", but_not="lars_barlow")
def test_separate_norms_take_the_steps_of_lightly_and_solo_learn(case: Case) -> None:
    weights, biases = recorded_steps(case, separate_norms=True)
    # without decay lightly does not adapt at all
    for code in ("sololearn", "lightly") if case.params["weight_decay"] else ("sololearn",):
        case.check(weights, f"w_{code}")
        case.check(biases, f"b_{code}")


@golden_cases("lars_", but_not="lars_barlow")
def test_learning_rate_in_the_buffer_takes_the_steps_of_simclr(case: Case) -> None:
    weights, biases = recorded_steps(case, lr_in_buffer=True)
    case.check(weights, "w_simclr")
    case.check(biases, "b_simclr")


@golden_cases("lars_", but_not="lars_barlow")
def test_both_dialects_together_take_the_steps_of_mmselfsup(case: Case) -> None:
    weights, biases = recorded_steps(case, separate_norms=True, lr_in_buffer=True)
    case.check(weights, "w_mmselfsup")
    case.check(biases, "b_mmselfsup")


@golden_cases("lars_barlow")
def test_groups_with_their_own_rates_take_the_steps_of_barlow_twins(case: Case) -> None:
    x, params = case.inputs, case.params
    weight, bias = nn.Parameter(x["w0"]), nn.Parameter(x["b0"])
    zeros = nn.Parameter(torch.zeros_like(x["grad_z"][0]))  # a matrix that starts at zero
    groups = [{"params": [weight, zeros]}, {"params": [bias], "weight_decay": 0.0, "adapt": False}]
    optimizer = LARS(
        groups, lr=1.0, eta=params["eta"], weight_decay=params["weight_decay"], momentum=params["momentum"]
    )
    steps: dict[str, list[Tensor]] = {"w": [], "b": [], "z": []}
    for step in range(params["steps"]):
        optimizer.param_groups[0]["lr"] = params["lr_weights"][step]
        optimizer.param_groups[1]["lr"] = params["lr_biases"][step]
        weight.grad, bias.grad, zeros.grad = (x[f"grad_{name}"][step].clone() for name in ("w", "b", "z"))
        optimizer.step()
        for name, value in (("w", weight), ("b", bias), ("z", zeros)):
            steps[name].append(value.detach().clone())
    for name, values in steps.items():
        case.check(values, name)


def train_two_layers(grad_scale: float = 1.0, **values: Any) -> list[dict[str, Tensor]]:
    """The parameters of a two-layer net before and after each of 20 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    images, wanted = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    groups = parameter_groups(net, weight_decay=values.pop("weight_decay", 0.0))
    optimizer = LARS(groups, lr=0.5, eta=0.02, **values)
    states = [{name: p.detach().clone() for name, p in net.named_parameters()}]
    for _ in range(20):
        optimizer.zero_grad()
        (grad_scale * (net(images) - wanted).square().mean()).backward()
        optimizer.step()
        states.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return states


def test_learning_rate_inside_or_outside_the_buffer_is_the_same_while_it_is_constant() -> None:
    outside, inside = (train_two_layers(lr_in_buffer=where, weight_decay=1e-3)[-1] for where in (False, True))
    torch.testing.assert_close(inside, outside, rtol=1e-9, atol=1e-12)


def test_scale_of_gradients_changes_excluded_tensors_alone() -> None:
    (start, after), (_, scaled) = (train_two_layers(scale)[:2] for scale in (1.0, 1e3))
    for name in start:
        step, scaled_step = after[name] - start[name], scaled[name] - start[name]
        expected = step * 1e3 if name.endswith("bias") else step
        torch.testing.assert_close(scaled_step, expected)
        assert step.abs().max() > 0


def one_step(weight: Tensor, grad: Tensor, *, lr: float = 0.5, **values: Any) -> Tensor:
    """Return the size of the first step of `weight`."""
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    LARS([parameter], lr=lr, **values).step()
    return parameter.detach() - weight


def test_first_step_is_as_long_as_the_weight_times_eta_and_the_rate() -> None:
    weight, grad = torch.randn(2, 3, 4, dtype=torch.float64)
    step = one_step(weight, grad, eta=0.02)
    torch.testing.assert_close(step.norm(), 0.5 * 0.02 * weight.norm())
    torch.testing.assert_close(step / step.norm(), -grad / grad.norm())


@pytest.mark.parametrize("separate_norms", [False, True])
def test_a_weight_of_zeros_takes_a_plain_step(separate_norms: bool) -> None:
    grad = torch.randn(3, 4)
    step = one_step(torch.zeros(3, 4), grad, weight_decay=0.1, separate_norms=separate_norms)
    torch.testing.assert_close(step, -0.5 * grad)


@pytest.mark.parametrize("separate_norms", [False, True])
def test_a_gradient_of_zeros_stays_finite(separate_norms: bool) -> None:
    step = one_step(torch.ones(3, 4), torch.zeros(3, 4), separate_norms=separate_norms)
    assert torch.equal(step, torch.zeros(3, 4))


def test_a_weight_without_gradient_decays_in_the_reference_form_alone() -> None:
    still, weight = torch.zeros(3, 4), torch.ones(3, 4)
    reference = one_step(weight, still, weight_decay=0.1)
    assert (reference < 0).all()
    assert torch.equal(one_step(weight, still, weight_decay=0.1, separate_norms=True), still)


def test_clipping_makes_the_rate_a_cap() -> None:
    weight, grad = torch.randn(2, 3, 4, dtype=torch.float64)
    trust = 0.02 * weight.norm() / (grad.norm() + 1e-8)
    values = {"eta": 0.02, "separate_norms": True, "clip_lr": True}
    torch.testing.assert_close(one_step(weight, grad, lr=100.0, **values), -trust * grad)
    torch.testing.assert_close(one_step(weight, grad, lr=1e-4, **values), -1e-4 * grad)
    assert torch.equal(one_step(weight, grad, lr=0.0, **values), torch.zeros_like(weight))


def test_momentum_adds_up_past_steps() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = LARS([{"params": [parameter], "adapt": False}], lr=0.1, momentum=0.5, weight_decay=9.0)
    seen = [0.0]
    for _ in range(3):
        parameter.grad = torch.ones(1)
        optimizer.step()
        seen.append(parameter.item())
    assert [b - a for a, b in pairwise(seen)] == pytest.approx([-0.1, -0.15, -0.175])


def test_a_restored_optimizer_goes_on_as_if_never_stopped() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = LARS([weight], lr=0.5)
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    twin = nn.Parameter(weight.detach().clone())
    restored = LARS([twin], lr=0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight.grad = twin.grad = torch.randn(3, 4)
    optimizer.step()
    restored.step()
    assert torch.equal(weight, twin)


DIALECTS: list[dict[str, Any]] = [
    {},
    {"separate_norms": True},
    {"lr_in_buffer": True},
    {"separate_norms": True, "clip_lr": True},
    {"clip_lr": True},
]


def tensors_of_all_layouts() -> list[nn.Parameter]:
    """Parameters of several shapes and memory layouts, with gradients, and some with a norm of zero."""
    tensors = [torch.randn(4, 3, 3, 3), torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)]
    tensors += [torch.randn(7, 5).T, torch.randn(6), torch.zeros(3, 2), torch.randn(1, 1)]
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters[3].grad = torch.zeros(6)
    parameters[1].grad = parameters[1].grad.contiguous()
    return parameters


def loop(parameters: list[nn.Parameter], buffers: list[Tensor], lr: float, dialect: dict[str, Any]) -> None:
    """One step of LARS, one tensor after another."""
    separate, inside, clip = (dialect.get(key, False) for key in ("separate_norms", "lr_in_buffer", "clip_lr"))
    for weight, buffer in zip(parameters, buffers, strict=True):
        grad, length = weight.grad, torch.linalg.vector_norm(weight)
        decayed = grad.add(weight, alpha=1e-2)
        other = torch.linalg.vector_norm(grad if separate else decayed)
        trust = 0.02 * length / (other + 1e-2 * length + 1e-8 if separate else other)
        trust = (trust / lr).clamp(max=1.0) if clip else trust
        usable = length > 0 and other > 0
        step = decayed * trust if usable else grad if separate else decayed
        buffer.mul_(0.9).add_(step, alpha=lr if inside else 1.0)
        weight.sub_(buffer, alpha=1.0 if inside else lr)


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_all_tensors_together_take_the_steps_of_a_loop(
    dialect: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "other":
        monkeypatch.setattr(optim, "scaled", optim.scaled_together)
    together = tensors_of_all_layouts()
    alone = copy.deepcopy(together)
    for one, other in zip(alone, together, strict=True):
        one.grad = other.grad
    optimizer = LARS(together, lr=1.0, weight_decay=1e-2, eta=0.02, **dialect)
    buffers = [torch.zeros_like(parameter) for parameter in alone]
    for lr in (0.3, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            loop(alone, buffers, lr, dialect)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


class Kernels(TorchDispatchMode):
    """Counts operations that are not views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_the_number_of_kernels_does_not_grow_with_the_number_of_tensors(dialect: dict[str, Any]) -> None:
    counts = []
    for number in (2, 50):
        layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(number)]
        net = nn.Sequential(*layers).to("meta")
        optimizer = LARS(parameter_groups(net, weight_decay=0.1), lr=0.1, **dialect)
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # allocates the momentum buffers
        with Kernels() as kernels:
            optimizer.step()
        counts.append(kernels.count)
    assert counts[0] == counts[1] < 40


def test_parameters_of_several_dtypes_are_updated_by_one_optimizer() -> None:
    parameters = [nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    LARS(parameters, lr=0.5).step()
    torch.testing.assert_close(parameters[0].double(), parameters[1])


def test_parameters_without_gradient_stay() -> None:
    moved, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.ones(2, 2)
    LARS([moved, still], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still.data, torch.ones(2, 2))
    assert not torch.equal(moved.data, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "eta"])
def test_negative_values_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1, but LARS needs it to be at least 0"):
        LARS([nn.Parameter(torch.ones(1))], **({"lr": 0.1} | {name: -1}))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LayerNorm(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def names_in(net: nn.Module, group: dict[str, Any]) -> set[str]:
    return {name for name, p in net.named_parameters() if any(p is other for other in group["params"])}


def test_biases_norms_and_tokens_are_neither_decayed_nor_adapted() -> None:
    net = Net()
    decayed, plain = parameter_groups(net, weight_decay=0.1)
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
    assert names_in(net, decayed) == {"body.0.weight"}
    rest = {"body.0.bias", "body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias"}
    assert names_in(net, plain) == rest | {"pos_embed", "cls_token", "mask_token"}


def test_everything_trainable_is_decayed_where_a_recipe_says_so() -> None:
    net = Net()
    (group,) = parameter_groups(net, weight_decay=0.1, decay_norm_and_bias=True)
    assert names_in(net, group) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert group["weight_decay"] == 0.1


def test_a_net_without_biases_has_one_group() -> None:
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)
    assert group["weight_decay"] == 0.1


def test_a_method_may_say_its_own_groups() -> None:
    class Own(Method):
        def param_groups(self) -> list[dict[str, Any]]:
            weight, bias = self.backbone.parameters()
            return [{"params": [weight], "lr_scale": 0.1}, {"params": [bias], "weight_decay": 0.0}]

    method = Own(nn.Linear(2, 2))
    weights, biases = method.param_groups()
    assert parameter_groups(method, weight_decay=0.1) == [weights | {"wd_scale": 1.0}, biases]


class Slow(Method):
    """A method whose head has options of its own, and one of its layers others."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.heading = nn.Linear(2, 2)

    def group_options(self) -> dict[str, GroupOptions]:
        return {"head": {"lr_scale": 0.5, "wd_scale": 0.1}, "head.1": {"constant_lr": True}}


def test_options_split_the_groups_of_a_method() -> None:
    method = Slow(nn.Linear(2, 2))
    groups = parameter_groups(method, weight_decay=0.2)
    found = [(sorted(names_in(method, group)), {k: v for k, v in group.items() if k != "params"}) for group in groups]
    common = {"lr_scale": 0.5, "wd_scale": 0.1}
    assert found == [
        (["backbone.weight", "heading.weight"], {"weight_decay": 0.2, "wd_scale": 1.0, "adapt": True}),
        (["backbone.bias", "heading.bias"], {"weight_decay": 0.0, "wd_scale": 0.0, "adapt": False}),
        (["head.0.weight"], common | {"weight_decay": pytest.approx(0.02), "adapt": True}),
        (["head.0.bias"], common | {"weight_decay": 0.0, "wd_scale": 0.0, "adapt": False}),
        (["head.1.weight"], {"constant_lr": True, "weight_decay": 0.2, "wd_scale": 1.0, "adapt": True}),
        (["head.1.bias"], {"constant_lr": True, "weight_decay": 0.0, "wd_scale": 0.0, "adapt": False}),
    ]
    assert len(parameter_groups(method, weight_decay=0.2, decay_norm_and_bias=True)) == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, LARS])
def test_a_frozen_group_is_neither_changed_nor_decayed_and_gets_no_state(kind: Any) -> None:
    method = Slow(nn.Linear(2, 2))
    optimizer = kind(parameter_groups(method, weight_decay=0.2), lr=0.1)
    optimizer.param_groups[2]["is_frozen"] = True
    before = copy.deepcopy(method.state_dict())
    sum(p.square().sum() for p in method.parameters()).backward()
    drop_frozen_gradients(optimizer)
    optimizer.step()
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {"head.0.weight"}
    assert method.head[0].weight not in optimizer.state


def test_a_method_that_does_not_train_a_backbone_and_heads_has_no_frozen_backbone() -> None:
    method = Slow(nn.Linear(2, 2))
    groups = freeze_backbone(parameter_groups(method, weight_decay=0.2), method, epochs=0.5)
    frozen = [name for group in groups if group.get("frozen_epochs") for name in names_in(method, group)]
    assert frozen == ["backbone.weight", "backbone.bias"]
    assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))
    for parameters, expected in ((method.backbone, "only its backbone"), (method.head, "not train its backbone")):
        with pytest.raises(ConfigError, match=expected):
            freeze_backbone([{"params": parameters.parameters()}], method, epochs=1)


def test_groups_suit_torch_optimizers_and_lars_alike() -> None:
    for kind in (torch.optim.SGD, torch.optim.AdamW, LARS):
        optimizer = kind(parameter_groups(Net(), weight_decay=0.1), lr=0.1)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("before", "now"), [(True, None), (None, True)])
def test_a_step_is_computed_as_this_run_does_it(
    kind: type[torch.optim.Optimizer], before: bool | None, now: bool | None
) -> None:
    """Steps of other processes, sharded or not, go on: the state of each fits the other, in the order of its memory."""

    def built(fused: bool | None, layout: torch.memory_format) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = torch.linspace(-1, 1, 4 * 6 * 3 * 3).view(4, 6, 3, 3).contiguous(memory_format=layout)
        parameter = nn.Parameter(weight)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return parameter, kind([parameter], lr=0.1, weight_decay=0.1, fused=fused, **options)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = (parameter.detach() + torch.arange(3.0)).clone(memory_format=torch.preserve_format)
        optimizer.step()

    one, first = built(before, torch.contiguous_format)
    other, second = built(now, torch.channels_last)
    step(one, first)
    with torch.no_grad():
        other.copy_(one)
    load_optimizer(second, copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["fused"] == now
    step(one, first)
    step(other, second)
    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_overflow_in_the_first_step_leaves_no_arbitrary_momentum(
    monkeypatch: pytest.MonkeyPatch, momentum: float
) -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, fused=True)
    # Memory that was not initialized may contain anything. Here it contains NaN.
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan")))
    zero_momentum(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(weight.detach(), torch.full((8, 8), 0.9))


def test_momentum_of_zeros_changes_no_step() -> None:
    weights = []
    for initialized in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
        if initialized:
            zero_momentum(optimizer)
        for _ in range(3):
            weight.grad = weight.detach().sin()
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
