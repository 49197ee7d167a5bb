"""Un-Mix: mixtures, their loss term, and every method that supports them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.distributed import collectives
from sslcli.methods.base import Batch, Method
from sslcli.methods.byol import BYOL, byol_loss
from sslcli.methods.infomin import InfoMin
from sslcli.methods.mixture import UnMix, add_mixture, mix_global, mix_region
from sslcli.methods.moco import MoCo
from sslcli.methods.moco_v3 import MoCoV3, contrast
from sslcli.methods.simclr import SimCLR, nt_xent
from sslcli.methods.simclr_v2 import SimCLRv2
from tiny import TinyNet, make_batch

METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "moco": (MoCo, {"dim": 4, "queue_size": 12, "bn_group": 4}),
    "moco symmetric": (MoCo, {"dim": 4, "queue_size": 12, "bn_group": 4, "symmetric": True}),
    "moco_v3": (MoCoV3, {"dim": 4, "hidden": 16}),
    "simclr": (SimCLR, {"dim": 4}),
    "simclr_v2": (SimCLRv2, {"dim": 4, "queue_size": 12}),
    "infomin": (InfoMin, {"dim": 4, "queue_size": 12, "bn_group": 4, "jigsaw_weight": 0.0}),
    "byol": (BYOL, {"dim": 4, "hidden": 16}),
}


class Given(UnMix):
    """Mixtures of a given kind in place of drawn ones."""

    def __init__(self, weight: float, center: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight, self.center = weight, center

    def mix(self, images: Tensor) -> tuple[Tensor, float]:
        if self.center is None:
            return mix_global(images, self.weight), self.weight
        return mix_region(images, self.weight, self.center)


def tiny(word: str, mixture: UnMix | None, *, norm: bool = True) -> Method:
    kind, settings = METHODS[word]
    torch.manual_seed(0)
    return kind(TinyNet(norm=norm), mixture=mixture, **settings).train()


@golden_cases("unmix_mix")
def test_mixtures_equal_those_of_the_official_code(case: Case) -> None:
    images, weight = case.inputs["images"], case.params["lam"]
    mixed = mix_global(images, weight)
    case.check(mixed, "mixed_global")
    case.check(mixed.flip(0), "mixed_global_flip")
    region, kept = mix_region(images, weight, tuple(case.params["box_center"]))
    case.check(region, "mixed_region")
    case.check(torch.tensor(kept), "lam_region")
    top, left, bottom, right = case.inputs.get("bbox", case.outputs["bbox"]).tolist()
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert torch.equal((region != images).any(0).any(0), inside)


@golden_cases("unmix_moco")
def test_a_step_of_moco_equals_that_of_the_official_code(case: Case) -> None:
    x, params = case.inputs, case.params
    width, pixels = x["W_q"].shape
    linear = nn.Linear(pixels, width, bias=False, dtype=case.dtype)
    linear.num_features = width
    settings = {name: params[name] for name in ("temperature", "momentum", "symmetric")}
    mixture = Given(params["lam"])
    method = MoCo(linear, dim=width, queue_size=params["K"], mixture=mixture, **settings)
    method.head, method.momentum_head = nn.Identity(), nn.Identity()
    linear.weight.data.copy_(x["W_q"])
    method.momentum_backbone.weight.data.copy_(x["W_k0"])
    method.queue = x["queue0"].T.contiguous()
    method.after_step(0.0)  # the official update of the keys comes before the forward
    case.check(method.momentum_backbone.weight, "W_k")
    scalars = method(Batch([x["im1"], x["im2"]], torch.arange(len(x["im1"])), torch.zeros(len(x["im1"]))))
    directions = 1 + params["symmetric"]  # the official code sums them, ours is their mean
    (directions * scalars["loss"]).backward()
    case.check(directions * scalars["loss"], "loss")
    case.check(linear.weight.grad, "grad_W_q")
    with torch.no_grad():
        case.check(terms_of(method, x["im1"], x["im2"], params["lam"]), "terms")
    method.after_step(0.0)
    case.check(method.queue.T, "queue")
    case.check(method.queue_head[None], "ptr")


def terms_of(method: MoCo, x1: Tensor, x2: Tensor, weight: float) -> Tensor:
    """A row for each direction: the loss of the clean queries, of the mixtures, of the mixtures in reverse order."""
    mixed = method.query(mix_global(x1, weight))
    rows = []
    for query, key in [(x1, x2), (x2, x1)][: 1 + method.symmetric]:
        k = method.encode_keys(key)
        rows.append([method.contrast(q, k).loss for q in (method.query(query), mixed, mixed.flip(0))])
    return torch.tensor(rows)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (33, 5)])
def test_the_share_of_a_box_is_that_of_its_pixels(size: tuple[int, int]) -> None:
    numbers = random.Random(0)
    images = torch.stack([torch.zeros(3, *size), torch.ones(3, *size)])
    for _ in range(200):
        weight = numbers.random()
        mixed, kept = mix_region(images, weight, (numbers.randrange(size[0]), numbers.randrange(size[1])))
        assert float(mixed[0].double().mean()) == pytest.approx(1 - kept, abs=1e-7)
        assert float(mixed[1].double().mean()) == pytest.approx(kept, abs=1e-7)


def test_a_box_is_smaller_where_the_border_cuts_it_off() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert mix_region(images, 0.75, (4, 4))[1] == 0.75
    assert mix_region(images, 0.75, (0, 4))[1] == 0.875
    assert mix_region(images, 0.75, (0, 0))[1] == 0.9375
    assert mix_region(images, 1.0, (3, 3))[1] == 1.0


def test_an_image_is_mixed_with_its_partner_in_reverse_order_and_that_in_the_middle_with_itself() -> None:
    images = torch.rand(5, 3, 8, 8)
    mixed = mix_global(images, 0.3)
    torch.testing.assert_close(mixed[1], 0.3 * images[1] + 0.7 * images[3])
    torch.testing.assert_close(mixed[2], images[2])
    region, _ = mix_region(images, 0.5, (4, 4))
    assert torch.equal(region[1, :, 3:5, 3:5], images[3, :, 3:5, 3:5])
    assert torch.equal(region[2], images[2])


def test_kinds_and_weights_are_drawn_as_told() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16)

    def drawn(**settings: float) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        mixture = UnMix(**settings)
        pairs = [mixture.mix(images) for _ in range(1000)]
        pasted = [bool(((mixed == 0) | (mixed == 1)).all()) for mixed, _ in pairs]
        return 1 - sum(pasted) / 1000, torch.tensor([weight for _, weight in pairs])

    fraction, weights = drawn(probability=1.0)
    assert fraction == 1.0
    # The mean and variance of a uniform number, within four standard errors.
    assert abs(float(weights.mean()) - 0.5) < 0.037
    assert abs(float(weights.var()) - 1 / 12) < 0.010
    narrow = drawn(probability=1.0, beta=50.0)[1]
    assert abs(float(narrow.var()) - 0.25 / 101) < 0.0005
    assert drawn(probability=0.0)[0] < 0.01
    assert 0.2 < drawn(probability=0.25)[0] < 0.3


@pytest.mark.parametrize("word", METHODS)
def test_the_term_weighs_both_orders_of_the_mixtures_against_the_clean_targets(word: str) -> None:
    """By each method's own loss of clean views, with the encoded mixtures in the place of its queries."""
    batch, weight = make_batch(6), 0.3
    x1, x2 = batch.views
    method, plain = tiny(word, Given(weight), norm=False), tiny(word, None, norm=False)
    base, found = plain(batch)["loss"], method(batch)
    mixed = mix_global(x1, weight)
    expected = 0.0
    for fraction, images in ((weight, mixed), (1 - weight, mixed.flip(0))):
        expected = expected + fraction * loss_of(plain, images, x1, x2)
    torch.testing.assert_close(found["mixture_loss"], expected)
    torch.testing.assert_close(found["loss"], base + expected)


