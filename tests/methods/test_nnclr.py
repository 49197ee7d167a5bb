from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair, my_half
from sslcli.methods.nnclr import NNCLR, nearest, neighbor_contrast
from sslcli.methods.simclr import nt_xent
from sslcli.nn.queue import enqueue
from tiny import TinyNet, make_batch


def tiny_nnclr(**changes: float) -> NNCLR:
    values = {"num_images": 40, "dim": 4, "hidden": 10, "predictor_hidden": 12, "queue_size": 12, "temperature": 0.5}
    return NNCLR(TinyNet(), **(values | changes))  # type: ignore[arg-type]


@golden_cases("nnclr_a")
def test_neighbors_loss_and_queue_equal_public_code(case: Case) -> None:
    x, temperature = case.inputs, case.params["temperature"]
    p1, p2 = x["p1"].requires_grad_(), x["p2"].requires_grad_()
    first, second = nearest(x["z1"], x["queue0"]), nearest(x["z2"], x["queue0"])
    assert first.tolist() == case.outputs["idx1"].tolist()
    assert second.tolist() == case.outputs["idx2"].tolist()
    queue = x["queue0"]
    loss = (
        neighbor_contrast(queue[first], p2, temperature=temperature).loss
        + neighbor_contrast(queue[second], p1, temperature=temperature).loss
    ) / 2
    loss.backward()
    case.check(loss, "loss")
    case.check(p1.grad, "grad_p1")
    case.check(p2.grad, "grad_p2")
    enqueue(queue, torch.tensor(0), x["z1"])
    case.check(queue, "queue")


@golden_cases("nnclr_steps")
def test_steps_equal_public_code(case: Case) -> None:
    x, temperature = case.inputs, case.params["temperature"]
    queue, labels, head = x["queue0"], x["queue_y0"], torch.tensor(0)
    label_head = torch.tensor(0)
    for step in range(case.params["steps"]):
        z1, z2 = (F.normalize(x[name][step], dim=1) for name in ("z1", "z2"))
        p1, p2 = (x[name][step].clone().requires_grad_() for name in ("p1", "p2"))
        first, second = nearest(z1, queue), nearest(z2, queue)
        loss = (
            neighbor_contrast(queue[first], p2, temperature=temperature).loss
            + neighbor_contrast(queue[second], p1, temperature=temperature).loss
        ) / 2
        loss.backward()
        agreement = (labels[first] == x["y"][step]).double().mean()
        enqueue(queue, head, z1)
        enqueue(labels[:, None], label_head, x["y"][step][:, None])
        tolerance = {"rtol": case.entry["rtol"], "atol": case.entry["atol"], "check_dtype": False}
        found = {"loss": loss, "idx1": first, "idx2": second, "nn_acc": agreement, "queue": queue, "queue_y": labels}
        for name, value in (found | {"ptr": head, "grad_p1": p1.grad, "grad_p2": p2.grad}).items():
            assert value is not None
            torch.testing.assert_close(value.detach(), case.outputs[name][step], **tolerance)


def test_a_queue_of_the_batch_itself_gives_the_cross_view_terms_of_simclr() -> None:
    z1, z2 = F.normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=2)
    queue = torch.cat([z1, z2])
    n1, n2 = queue[nearest(z1, queue)], queue[nearest(z2, queue)]
    loss = neighbor_contrast(n1, z2, temperature=0.3).loss + neighbor_contrast(n2, z1, temperature=0.3).loss
    logits = z1 @ z2.T / 0.3
    target = torch.arange(6)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    assert float(loss) / 2 < float(nt_xent(z1, z2, temperature=0.3).loss)  # which also has negatives of the same view


def test_neighbors_do_not_depend_on_the_precision_of_the_run() -> None:
    """Early in a run, all embeddings share a large mean. In 16 bits, their inner products are then equal."""
    mean = F.normalize(torch.randn(64), dim=0)
    queue = F.normalize(10 * mean + F.normalize(torch.randn(500, 64), dim=1), dim=1)
    z = F.normalize(10 * mean + F.normalize(torch.randn(20, 64), dim=1), dim=1)
    expected = (z.double() @ queue.T.double()).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(z, queue), expected)


def test_neighbors_are_searched_before_the_batch_is_enqueued() -> None:
    method, batch = tiny_nnclr(), make_batch()
    before = method.queue.clone()
    method(batch)
    assert torch.equal(method.queue, before)
    assert method.new_keys[0].shape == (8, 4)
    method.after_step(0.0)
    torch.testing.assert_close(method.queue[:8], method.embeddings[0])
    assert torch.equal(method.queue[8:], before[8:])
    method(batch)
    method.after_step(0.0)
    torch.testing.assert_close(method.queue[8:], method.embeddings[0][:4])
    torch.testing.assert_close(method.queue[:4], method.embeddings[0][4:])  # the oldest rows are overwritten first
    assert int(method.queue_head) == 4


def test_queue_holds_half_of_the_images_by_default() -> None:
    assert tiny_nnclr(queue_size=None).queue_length == 20  # type: ignore[arg-type]
    assert NNCLR(TinyNet(), num_images=10**6, dim=1, hidden=2, predictor_hidden=2).queue_length == 65536


def test_heads_have_the_layers_of_public_code() -> None:
    method = tiny_nnclr()
    linear = [layer for layer in method.projector if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8, 10), (10, 10), (10, 4)]
    assert isinstance(method.projector[-1], nn.modules.batchnorm._BatchNorm)
    assert method.projector[-1].affine
    assert [(m.in_features, m.out_features) for m in method.predictor if isinstance(m, nn.Linear)] == [(4, 12), (12, 4)]
    assert isinstance(method.predictor[-1], nn.Linear)


def contrast_of_my_half(n: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    part = my_half(p).requires_grad_()
    loss = neighbor_contrast(my_half(n), part, temperature=0.2).loss
    loss.backward()
    assert part.grad is not None
    return loss.detach(), part.grad / 2  # processes average their gradients


def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    n, p = torch.randn(2, 6, 4, dtype=torch.float64)
    (loss1, grad1), (loss2, grad2) = pair.run(contrast_of_my_half, n, p)
    p.requires_grad_()
    whole = neighbor_contrast(n, p, temperature=0.2).loss
    whole.backward()
    torch.testing.assert_close((loss1 + loss2) / 2, whole.detach())
    torch.testing.assert_close(torch.cat([grad1, grad2]), p.grad)


@pytest.mark.parametrize(("changes", "message"), [({"queue_size": 0}, "queue_size"), ({"temperature": 0.0}, "temper")])
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_nnclr(**changes)
