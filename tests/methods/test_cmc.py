from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.vit import VisionTransformer
from sslcli.distributed import collectives
from sslcli.methods.base import Batch
from sslcli.methods.cmc import CMC, Encoders, in_batch_loss
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet

N = 18  # images of the training set
LOSSES = ["nce", "softmax", "batch"]
THREE = {"rgb": 1, "depth": 1, "heat": 1}


def tiny_cmc(*, norm: bool = False, **changes: object) -> CMC:
    settings = {"num_images": N, "channels": 3, "dim": 4, "negatives": 6, "temperature": 0.2} | changes
    return CMC(TinyNet(norm=norm), **settings)


def batch_of(index: list[int], *, seed: int = 0, present: list[list[int]] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(index), 3, 8, 8, generator=generator, dtype=torch.float64)
    there = None if present is None else torch.tensor(present, dtype=torch.bool)
    return Batch([images], torch.tensor(index), torch.zeros(len(index)), there)


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def compare_with_official(case: Case) -> CMC:
    """Run the batches of a case; compare everything that both losses have."""
    x, params = case.inputs, case.params
    num_images, dim = x["memory_l0"].shape
    settings = {name: params[name] for name in ("momentum", "temperature")}
    loss = "softmax" if params["softmax"] else "nce"
    method = tiny_cmc(num_images=num_images, dim=dim, loss=loss, **settings).to(case.dtype)
    method.banks["L"].rows.copy_(x["memory_l0"])
    method.banks["ab"].rows.copy_(x["memory_ab0"])
    found: dict[str, list[Tensor]] = {name: [] for name in case.outputs}
    for l0, ab0, y, chosen in zip(x["l"], x["ab"], x["y"], x["idx"], strict=True):
        vl, vab = l0.clone().requires_grad_(), ab0.clone().requires_grad_()
        for name, v, bank in (("l", vl, "ab"), ("ab", vab, "L")):
            out = v @ method.banks[bank].rows.T / params["temperature"]
            found[f"out_{name}"].append(out.gather(1, chosen))
        total = method.contrast([vl, vab], None, chosen)["loss"]
        total.backward()
        for name, v, direction in (("l", vl, (0, 1)), ("ab", vab, (1, 0))):
            found[f"loss_{name}"].append(method.against_bank(v, direction, chosen, None)[0].mean())
            found[f"grad_{name}"].append(v.grad)
            if loss == "nce":
                log_z = method.log_z[direction]
                found[f"Z_{name}"].append(torch.tensor(math.exp(log_z), dtype=torch.float64))
                found[f"out_{name}"][-1] = (found[f"out_{name}"][-1] - log_z).exp()
        found["loss"].append(total)
        method.banks["L"].remember(y, vl.detach())
        method.banks["ab"].remember(y, vab.detach())
        method.after_step(0.0)
        found["memory_l"].append(method.banks["L"].rows.clone())
        found["memory_ab"].append(method.banks["ab"].rows.clone())
    for name, values in found.items():
        case.check(values, name)
    return method


@golden_cases("cmc_nce")
def test_nce_over_two_banks_equals_the_official_code_after_every_batch(case: Case) -> None:
    method = compare_with_official(case)
    assert set(method.log_z) == {(0, 1), (1, 0)}


@golden_cases("cmc_softmax")
def test_softmax_over_two_banks_equals_the_official_code_after_every_batch(case: Case) -> None:
    method = compare_with_official(case)
    assert method.log_z == {}


