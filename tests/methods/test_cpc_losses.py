"""Losses of CPC and CPC v2."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.methods.cpc_losses import full_contrast, own_places, sampled_contrast

KINDS = ("v1", "v2")


def official_places(case: Case, step: int, rows: int) -> Tensor:
    """The negatives of a golden case, whose places count (row, column, image), as places (image, row, column)."""
    images, grid = case.params["N"], case.params["grid"]
    flat = case.inputs[f"neg_index_{step}"]
    row, column, image = flat // (grid * images), flat // images % grid, flat % images
    places = (image * rows + row) * grid + column
    return places.view(rows, grid, images, case.params["negatives"]).permute(2, 0, 1, 3)


@golden_cases("cpc")
def test_loss_and_gradients_of_sampled_negatives_equal_the_official_code(case: Case) -> None:
    z, c, weights = (case.inputs[name].requires_grad_() for name in ("z", "c", "W"))
    encodings, context = z.permute(0, 2, 3, 1), c.permute(0, 2, 3, 1)
    losses = []
    for step in range(1, case.params["pred_steps"] + 1):
        offset = step + case.params["skip_step"]
        targets = F.linear(encodings[:, offset:], weights[step - 1])
        rows = targets.shape[1]
        losses.append(sampled_contrast(context[:, :rows], targets, official_places(case, step, rows)).loss)
    loss = torch.stack(losses).mean()
    loss.backward()
    case.check(loss, "loss")
    case.check(losses, "loss_per_step")
    case.check(z.grad, "grad_z")
    case.check(c.grad, "grad_c")
    case.check(weights.grad, "grad_W")


def test_sampled_loss_is_the_explicit_cross_entropy_over_what_was_drawn() -> None:
    context, targets = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64)
    negative = torch.randint(12, (2, 2, 3, 5))
    pool = [targets[b, r, x] for b in range(2) for r in range(2) for x in range(3)]
    total, hits = 0.0, 0
    for b in range(2):
        for r in range(2):
            for x in range(3):
                own = float(context[b, r, x] @ targets[b, r, x])
                others = [float(context[b, r, x] @ pool[int(j)]) for j in negative[b, r, x]]
                total -= own - math.log(sum(math.exp(score) for score in (own, *others)))
                hits += own > max(others)
    loss, accuracy = sampled_contrast(context, targets, negative)
    assert float(loss) == pytest.approx(total / 12)
    assert float(accuracy) == pytest.approx(hits / 12)


def test_full_loss_is_the_explicit_cross_entropy_over_all_patches() -> None:
    """Return 2 images on a 4 x 4 grid with the paper's i = 1, i.e. targets two rows below."""
    offset, targets = 2, torch.randn(2, 4, 4, 5, dtype=torch.float64)
    prediction = torch.randn(2, 4 - offset, 4, 5, dtype=torch.float64)
    pool = [targets[b, r, x] for b in range(2) for r in range(4) for x in range(4)]
    total, places = 0.0, []
    for b in range(2):
        for r in range(4 - offset):
            for x in range(4):
                places.append(b * 16 + (r + offset) * 4 + x)
                scores = torch.stack([prediction[b, r, x] @ other for other in pool])
                total += float(F.cross_entropy(scores, torch.tensor(places[-1])))
                assert torch.equal(pool[places[-1]], targets[b, r + offset, x])
    assert own_places(2, 2, 4, offset=offset, device=torch.device("cpu")).tolist() == places
    assert float(full_contrast(prediction, targets, offset=offset).loss) == pytest.approx(total / 16, abs=1e-9)


def test_the_gradient_of_the_full_loss_reaches_positives_and_negatives() -> None:
    prediction = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    full_contrast(prediction, targets, offset=2).loss.backward()
    found = prediction.grad, targets.grad
    prediction.grad = targets.grad = None
    scores = prediction.flatten(0, 2) @ targets.flatten(0, 2).T
    F.cross_entropy(scores, own_places(2, 1, 3, offset=2, device=torch.device("cpu"))).backward()
    torch.testing.assert_close(found, (prediction.grad, targets.grad))


def test_a_hopeless_context_still_has_a_gradient() -> None:
    context = torch.full((1, 1, 1, 1), 100.0, requires_grad=True)
    targets = torch.tensor([[[[-1.0]]], [[[1.0]]]])
    loss, _ = sampled_contrast(context.expand(2, 1, 1, 1), targets, torch.tensor([1, 0]).view(2, 1, 1, 1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(100.0)  # log(softmax + 1e-11) would stop at 25.3 / 2
    assert context.grad is not None
    assert float(context.grad) == pytest.approx(1.0)


def losses_of_a_part(context: Tensor, targets: Tensor, negative: Tensor, prediction: Tensor) -> list[Tensor]:
    """Both losses and the gradient with respect to this process's targets, as averaged over processes."""
    half = len(targets) // 2
    rows = slice(torch.distributed.get_rank() * half, (torch.distributed.get_rank() + 1) * half)
    found = []
    for kind in KINDS:
        own = targets[rows].clone().requires_grad_()
        if kind == "v1":
            loss = sampled_contrast(context[rows], own, negative[rows]).loss
        else:
            loss = full_contrast(prediction[rows], own, offset=1).loss
        loss.backward()
        assert own.grad is not None
        found += [loss.detach(), own.grad / 2]
    return found


def test_two_processes_compute_the_losses_and_gradients_of_the_whole_batch(pair: Pair) -> None:
    context, targets = torch.randn(2, 4, 3, 3, 5, dtype=torch.float64)
    prediction = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    negative = torch.randint(4 * 9, (4, 3, 3, 6))
    first, second = pair.run(losses_of_a_part, context, targets, negative, prediction)
    for place, kind in enumerate(KINDS):
        whole = targets.clone().requires_grad_()
        if kind == "v1":
            loss = sampled_contrast(context, whole, negative).loss
        else:
            loss = full_contrast(prediction, whole, offset=1).loss
        loss.backward()
        torch.testing.assert_close((first[2 * place] + second[2 * place]) / 2, loss.detach())
        torch.testing.assert_close(torch.cat([first[2 * place + 1], second[2 * place + 1]]), whole.grad)
