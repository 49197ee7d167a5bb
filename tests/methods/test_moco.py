from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from sslcli.methods.base import Batch
from sslcli.methods.moco import MoCo
from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm
from sslcli.nn.contrastive import info_nce
from sslcli.nn.queue import enqueue
from tiny import TinyNet, make_batch


def tiny_moco(*, norm: bool = True, **changes: object) -> MoCo:
    return MoCo(TinyNet(norm=norm), **({"dim": 4, "queue_size": 12, "bn_group": 4, "temperature": 0.2} | changes))


@golden_cases("moco_logits")
def test_loss_and_gradient_equal_the_official_code(case: Case) -> None:
    x = case.inputs
    q = x["q"].requires_grad_()
    k, queue = F.normalize(x["k"], dim=1), x["queue"].T.contiguous()
    info_nce(F.normalize(q, dim=1), k, queue, temperature=case.params["temperature"]).loss.backward()
    case.check(info_nce(F.normalize(q, dim=1), k, queue, temperature=case.params["temperature"]).loss, "loss")
    case.check(q.grad, "grad_q")
    query = F.normalize(q, dim=1)
    logits = torch.cat([(query * k).sum(1, keepdim=True), query @ queue.T], 1) / case.params["temperature"]
    case.check(logits, "logits")
    head = torch.tensor(0)
    enqueue(queue, head, k)
    case.check(queue.T, "queue_after")
    case.check(head[None], "ptr_after")


@golden_cases("moco_steps")
def test_training_takes_the_steps_of_the_official_loop(case: Case) -> None:
    x, params = case.inputs, case.params
    width, pixels = x["W0"].shape
    linear = nn.Linear(pixels, width, bias=False, dtype=case.dtype)
    linear.weight.data.copy_(x["W0"])
    linear.num_features = width
    settings = {name: params[name] for name in ("temperature", "momentum")}
    method = MoCo(linear, dim=width, queue_size=params["K"], **settings)
    method.head, method.momentum_head = nn.Identity(), nn.Identity()
    method.queue = x["queue0"].T.contiguous()
    optimizer = torch.optim.SGD(linear.parameters(), lr=params["lr"])
    losses, weights, key_weights, queues, heads = [], [], [], [], []
    for im_q, im_k in zip(x["im_q"], x["im_k"], strict=True):
        key_weights.append(method.momentum_backbone.weight.clone())  # the official update comes before the forward
        loss = method(Batch([im_q, im_k], torch.arange(len(im_q)), torch.zeros(len(im_q))))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.0)
        losses.append(loss)
        weights.append(linear.weight.clone())
        queues.append(method.queue.T.clone())
        heads.append(method.queue_head.clone())
    case.check(losses, "losses")
    case.check(weights, "W_q")
    case.check(key_weights, "W_k")
    case.check(queues, "queue")
    case.check(heads, "ptr")


def test_loss_is_the_cross_entropy_of_the_own_key_before_the_whole_queue() -> None:
    method, batch = tiny_moco(norm=False), make_batch(6)
    q, k = method.projection(batch.views[0]), method.momentum_head(method.momentum_backbone(batch.views[1]))
    expected = 0.0
    for i in range(6):
        query = q[i] / q[i].norm()
        logits = [query @ (k[i] / k[i].norm()) / 0.2, *(query @ key / 0.2 for key in method.queue)]
        expected += F.cross_entropy(torch.stack(logits)[None], torch.tensor([0])) / 6
    torch.testing.assert_close(method(batch)["loss"], expected, rtol=1e-5, atol=1e-6)


def test_forward_leaves_queue_and_key_encoder_as_they_are_and_after_step_moves_both() -> None:
    method = tiny_moco()
    queue, weights = method.queue.clone(), [p.clone() for p in method.momentum_head.parameters()]
    method(make_batch())["loss"].backward()
    with torch.no_grad():
        for parameter in method.head.parameters():
            parameter.add_(1.0)
    assert torch.equal(method.queue, queue)
    assert all(torch.equal(a, b) for a, b in zip(weights, method.momentum_head.parameters(), strict=True))
    keys = method.embeddings[1]
    method.after_step(0.0)
    assert torch.equal(method.queue[:8], keys)
    assert torch.equal(method.queue[8:], queue[8:])
    assert not any(torch.equal(a, b) for a, b in zip(weights, method.momentum_head.parameters(), strict=True))


