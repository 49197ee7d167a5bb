"""Attentive classifiers, against the modules of the official code in their plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.evaluation import attentive_heads
from sslcli.evaluation.attentive_heads import AttentiveHeads, Probe, SweepAdamW

LRS, DECAYS = [1e-3, 0.1, 0.02], [0.5, 0.0, 0.1]


class Plain(nn.Module):
    """One attentive classifier with keys and values of all tokens, as in CAPI."""

    def __init__(self, heads: AttentiveHeads, number: int) -> None:
        super().__init__()
        self.num_heads = heads.query.shape[1]
        width = heads.weight.shape[2]
        self.query = nn.Parameter(heads.query[number].detach().flatten().clone())
        self.key, self.value = (nn.Linear(width, width) for _ in range(2))
        self.classify = nn.Linear(width, heads.weight.shape[1])
        state = [heads.key[number].flatten(0, 1), torch.zeros(width), heads.value[number].flatten(0, 1)]
        state += [heads.value_bias[number].flatten(), heads.weight[number], heads.bias[number]]
        layers = (self.key, self.value, self.classify)
        with torch.no_grad():
            for parameter, value in zip((p for each in layers for p in (each.weight, each.bias)), state, strict=True):
                parameter.copy_(value)

    def forward(self, tokens: Tensor) -> Tensor:
        def split(rows: Tensor) -> Tensor:
            return rows.view(len(tokens), -1, self.num_heads, rows.shape[-1] // self.num_heads).transpose(1, 2)

        query = split(self.query.expand(len(tokens), 1, -1))
        found = F.scaled_dot_product_attention(query, split(self.key(tokens)), split(self.value(tokens)))
        return self.classify(found.transpose(1, 2).flatten(1))


def trained(seed: int = 0) -> tuple[AttentiveHeads, list[Plain], Tensor, Tensor]:
    """Train three classifiers at once, and one by one with torch, on the same batches."""
    torch.manual_seed(seed)
    heads = AttentiveHeads(3, width=12, num_heads=2, num_classes=4, seed=1)
    plain = [Plain(heads, number) for number in range(3)]
    ours = SweepAdamW(heads, lrs=LRS, weight_decays=DECAYS)
    theirs = []
    for net, lr, decay in zip(plain, LRS, DECAYS, strict=True):
        biases = [p for name, p in net.named_parameters() if "bias" in name]
        others = [p for name, p in net.named_parameters() if "bias" not in name]
        groups = [{"params": others, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
        theirs.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)))
    for scale in (1.0, 0.5, 0.25):
        tokens, labels = torch.randn(6, 5, 12), torch.randint(0, 4, (6,))
        heads.accumulate(tokens, labels, torch.full((6, 3), 1 / 6))
        ours.step(scale=scale)
        for net, optimizer, lr in zip(plain, theirs, LRS, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(tokens), labels).backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
    return heads, plain, torch.randn(7, 5, 12), torch.randint(0, 4, (7,))


def test_classifiers_equal_plain_ones_trained_one_by_one() -> None:
    heads, plain, tokens, labels = trained()
    found = heads(tokens)
    expected = torch.stack([net(tokens) for net in plain], dim=1)
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.01  # they have learned, each with its own hyperparameters
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    places, losses = Probe(heads=heads, norm=nn.Identity(), shape=(5, 12)).score(tokens.flatten(1), labels)
    best = expected.argmax(2).T
    assert torch.equal(places == 0, best == labels)
    per_image = F.cross_entropy(expected.transpose(1, 2), labels[:, None].expand(-1, 3), reduction="none")
    torch.testing.assert_close(losses, per_image.T, rtol=1e-4, atol=1e-5)


def test_a_step_in_parts_of_a_batch_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, tokens, _ = trained()
    monkeypatch.setattr(attentive_heads, "LARGEST", 2 * 12 * 3 * 2)  # two images in one part
    assert whole.chunk((5, 12)) == 2
    parts, *_ = trained()
    torch.testing.assert_close(parts(tokens), whole(tokens), rtol=1e-5, atol=1e-6)


def test_weights_of_zero_exclude_images_and_a_diverged_classifier_does_not_affect_others() -> None:
    heads = AttentiveHeads(2, width=12, num_heads=3, num_classes=4, seed=0)
    tokens, labels = torch.randn(4, 5, 12), torch.tensor([0, 1, 2, 3])
    weights = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.0, 0.25], [0.0, 0.25]])
    heads.accumulate(tokens, labels, weights)
    some = AttentiveHeads(2, width=12, num_heads=3, num_classes=4, seed=0)
    some.accumulate(tokens[:2], labels[:2], weights[:2])
    torch.testing.assert_close(heads.weight.grad[0], some.weight.grad[0])  # type: ignore[index]
    assert not torch.allclose(heads.weight.grad[1], some.weight.grad[1])  # type: ignore[index]
    with torch.no_grad():
        heads.query[1] = torch.inf
    heads.zero_grad()
    heads.accumulate(tokens, labels, weights)
    assert heads.weight.grad[1].isnan().any()  # type: ignore[index]
    assert heads.weight.grad[0].isfinite().all()  # type: ignore[index]