def test_nce_is_the_formula_by_loops_with_duplicates_among_the_rows() -> None:
    method = tiny_cmc(num_images=7, loss="nce", temperature=0.3).double()
    v = [units(3, 4), units(3, 4, seed=1)]
    chosen = torch.tensor([[2, 5, 5, 2, 0, 6], [2, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    expected = 0.0
    for query, bank in ((v[0], method.banks["ab"]), (v[1], method.banks["L"])):
        table = torch.exp(torch.einsum("nd,nkd->nk", query, bank.rows[chosen]) / 0.3)
        p, noise = table / (table.mean() * 7), 5 / 7
        for row in p:
            expected -= math.log(row[0] / (row[0] + noise + 1e-7)) / 3
            expected -= sum(math.log(noise / (other + noise + 1e-7)) for other in row[1:]) / 3
    assert float(method.contrast(v, None, chosen)["loss"]) == pytest.approx(expected, rel=1e-6)


def test_in_batch_loss_is_the_cross_entropy_in_both_directions() -> None:
    v = [units(5, 4), units(5, 4, seed=1)]
    logits = v[0] @ v[1].T / 0.2
    scalars = tiny_cmc(loss="batch").contrast(v, None)
    own = torch.arange(5)
    torch.testing.assert_close(scalars["loss"], F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    hits = (logits.argmax(1) == own).double().mean() + (logits.argmax(0) == own).double().mean()
    torch.testing.assert_close(scalars["accuracy"], hits / 2)


def test_channels_are_split_in_the_order_of_the_modalities() -> None:
    method, batch = tiny_cmc().double(), batch_of([3, 1, 0])
    images = batch.views[0]
    lightness, color = method.backbone.encoders["L"], method.backbone.encoders["ab"]
    assert (lightness.conv.in_channels, color.conv.in_channels) == (1, 2)
    expected = torch.cat([lightness(images[:, :1]), color(images[:, 1:])], dim=1)
    torch.testing.assert_close(method.features(images), expected)
    assert method.backbone.num_features == expected.shape[1] == 16
    heads = [method.heads["L"](expected[:, :8]), method.heads["ab"](expected[:, 8:])]
    torch.testing.assert_close(method.projection(images), torch.cat(heads, dim=1))


def test_colors_leave_the_features_of_lightness_as_they_are() -> None:
    method, images = tiny_cmc().double(), batch_of([3, 1, 0]).views[0]
    changed = images.clone()
    changed[:, 1:] = torch.randn_like(changed[:, 1:])
    before, after = method.features(images), method.features(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
    changed = images.clone()
    changed[:, 0] += 1
    assert torch.equal(method.features(changed)[:, 8:], before[:, 8:])
    assert not torch.equal(method.features(changed)[:, :8], before[:, :8])


@pytest.mark.parametrize("loss", LOSSES)
def test_core_is_full_when_there_are_two_modalities(loss: str) -> None:
    core, full = tiny_cmc(graph="core", loss=loss).double(), tiny_cmc(graph="full", loss=loss).double()
    full.load_state_dict(core.state_dict())
    batch = batch_of([3, 1, 0])
    assert torch.equal(core(batch)["loss"], full(batch)["loss"])


@pytest.mark.parametrize(("graph", "pairs"), [("core", [(0, 1), (0, 2)]), ("full", [(0, 1), (0, 2), (1, 2)])])
def test_three_modalities_are_paired_as_the_graph_says_in_both_directions(
    graph: str, pairs: list[tuple[int, int]]
) -> None:
    method = tiny_cmc(modalities=THREE, graph=graph, loss="batch")
    v = [units(5, 4, seed=seed) for seed in range(3)]
    expected = 0.0
    for i, j in pairs:
        logits = v[i] @ v[j].T / 0.2
        expected += F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))
    torch.testing.assert_close(method.contrast(v, None)["loss"], expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_images_without_a_modality_are_left_out_of_its_pairs(loss: str) -> None:
    # With all pairs of the images 0, 2 and 3, the loss is that of a batch of these three.
    partial, whole = tiny_cmc(loss=loss).double(), tiny_cmc(loss=loss).double()
    whole.load_state_dict(partial.state_dict())
    v = [units(5, 4), units(5, 4, seed=1)]
    present = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 0]], dtype=torch.bool)
    both = present.all(1)
    chosen = None if loss == "batch" else torch.randint(N, (5, 7))
    absent = [v[0].clone().requires_grad_(), v[1].clone().requires_grad_()]
    found = partial.contrast(absent, present, chosen)
    if loss == "batch":
        # An image without ab is still a negative for those ab look for, as its L is there.
        own = torch.arange(5)[both]
        there, back = v[0] @ v[1][both].T / 0.2, v[1] @ v[0].T / 0.2
        expected = F.cross_entropy(there[both], torch.arange(3)) + F.cross_entropy(back[both], own)
    else:
        assert chosen is not None
        expected = whole.contrast([part[both] for part in v], None, chosen[both])["loss"]
    torch.testing.assert_close(found["loss"], expected)
    assert partial.log_z == pytest.approx(whole.log_z)
    found["loss"].backward()
    assert not absent[1].grad[~both].any()  # what stands in the place of an absent modality takes no gradient
    assert all(part.grad[both].any() for part in absent)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_any_complete_pair_costs_nothing_and_the_next_is_sound(loss: str) -> None:
    method = tiny_cmc(loss=loss).double()
    scalars = method(batch_of([3, 1, 0], present=[[1, 0], [1, 0], [0, 1]]))
    scalars["loss"].backward()
    assert float(scalars["loss"].detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    assert method.log_z == {}
    method.after_step(0.0)
    assert method(batch_of([3, 1, 0]))["loss"] > 0


def test_rows_of_absent_modalities_stay_as_they_are() -> None:
    method = tiny_cmc().double()
    before = {name: bank.rows.clone() for name, bank in method.banks.items()}
    method(batch_of([3, 1, 0], present=[[1, 0], [1, 1], [0, 1]]))
    method.after_step(0.0)
    changed = {name: (bank.rows != before[name]).any(1).nonzero()[:, 0].tolist() for name, bank in method.banks.items()}
    assert changed == {"L": [1, 3], "ab": [0, 1]}


def test_banks_follow_their_own_modality_after_the_step() -> None:
    method, batch = tiny_cmc().double(), batch_of([3, 1, 0])
    before = {name: bank.rows.clone() for name, bank in method.banks.items()}
    method(batch)["loss"].backward()
    assert all(torch.equal(bank.rows, before[name]) for name, bank in method.banks.items())
    method.after_step(0.0)
    for (name, bank), v in zip(method.banks.items(), method.embeddings, strict=True):
        torch.testing.assert_close(bank.rows[batch.index], F.normalize((before[name][batch.index] + v) / 2, dim=1))


def test_each_direction_keeps_a_normalizer_of_its_own_in_the_state() -> None:
    method = tiny_cmc(loss="nce").double()
    method(batch_of([3, 1, 0]))
    method.after_step(0.0)
    first = dict(method.log_z)
    assert set(first) == {(0, 1), (1, 0)}
    assert first[0, 1] != first[1, 0]
    method(batch_of([4, 2, 5], seed=1))
    assert method.log_z == first
    twin = tiny_cmc(loss="nce").double()
    twin.load_state_dict(method.state_dict())
    assert twin.log_z == first


def test_the_same_rows_are_compared_in_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny_cmc(modalities=THREE).double()
    seen: list[Tensor] = []
    against = method.against_bank
    monkeypatch.setattr(
        method, "against_bank", lambda v, d, chosen, both: (seen.append(chosen), against(v, d, chosen, both))[1]
    )
    method(batch_of([3, 1, 0]))
    assert len(seen) == 6
    assert all(torch.equal(chosen, seen[0]) for chosen in seen)
    assert seen[0][:, 0].tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    "backbone",
    [
        Small(image_size=16, width=4),
        ResNet("resnet18", image_size=16),
        VisionTransformer(image_size=16, patch_size=4, width=8, depth=2, num_heads=2),
    ],
    ids=["small", "resnet", "vit"],
)
def test_any_backbone_with_a_convolution_is_cut_to_its_channels(backbone: nn.Module) -> None:
    encoders = Encoders(backbone, {"L": 1, "ab": 2}).eval()
    images = torch.randn(2, 3, 16, 16)
    assert encoders(images).shape == (2, encoders.num_features)
    convolutions = [
        [m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (backbone, *encoders.encoders.values())
    ]
    (whole, *rest), (one, *rest1), (two, *rest2) = convolutions
    assert torch.equal(one.weight, whole.weight[:, :1])
    assert two.weight.shape == whole.weight[:, 1:].shape
    assert whole.in_channels == 3  # the backbone itself is left as it was
    for a, b, c in zip(rest, rest1, rest2, strict=True):
        assert torch.equal(a.weight, b.weight)
        assert not torch.equal(a.weight, c.weight)
        assert torch.equal(a.weight.flatten().sort().values, c.weight.flatten().sort().values)
    maps = encoders.stages(images)
    single = backbone.eval().stages(images)
    assert list(maps) == list(single)
    for name in maps:
        assert maps[name].shape[1] == 2 * single[name].shape[1]


def test_encoders_start_apart_unless_their_weights_were_learned() -> None:
    backbone = Small(image_size=16, width=4)
    nn.init.ones_(backbone.block1[1].weight)
    torch.manual_seed(0)
    one, two = Encoders(backbone, {"L": 1, "ab": 2}).encoders.values()
    weights = [net.block4[0].weight.detach().flatten() for net in (one, two)]
    assert abs(float(torch.corrcoef(torch.stack(weights))[0, 1])) < 0.2
    assert torch.equal(two.block1[1].weight, torch.ones(4))  # what is constant stays so
    backbone.pretrained = True
    learned = list(Encoders(backbone, {"L": 1, "ab": 2}).encoders.values())
    assert torch.equal(learned[0].block4[0].weight, learned[1].block4[0].weight)
    assert torch.equal(learned[1].block1[0].weight, backbone.block1[0].weight[:, 1:])


def test_a_backbone_without_stages_says_so() -> None:
    with pytest.raises(ValueError, match="TinyNet returns features but no feature maps by stage: choose a resnet"):
        tiny_cmc().backbone.stages(torch.zeros(2, 3, 8, 8))


class Flat(nn.Module):
    """A backbone without a convolution."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 64, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def test_a_backbone_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Flat has no nn.Conv2d .* choose a resnet, small or vit"):
        CMC(Flat(), num_images=N, channels=3)
    grouped = TinyNet()
    grouped.conv = nn.Conv2d(3, 9, 3, groups=3)
    with pytest.raises(ValueError, match="conv, takes 3 channels in 3 groups"):
        CMC(grouped, num_images=N, channels=3)


def test_every_part_is_trained_and_every_batchnorm_is_synchronized() -> None:
    method = tiny_cmc(norm=True).double()
    method(batch_of([3, 1, 0]))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2
    assert all(type(m) is SyncBatchNorm for m in norms)
    assert [part.shape for part in method.embeddings] == [(3, 4), (3, 4)]


def part_of(rows: Tensor) -> Tensor:
    return rows.chunk(collectives.world_size())[collectives.rank()]


def train_on_a_part(
    state: dict[str, Tensor], batches: list[Batch], loss: str
) -> tuple[dict[str, Tensor], Tensor, list]:
    """The state, the losses and the gradients of the last step, those of the global batch."""
    method = tiny_cmc(loss=loss).double()
    method.load_state_dict(state)
    losses = []
    for batch in batches:
        present = None if batch.present is None else part_of(batch.present)
        found = method(Batch([part_of(batch.views[0])], part_of(batch.index), part_of(batch.label), present))
        method.zero_grad()
        found["loss"].backward()
        method.after_step(0.0)
        losses.append(collectives.all_reduce_mean(found["loss"]))
    gradients = [collectives.all_reduce_mean(p.grad) for p in method.parameters() if p.grad is not None]
    return method.state_dict(), torch.stack(losses), gradients


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_compute_what_one_does_with_absent_modalities_too(loss: str, pair: Pair) -> None:
    start = tiny_cmc(loss=loss).double().state_dict()
    present = [[1, 0], [1, 0], [1, 1], [1, 1]]  # none is complete on the first process
    batches = [batch_of([3, 1, 0, 3], present=present), batch_of([1, 7, 2, 1], seed=1)]
    for part in (batches, batches[:1]):
        state, losses, gradients = train_on_a_part(start, part, loss)
        (state1, losses1, gradients1), (state2, _, _) = pair.run(train_on_a_part, start, part, loss)
        torch.testing.assert_close(state1, state2, rtol=0, atol=0)
        torch.testing.assert_close(state1, state)
        torch.testing.assert_close(losses1, losses)
        torch.testing.assert_close(gradients1, gradients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"rgb": 3}}, "contrasting needs at least two"),
        ({"modalities": {"rgb": 3, "depth": 1}}, r"\{rgb: 3, depth: 1\}, 4 channels in all, but the images have 3"),
        ({"modalities": {"rgb": 3, "depth": 0}}, "each needs at least one channel"),
        ({"modalities": {"r.g": 1, "b": 2}}, "'r.g', which is not a valid name of a submodule"),
        ({"modalities": {"keys": 1, "b": 2}}, "'keys', which is not a valid name of a submodule"),
        ({"graph": "star"}, "graph is 'star', but it must be one of: core, full"),
        ({"loss": "nse"}, "loss is 'nse', but it must be one of: nce, softmax, batch"),
        ({"negatives": 0}, "negatives is 0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_cmc(**changes)


def test_in_batch_hits_are_those_nearest_to_their_own_row() -> None:
    axes = torch.eye(4)
    assert in_batch_loss(axes, axes, None, temperature=0.1)[1].tolist() == [1, 1, 1, 1]
    assert in_batch_loss(axes, axes[[1, 0, 2, 3]], None, temperature=0.1)[1].tolist() == [0, 0, 1, 1]
    same = torch.ones(4, 4) / 2
    assert in_batch_loss(same, same, None, temperature=0.1)[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_not_computed_in_the_precision_of_autocast(loss: str) -> None:
    method, rows = tiny_cmc(loss=loss), (*torch.randn(2, 6, 4), torch.arange(6))
    other = copy.deepcopy(method)
    expected = other.compare(rows)
    with torch.autocast("cpu", torch.bfloat16):
        found = method.compare(rows)
    assert found["loss"].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
