"""FSDP and activation checkpointing give the results of one process without them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from processes import Pair
from small_runs import differences
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.vit import Block, VisionTransformer
from sslcli.distributed import collectives
from sslcli.engine import fsdp
from sslcli.engine.clipping import clip_gradients
from sslcli.engine.loop import gradient_sync, parallel
from sslcli.engine.optim import LARS, parameter_groups
from sslcli.errors import ConfigError
from sslcli.methods.base import Batch, Method
from sslcli.methods.byol import BYOL
from sslcli.methods.dcgan import DCGAN
from sslcli.methods.moco_v3 import MoCoV3
from sslcli.methods.simclr import SimCLR
from tiny import make_batch, mine, vit

CPU = torch.device("cpu")
METHODS = {"simclr": {}, "byol": {"hidden": 32}, "moco_v3": {"hidden": 32}}


class Regression(Method):
    """Features to fixed numbers: nothing here makes much of a rounding error, as BatchNorm over like images does."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (self.backbone(batch.views[0]) - torch.linspace(-1, 1, 16)).square().mean()}


def build(word: str, backbone: nn.Module | None = None) -> Method:
    torch.manual_seed(0)
    net = vit(frozen_patch_projection=True) if backbone is None else backbone
    if word == "regression":
        return Regression(net)
    kind = {"simclr": SimCLR, "byol": BYOL, "moco_v3": MoCoV3}[word]
    return kind(net, dim=12, **METHODS[word]).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Plan:
    """How to train for a few steps."""

    method: str = "byol"
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float64
    precision: str = "fp32"
    accumulate: int = 1
    clip: float | None = None
    clip_by: str = "all"
    recompute: bool = False
    backbone: dict[str, Any] = field(default_factory=dict)


def trained(plan: Plan) -> tuple[list[float], dict[str, Tensor]]:
    """Losses by step and the state after the last, of whole tensors, of four steps on all processes there are."""
    method = build(plan.method, vit(**plan.backbone)).to(plan.dtype)
    if plan.recompute:
        fsdp.recompute(method)
    if collectives.world_size() > 1:
        fsdp.shard(method, CPU, plan.precision)
    groups = parameter_groups(method, weight_decay=0.01)
    optimizer = LARS(groups, lr=0.3) if plan.optimizer == "lars" else torch.optim.AdamW(groups, lr=1e-3)
    model, losses = parallel(method, CPU), []
    for step in range(4):
        total = torch.zeros(())
        for part in range(plan.accumulate):
            batch = mine(make_batch(8, seed=step * plan.accumulate + part, dtype=plan.dtype))
            enabled = plan.precision == "bf16"
            with gradient_sync(model, is_last=part == plan.accumulate - 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss = model(batch)["loss"] / plan.accumulate
                loss.backward()
            total = total + loss.detach()
        if plan.clip is not None:
            clip_gradients(method, plan.clip, by=plan.clip_by)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step / 4)
        losses.append(float(collectives.all_reduce_mean(total)))
    return losses, {name: collectives.whole(value).detach() for name, value in method.state_dict().items()}