def loss_of(method: Method, images: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """Return the papers' losses with `images` as queries and the targets of the views."""
    if isinstance(method, SimCLR):
        settings = {"temperature": method.temperature, "memory": getattr(method, "queue", None)}
        return nt_xent(method.projection(images), method.projection(x2), **settings).loss
    if isinstance(method, MoCoV3):
        query = method.predict(images)
        return sum(contrast(query, method.target(x), temperature=method.temperature).loss for x in (x1, x2))
    if isinstance(method, BYOL):
        prediction = method.predictor(method.projection(images))
        return byol_loss(prediction, prediction, method.target(x1), method.target(x2))
    assert isinstance(method, MoCo)
    views = (x1, x2) if method.symmetric else (x2,)
    return sum(method.contrast(method.query(images), method.encode_keys(x)).loss for x in views) / len(views)


@pytest.mark.parametrize("word", ["moco", "simclr"])
def test_a_weight_of_one_counts_the_clean_loss_twice(word: str) -> None:
    batch = make_batch()
    base, found = tiny(word, None)(batch)["loss"], tiny(word, Given(1.0))(batch)["loss"]
    torch.testing.assert_close(found, 2 * base)


@pytest.mark.parametrize("center", [None, (4, 4)])
@pytest.mark.parametrize("word", METHODS)
def test_encoding_reversed_mixtures_reverses_the_encoded_ones(word: str, center: tuple[int, int] | None) -> None:
    method, batch = tiny(word, None).eval(), make_batch()
    mixed, _ = Given(0.3, center).mix(batch.views[0])
    torch.testing.assert_close(method.projection(mixed.flip(0)), method.projection(mixed).flip(0))


@pytest.mark.parametrize("word", METHODS)
def test_swapping_the_shares_and_the_mixtures_changes_nothing(word: str) -> None:
    batch = make_batch()
    one, other = (tiny(word, Given(weight))(batch)["loss"] for weight in (0.3, 0.7))
    torch.testing.assert_close(one, other)  # 0.7 x + 0.3 y is the mixture of 0.3 in reverse order


def test_without_a_mixture_the_scalars_stay_as_they_are() -> None:
    def never(images: Tensor) -> Tensor:
        raise AssertionError("there is nothing to encode")

    scalars = {"loss": torch.tensor(1.0)}
    assert add_mixture(None, scalars, torch.zeros(2, 3, 4, 4), query=never, compare=never) is scalars


@pytest.mark.parametrize("word", METHODS)
def test_a_saved_state_draws_the_mixtures_that_would_have_come(word: str) -> None:
    method = tiny(word, UnMix(probability=0.5))
    for seed in range(3):
        method(make_batch(seed=seed))["loss"].backward()
        method.after_step(0.0)
    twin = tiny(word, UnMix(probability=0.5))
    twin.load_state_dict(copy.deepcopy(method.state_dict()))
    for seed in range(3, 6):
        assert torch.equal(method(make_batch(seed=seed))["loss"], twin(make_batch(seed=seed))["loss"])
        method.after_step(0.5), twin.after_step(0.5)


def test_only_clean_keys_are_enqueued() -> None:
    plain, mixed = tiny("moco", None, norm=False), tiny("moco", UnMix(), norm=False)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    for method in (plain, mixed):
        method(make_batch())
        method.after_step(0.0)
    assert torch.equal(plain.queue, mixed.queue)
    assert int(mixed.queue_head) == 8


def test_the_loss_of_mixtures_has_a_gradient_by_queries_alone() -> None:
    method = tiny("byol", UnMix())
    method(make_batch())["mixture_loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.predictor.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in method.target_projector.parameters())


def mixed_part(probability: float) -> tuple[Tensor, float, Tensor]:
    """This process's half of the images, mixed."""
    images = make_batch().views[0].chunk(collectives.world_size())[collectives.rank()]
    torch.manual_seed(1)
    mixed, weight = UnMix(probability=probability).mix(images)
    return mixed, weight, images


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_two_processes_mix_alike_each_its_own_images(probability: float, pair: Pair) -> None:
    _, alone, _ = mixed_part(probability)
    for mixed, weight, images in pair.run(mixed_part, probability):
        assert weight == alone
        if probability == 1.0:
            torch.testing.assert_close(mixed, mix_global(images, weight))
        changed = (mixed != images).any(1).flatten(1).sum(1) / 64
        assert changed.tolist() == pytest.approx([1 - weight * (probability == 0)] * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"probability": 1.5}, "must lie in"), ({"probability": -0.1}, "must lie in"), ({"beta": 0.0}, "positive")],
)
def test_wrong_arguments_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnMix(**settings)