def test_queue_starts_with_directions_and_stays_on_the_unit_sphere() -> None:
    method = tiny_moco()
    for seed in range(3):
        torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(12))
        method(make_batch(seed=seed))
        method.after_step(0.0)


def test_keys_of_every_micro_batch_reach_the_queue_in_order() -> None:
    method = tiny_moco(norm=False)
    keys = []
    for seed in (1, 2):
        method(make_batch(4, seed=seed))
        keys.append(method.embeddings[1])
    method.after_step(0.0)
    assert torch.equal(method.queue[:8], torch.cat(keys))
    assert int(method.queue_head) == 8
    method.after_step(0.0)  # nothing is left to be enqueued twice
    assert int(method.queue_head) == 8


def test_key_encoder_is_the_weighted_sum_of_all_past_query_encoders() -> None:
    method, momentum, steps = tiny_moco(momentum=0.7), 0.7, 5
    start = [p.clone() for p in method.backbone.parameters()]
    past = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in method.backbone.parameters():
                parameter.add_(torch.randn_like(parameter))
        past.append([p.clone() for p in method.backbone.parameters()])
        method.after_step(0.0)
    for number, key in enumerate(method.momentum_backbone.parameters()):
        expected = momentum**steps * start[number]
        for i, weights in enumerate(past, start=1):
            expected = expected + (1 - momentum) * momentum ** (steps - i) * weights[number]
        torch.testing.assert_close(key, expected)


def test_the_momentum_rises_to_its_final_value_by_a_cosine() -> None:
    method, total = tiny_moco(momentum=0.6, final_momentum=0.9), 4
    expected = method.head[0].weight.detach().clone()
    for step in range(total):
        with torch.no_grad():
            method.head[0].weight.add_(torch.randn(4, 8))
        method.after_step(step / total)
        momentum = 0.9 - (0.9 - 0.6) * (1 + math.cos(math.pi * step / total)) / 2
        assert method.scheduled(step / total) == {"EMA momentum": pytest.approx(momentum)}
        expected = momentum * expected + (1 - momentum) * method.head[0].weight.detach()
        torch.testing.assert_close(method.momentum_head[0].weight.data, expected)
    assert method.scheduled(0.0)["EMA momentum"] == pytest.approx(0.6)
    assert method.scheduled(1.0)["EMA momentum"] == pytest.approx(0.9)


def test_the_momentum_is_constant_by_default() -> None:
    assert tiny_moco().scheduled(0.5) == {}


def test_keys_take_no_gradient() -> None:
    method = tiny_moco(symmetric=True)
    method(make_batch())["loss"].backward()
    frozen = [*method.momentum_backbone.parameters(), *method.momentum_head.parameters()]
    assert frozen
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    assert all(p.grad is not None for p in [*method.backbone.parameters(), *method.head.parameters()])
    assert not method.queue.requires_grad


def test_heads_are_those_of_the_papers() -> None:
    def layers(head: nn.Sequential) -> list[tuple]:
        return [
            (type(m), *m.weight.shape, m.bias is not None) if isinstance(m, nn.Linear) else (type(m),) for m in head
        ]

    assert layers(tiny_moco().head) == [(nn.Linear, 4, 8, True)]
    v2 = [(nn.Linear, 8, 8, True), (nn.ReLU,), (nn.Linear, 4, 8, True)]
    assert layers(tiny_moco(mlp_head=True).head) == v2
    assert layers(tiny_moco(mlp_head=True).momentum_head) == v2
    wide = [(nn.Linear, 16, 8, True), (nn.ReLU,), (nn.Linear, 4, 16, True)]
    assert layers(tiny_moco(mlp_head=True, hidden=16).head) == wide
    assert layers(tiny_moco(mlp_head=True, hidden=16).momentum_head) == wide