PLANS = [
    *(Plan(method=word, optimizer=optimizer) for word in METHODS for optimizer in ("adamw", "lars")),
    Plan(accumulate=2),
    *(Plan(clip=0.05, clip_by=by) for by in ("all", "tensor", "module")),
    Plan(recompute=True),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_sharded_over_two_processes_a_vit_trains_like_one_process(plan: Plan, pair: Pair) -> None:
    losses, state = trained(plan)
    first, second = pair.run(trained, plan)
    assert differences(first, second) == []
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(first[0], losses, **close)
    torch.testing.assert_close(first[1], state, **close)


def test_losses_in_single_precision_are_those_of_one_process(pair: Pair) -> None:
    plan = Plan(dtype=torch.float32)
    torch.testing.assert_close(pair.run(trained, plan)[0][0], trained(plan)[0], rtol=1e-6, atol=0)


def test_blocks_in_bfloat16_train_nearly_alike(pair: Pair) -> None:
    # LARS, since AdamW's first update is the sign of each gradient: a rounding error turns those near zero around
    plan = Plan(method="regression", dtype=torch.float32, optimizer="lars")
    (losses, state), _ = pair.run(trained, replace(plan, precision="bf16"))
    torch.testing.assert_close(losses, trained(plan)[0], rtol=0.01, atol=0)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def held() -> tuple[int, int, set[torch.dtype]]:
    method = build("byol")
    whole = sum(parameter.numel() for parameter in method.parameters())
    fsdp.shard(method, CPU, "bf16")
    seen: set[torch.dtype] = set()
    method.backbone.blocks[0].mlp.fc1.register_forward_pre_hook(lambda module, _: seen.add(module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        method(mine(make_batch(8)))["loss"].backward()
    return whole, sum(collectives.local(parameter).numel() for parameter in method.parameters()), seen


def test_each_process_holds_about_half_and_computes_blocks_in_bfloat16(pair: Pair) -> None:
    (whole, first, seen), (_, second, _) = pair.run(held)
    assert first + second == whole
    assert first == pytest.approx(whole / 2, rel=0.02)  # a tensor of odd or one row cannot be halved
    assert seen == {torch.bfloat16}


def seen_by_probes() -> list[Tensor]:
    method = build("byol").double().eval()
    images = make_batch(4, dtype=torch.float64).views[0]
    with torch.no_grad():
        expected = method.features(images)
    fsdp.shard(method, CPU, "fp32")
    method.train()
    method(mine(make_batch(8, dtype=torch.float64)))["loss"].backward()
    method.eval()
    with torch.no_grad(), fsdp.gathered(method):
        found = method.features(images)
    held = sum(collectives.local(parameter).numel() for parameter in method.parameters())
    return [found, expected, torch.tensor(held)]


def test_features_are_read_outside_of_forward_and_parameters_given_back(pair: Pair) -> None:
    (found, expected, first), (_, _, second) = pair.run(seen_by_probes)
    torch.testing.assert_close(found, expected)
    assert first + second == sum(parameter.numel() for parameter in build("byol").parameters())


def test_one_process_is_not_sharded() -> None:
    method = build("simclr")
    assert not fsdp.is_sharded(method)
    assert parallel(method, CPU) is method


def test_blocks_are_the_innermost_repeated_parts() -> None:
    net = vit()
    assert fsdp.blocks(net) == list(net.blocks)
    resnet = ResNet("resnet18", image_size=8)
    assert fsdp.blocks(resnet) == [*resnet.layer1, *resnet.layer2, *resnet.layer3, *resnet.layer4]
    assert fsdp.blocks(Small(image_size=16, width=4)) == []


def test_blocks_of_timm_are_found() -> None:
    timm = pytest.importorskip("timm")
    vits = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=16, num_heads=2)
    assert fsdp.blocks(vits) == list(vits.blocks)
    convnext = timm.create_model("convnext_atto", depths=(2, 2, 2, 2), dims=(4, 8, 8, 8))
    assert fsdp.blocks(convnext) == [block for stage in convnext.stages for block in stage.blocks]


def backbones() -> list[nn.Module]:
    timm = pytest.importorskip("timm")
    convnext = timm.create_model("convnext_atto", depths=(2, 2, 2, 2), dims=(4, 8, 8, 8), num_classes=0)
    norms = timm.create_model("resnet18", num_classes=0, drop_path_rate=0.3)
    convnext.num_features = 8
    return [vit(drop_path=0.5), ResNet("resnet18", image_size=8), convnext, norms]


@pytest.mark.parametrize("number", range(4), ids=["vit", "resnet", "timm_convnext", "timm_resnet"])
def test_blocks_computed_again_give_the_same_gradients_and_move_statistics_once(number: int) -> None:
    size = 8 if number < 2 else 32
    plain = build("byol", backbones()[number]).double()
    again = copy.deepcopy(plain)
    fsdp.recompute(again)
    calls: list[int] = []
    block = fsdp.blocks(again.backbone)[0]
    next(block.children()).register_forward_hook(lambda *_: calls.append(1))
    for method in (plain, again):
        torch.manual_seed(1)  # of the paths that are dropped
        method(make_batch(4, size=size, dtype=torch.float64))["loss"].backward()
    assert len(calls) == 4, "two views, each computed twice"
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (plain, again)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    assert differences(again.state_dict(), plain.state_dict()) == []  # statistics and counts of batches too


def test_computing_again_keeps_less() -> None:
    """Bytes that autograd keeps between forward and backward, by activations that blocks make."""
    kept = []
    for wanted in (False, True):
        method = build("simclr", VisionTransformer(image_size=8, patch_size=2, width=32, depth=6, num_heads=2))
        if wanted:
            fsdp.recompute(method)
        parameters = {parameter.data_ptr() for parameter in method.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved, parameters: set[int] = parameters) -> Tensor:
            if tensor.data_ptr() not in parameters:
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method(make_batch(8))["loss"]
        kept.append(sum(saved.values()))
        loss.backward()
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (lambda: build("simclr", Small(image_size=16, width=4)), "Small has no repeated blocks"),
        (lambda: DCGAN(vit(), image_size=8, width=8), "replaces parameters of its networks"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(method: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        fsdp.recompute(method())


def test_frozen_copies_keep_nothing_and_are_not_computed_again() -> None:
    method = build("byol")
    fsdp.recompute(method)
    assert all("forward" in vars(block) for block in method.backbone.modules() if isinstance(block, Block))
    assert not any("forward" in vars(block) for block in method.target_backbone.modules())
