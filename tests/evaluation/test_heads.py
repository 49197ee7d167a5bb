"""Linear classifiers that are trained at the same time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslcli.evaluation.heads import SgdHeads, cross_entropy_gradient, score
from sslcli.evaluation.result import label_rank

CPU = torch.device("cpu")


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_head_equals_a_layer_that_torch_trains(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 7, generator=generator), torch.randint(4, (60,), generator=generator)
    lrs, decays, scales = [0.1, 1.0], [1e-2, 0.0], [1.0, 0.5, 0.1]
    options = {"momentum": 0.9, "nesterov": nesterov}
    heads = SgdHeads(lrs=lrs, weight_decays=decays, width=7, num_classes=4, device=CPU, **options)
    for rows, scale in zip(torch.arange(60).split(20), scales, strict=True):
        heads.step(x[rows], y[rows], scale=scale)
    weight, bias = heads.heads()
    for head, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
        layer = torch.nn.Linear(7, 4)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, **options)
        for rows, scale in zip(torch.arange(60).split(20), scales, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
        columns = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(weight[:, columns], layer.weight.detach().T)
        torch.testing.assert_close(bias[columns], layer.bias.detach())


def test_the_gradient_equals_that_of_autograd() -> None:
    logits = torch.randn(3 * 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0])
    loss = sum(F.cross_entropy(logits.view(3, 2, 5)[:, head].T, labels) for head in range(2))
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(cross_entropy_gradient(logits.detach(), labels, 3), expected)


def test_the_score_of_every_head_equals_its_score_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 7, generator=generator), torch.randint(4, (50,), generator=generator)
    weight, bias = torch.randn(7, 8, generator=generator), torch.randn(8, generator=generator)
    place, loss = score(x, y, (weight, bias), num_classes=4)
    for head in range(2):
        logits = x @ weight[:, 4 * head : 4 * head + 4] + bias[4 * head : 4 * head + 4]
        assert torch.equal(place[head], label_rank(logits, y))
        torch.testing.assert_close(loss[head], F.cross_entropy(logits, y))