def test_symmetric_loss_is_the_mean_of_both_directions_and_both_keys_are_enqueued() -> None:
    method, batch = tiny_moco(norm=False, symmetric=True), make_batch(4)
    one_way = tiny_moco(norm=False)
    one_way.load_state_dict(method.state_dict())
    there, back = one_way(batch), one_way(Batch(batch.views[::-1], batch.index, batch.label))
    k2, k1 = one_way.new_keys
    both = method(batch)
    for name in ("loss", "accuracy"):
        torch.testing.assert_close(both[name], (there[name] + back[name]) / 2)
    method.after_step(0.0)
    torch.testing.assert_close(method.queue[:8], torch.cat([k1, k2]))
    assert int(method.queue_head) == 8


def test_keys_without_batchnorm_do_not_feel_the_shuffling() -> None:
    method, images = tiny_moco(norm=False), make_batch().views[1]
    plain = F.normalize(method.momentum_head(method.momentum_backbone(images)), dim=1)
    torch.testing.assert_close(method.encode_keys(images), plain)


def test_batchnorm_sees_keys_in_shuffled_groups_and_queries_in_order() -> None:
    method, images = tiny_moco(), make_batch().views[1]
    query_parts, key_parts = (
        [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for net in (method.backbone, method.momentum_backbone)
    )
    assert all(isinstance(m, SplitBatchNorm) and m.group == 4 for m in query_parts + key_parts)
    assert query_parts
    assert key_parts
    seen: list[Tensor] = []
    hook = method.momentum_backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    keys = method.encode_keys(images)
    hook.remove()
    order = [int((images == row).flatten(1).all(1).nonzero()) for row in seen[0]]
    assert sorted(order) == list(range(8))
    assert order != sorted(order)
    convert_back(method.momentum_backbone)
    groups = [images[order][:4], images[order][4:]]
    expected = torch.cat(
        [F.normalize(method.momentum_head(method.momentum_backbone(group)), dim=1) for group in groups]
    )
    torch.testing.assert_close(keys, expected[torch.tensor(order).argsort()], rtol=1e-4, atol=1e-5)


def test_without_groups_batchnorm_sees_the_whole_batch_and_shuffling_has_no_effect() -> None:
    method, images = tiny_moco(bn_group=None), make_batch().views[1]
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(m) is SyncBatchNorm for m in norms)
    plain = F.normalize(method.momentum_head(method.momentum_backbone(images)), dim=1)
    torch.testing.assert_close(method.encode_keys(images), plain, rtol=1e-4, atol=1e-5)
    method(make_batch())["loss"].backward()
    method.after_step(0.0)
    assert not torch.allclose(plain, tiny_moco().encode_keys(images), atol=1e-3)


def convert_back(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, SplitBatchNorm):
            part.__class__ = nn.BatchNorm2d


def test_every_shuffle_has_its_own_order_which_a_saved_run_continues() -> None:
    method, images = tiny_moco(), make_batch(16).views[1]
    method.encode_keys(images)
    saved = method.state_dict()
    again = tiny_moco()
    again.load_state_dict(saved)
    first, second = method.encode_keys(images), method.encode_keys(images)
    assert not torch.allclose(first, second, atol=1e-4)
    assert torch.equal(again.encode_keys(images), first)
    assert torch.equal(again.encode_keys(images), second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue_size": 0}, "queue_size is 0"),
        ({"bn_group": 1}, "bn_group is 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"momentum": 0.9, "final_momentum": 0.8}, "final_momentum is 0.8, .* choose a value from 0.9 to 1"),
        ({"hidden": 8}, "hidden is 8, but a linear head has no hidden layer: set mlp_head=true"),
        ({"mlp_head": True, "hidden": 0}, "hidden is 0, but the hidden layer of the head must have at least one unit"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_moco(**changes)


def test_effective_values_tell_negatives_and_the_images_batchnorm_sees() -> None:
    assert tiny_moco().effective(32) == {"negatives per query": 12, "images per BatchNorm group": "4"}
    assert tiny_moco(norm=False).effective(32)["images per BatchNorm group"] == "no BatchNorm"
    assert tiny_moco(bn_group=None).effective(32)["images per BatchNorm group"] == "32 (all)"
