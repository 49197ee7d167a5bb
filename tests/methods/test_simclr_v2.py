from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.methods.simclr import SimCLR, nt_xent
from sslcli.methods.simclr_v2 import SimCLRv2
from tiny import TinyNet, make_batch


class Wide(nn.Module):
    """Features as wide as those of ResNet-50."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :1] * self.scale * torch.ones(2048)


def tiny(**changes: object) -> SimCLRv2:
    return SimCLRv2(TinyNet(), **({"dim": 4, "temperature": 0.5} | changes))


def test_the_middle_of_the_head_is_as_wide_as_in_the_official_code() -> None:
    net = SimCLRv2(Wide()).eval()
    images = torch.rand(2, 3, 4, 4)
    assert [net.head_features(images, layer).shape[1] for layer in range(4)] == [2048, 2048, 2048, 128]


@pytest.mark.parametrize("norm", [True, False])
def test_a_middle_layer_is_taken_after_its_norm_and_relu(norm: bool) -> None:
    net, images = tiny(norm=norm, hidden=6).eval(), torch.randn(5, 3, 8, 8)
    first = net.head[0](net.backbone(images))
    wanted = torch.relu(net.head[1](first) if norm else first)
    torch.testing.assert_close(net.head_features(images, 1), wanted)
    torch.testing.assert_close(net.head_features(images, 0), net.features(images))
    torch.testing.assert_close(net.head_features(images, 3), net.projection(images))
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="layers 1 to 3"):
            net.head_features(images, layer)


def test_without_a_memory_a_step_is_that_of_simclr() -> None:
    torch.manual_seed(0)
    new = tiny()
    old = SimCLR(TinyNet(), dim=4, layers=3, temperature=0.5)
    old.load_state_dict(new.state_dict())
    assert torch.equal(new(make_batch())["loss"], old(make_batch())["loss"])
    new.after_step(0.0)
    assert not [name for name in new.state_dict() if "key" in name or "queue" in name]


def test_rows_of_the_memory_are_negatives_of_every_anchor() -> None:
    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64)
    memory = F.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    total = 0.0
    for i in range(10):
        others = [k for k in range(10) if k != i]
        scores = torch.cat([z[others], memory]) @ z[i] / 0.3
        total -= F.log_softmax(scores, 0)[others.index((i + 5) % 10)]
    torch.testing.assert_close(nt_xent(z1, z2, temperature=0.3, memory=memory).loss, total / 10)


def test_equal_embeddings_are_a_guess_among_views_and_memory() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    memory = torch.full((3, 4), 0.5, dtype=torch.float64)
    loss = nt_xent(z, z, temperature=0.1, memory=memory).loss
    assert float(loss) == pytest.approx(math.log(2 * 6 - 1 + 3))


def test_the_memory_holds_what_the_moving_average_made_of_the_last_images() -> None:
    net = tiny(queue_size=10, momentum=0.9)
    batch = make_batch(4)
    before, old = net.queue.clone(), [p.clone() for p in net.momentum_backbone.parameters()]
    net(batch)["loss"].backward()
    assert all(p.grad is None for p in net.momentum_backbone.parameters())
    assert torch.equal(net.queue, before)
    (keys,) = net.new_keys
    with torch.no_grad():
        for parameter in net.backbone.parameters():
            parameter.add_(1.0)
    net.after_step(0.0)
    assert torch.equal(net.queue[:4], keys)
    assert torch.equal(net.queue[4:], before[4:])
    assert int(net.queue_head) == 4
    for average, was, now in zip(net.momentum_backbone.parameters(), old, net.backbone.parameters(), strict=True):
        torch.testing.assert_close(average, 0.9 * was + 0.1 * now)
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(4))


def test_fine_tuning_starts_from_the_first_layer_unless_told_otherwise() -> None:
    assert (tiny().finetune_layer, tiny(finetune_layer=0).finetune_layer, tiny().head_layers) == (1, 0, 3)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"queue_size": -1}, "disables the queue"), ({"finetune_layer": 4}, "1 to 3"), ({"momentum": 1.5}, "momentum")],
)
def test_values_out_of_range_are_refused(changes: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        tiny(**changes)


def test_negatives_are_counted() -> None:
    assert tiny(queue_size=10).effective(8) == {"negatives per query": 24}
