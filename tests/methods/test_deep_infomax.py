from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from processes import Pair
from sslcli.backbones.base import Backbone
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.vit import VisionTransformer
from sslcli.engine import fsdp
from sslcli.methods.base import Batch
from sslcli.methods.deep_infomax import DeepInfoMax, Embed, choose_stage, official_map_encoder
from sslcli.methods.mutual_information import MEASURES, concat_loss, dot_loss
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet, make_batch, mine

SIZE = 16


def small_deep_infomax(backbone: nn.Module | None = None, **changes: Any) -> DeepInfoMax:
    torch.manual_seed(0)
    defaults = {"image_size": SIZE, "dim": 4, "units": 8, "map_hidden": 8, "prior_widths": (8,)}
    return DeepInfoMax(backbone or Small(image_size=SIZE, width=2), **(defaults | changes))


def batch_of(num_images: int = 8, size: int = SIZE) -> Batch:
    return make_batch(num_images, views=1, size=size)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_loss_is_the_weighted_sum_of_its_terms_and_the_discriminators(measure: str, score: str) -> None:
    method = small_deep_infomax(alpha=0.5, beta=2.0, gamma=0.25, measure=measure, score=score)
    scalars = method(batch_of())
    assert set(scalars) == {"loss", "information", "local", "global", "prior", "discriminator"}
    information = 0.5 * scalars["global"] + 2 * scalars["local"]
    torch.testing.assert_close(scalars["information"], information)
    torch.testing.assert_close(scalars["loss"], information + 0.25 * scalars["prior"] + scalars["discriminator"])
    scalars["loss"].backward()
    assert [name for name, weight in method.named_parameters() if weight.grad is None] == []


def test_terms_are_the_losses_of_the_networks_outputs() -> None:
    method, batch = small_deep_infomax(alpha=1.0, measure="JSD").eval(), batch_of()
    scalars = method(batch)
    maps = method.backbone.stages(batch.views[0])[method.local_stage]
    vectors = method.projection(batch.views[0])
    places, queries = method.local_term.of_places(maps), method.local_term.of_vectors(vectors[..., None, None])
    torch.testing.assert_close(scalars["local"], dot_loss(places.flatten(2), queries.flatten(2), measure="JSD"))
    whole, queries = method.map_encoder(maps)[..., None], method.global_term(vectors[..., None, None])
    torch.testing.assert_close(scalars["global"], dot_loss(whole, queries.flatten(2), measure="JSD"))
    torch.testing.assert_close(method.embeddings, (vectors.detach(),))


def test_concat_scores_the_vector_beside_each_place() -> None:
    method, batch = small_deep_infomax(score="concat", gamma=0.0).eval(), batch_of()
    maps, vectors = method.backbone.stages(batch.views[0])["block1"], method.projection(batch.views[0])
    expected = concat_loss(method.local_term, maps, vectors, measure="InfoNCE")
    torch.testing.assert_close(method(batch)["loss"], expected)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_gradient_penalty_is_part_of_the_discriminators_loss(weight: float) -> None:
    method, batch = small_deep_infomax(gamma=0.25, gradient_penalty=weight), batch_of()
    scalars = method(batch)
    expected = scalars["local"] + 0.25 * scalars["prior"] + scalars["discriminator"]
    torch.testing.assert_close(scalars["loss"], expected + weight * scalars["gradient_penalty"])
    names, parameters = zip(*method.named_parameters(), strict=True)
    gradients = torch.autograd.grad(scalars["gradient_penalty"], parameters, allow_unused=True)
    reached = {name.partition(".")[0] for name, found in zip(names, gradients, strict=True) if found is not None}
    assert reached == {"discriminator"}  # the encoder gets no gradient


def penalty_by_hand(net: nn.Sequential, inputs: Tensor) -> Tensor:
    """Mean squared norm of the gradient of ReLU layers: a product of weights, and masks of the active units."""
    *hidden, last = [layer for layer in net if isinstance(layer, nn.Linear)]
    rows = []
    for x in inputs:
        jacobian = torch.eye(len(x), dtype=x.dtype)
        for layer in hidden:
            x = layer(x)
            jacobian = (x > 0)[:, None] * (layer.weight @ jacobian)
            x = x.relu()
        rows.append((last.weight @ jacobian).square().sum())
    return torch.stack(rows).mean()


def test_the_gradient_penalty_and_its_gradient_are_exact() -> None:
    method = small_deep_infomax(gradient_penalty=1.0, prior_widths=(8, 6)).double()
    vectors, prior = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, 4, dtype=torch.float64)
    weights = [layer.weight for layer in method.discriminator if isinstance(layer, nn.Linear)]
    penalty = method.discriminator_penalty(vectors, prior)
    of_vectors, of_samples = (penalty_by_hand(method.discriminator, part) for part in (vectors.sigmoid(), prior))
    expected = (of_vectors + of_samples) / 2  # the official 0.5 * (penalty of one sample + penalty of the other)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, weights), torch.autograd.grad(expected, weights))


def test_the_gradient_penalty_is_float32_under_autocast() -> None:
    method, vectors, prior = small_deep_infomax(gradient_penalty=1.0), torch.randn(5, 4), torch.rand(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = method.discriminator_penalty(vectors.bfloat16(), prior)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, method.discriminator_penalty(vectors.bfloat16(), prior), rtol=0, atol=0)


def test_old_runs_have_no_gradient_penalty() -> None:
    assert "gradient_penalty" not in small_deep_infomax()(batch_of())


def weights_of_a_sharded_step(batch: Batch) -> dict[str, Tensor]:
    method = small_deep_infomax(alpha=1.0, gradient_penalty=1.0, official_global=True).double()
    if torch.distributed.is_initialized():
        fsdp.shard(method, torch.device("cpu"), "fp32")
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    for _ in range(2):
        method(mine(batch))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: value for name, value in method.state_dict().items() if isinstance(value, Tensor)}
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state.items()}


def test_two_processes_with_sharded_parameters_train_as_one_does(pair: Pair) -> None:
    batch = make_batch(views=1, size=SIZE, dtype=torch.float64)
    expected = weights_of_a_sharded_step(batch)
    for found in pair.run(weights_of_a_sharded_step, batch):
        torch.testing.assert_close(found, expected)


def test_the_official_global_networks_repeat_the_layers_of_the_official_encoder() -> None:
    net = official_map_encoder(128, 8, 8, 2048, hidden=1024)  # the map of the official encoder for CIFAR-10
    convolutions = [part for part in net if isinstance(part, nn.Conv2d)]
    assert [tuple(part.weight.shape) for part in convolutions] == [(128, 128, 4, 4), (256, 128, 4, 4)]
    assert [tuple(part.weight.shape) for part in net[-1] if isinstance(part, nn.Linear)] == [(1024, 1024), (2048, 1024)]
    assert net(torch.randn(2, 128, 8, 8)).shape == (2, 2048)
    assert official_map_encoder(2, 7, 5, 6, hidden=4)(torch.randn(3, 2, 7, 5)).shape == (3, 6)
    method, batch = small_deep_infomax(alpha=1.0, beta=0.0, measure="JSD", official_global=True).eval(), batch_of()
    maps = method.backbone.stages(batch.views[0])[method.local_stage]
    queries = F.linear(method.projection(batch.views[0]), method.global_term.weight[..., 0, 0], method.global_term.bias)
    expected = dot_loss(method.map_encoder(maps)[..., None], queries[..., None], measure="JSD")
    torch.testing.assert_close(method(batch)["global"], expected)


def test_a_weight_of_zero_leaves_out_the_term_and_its_networks() -> None:
    names = {name.partition(".")[0] for name, _ in small_deep_infomax().named_parameters()}
    assert names == {"backbone", "head", "local_term", "discriminator"}
    only_global = small_deep_infomax(alpha=1.0, beta=0.0, gamma=0.0)
    assert {name.partition(".")[0] for name, _ in only_global.named_parameters()} == {
        "backbone",
        "head",
        "map_encoder",
        "global_term",
    }
    assert set(only_global(batch_of())) == {"loss", "information", "global"}


def test_the_official_mask_adds_own_places_as_negatives() -> None:
    batch = make_batch(views=1, size=SIZE, dtype=torch.float64)
    losses = [small_deep_infomax(gamma=0.0, official_mask=mask).double()(batch)["loss"] for mask in (False, True)]
    assert losses[1] > losses[0]


def test_the_prior_is_drawn_anew_each_step_and_again_from_a_saved_state() -> None:
    method, batch = small_deep_infomax().eval(), batch_of()
    method(batch)
    state = method.state_dict()
    second, third = (method(batch)["discriminator"] for _ in range(2))
    assert second != third
    method.load_state_dict(state)
    assert method(batch)["discriminator"] == second


def test_training_tells_images_apart_and_the_vectors_approach_the_prior() -> None:
    method = small_deep_infomax(Small(image_size=SIZE, width=4), gamma=5.0, dim=8, prior_widths=(32,))
    images = torch.randn(16, 3, 1, 1) + torch.randn(16, 3, SIZE, SIZE) / 10  # of one color each
    batch = Batch([images], torch.arange(16), torch.zeros(16))
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    for _ in range(200):
        scalars = method(batch)
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
    assert scalars["information"].item() < math.log(1 + 15 * 64) / 2  # half of what guessing costs
    code = method.embeddings[0].sigmoid()
    assert 0.3 < code.mean().item() < 0.7
    assert code.std().item() > 0.15  # 0.29 for the uniform distribution, 0 for a constant, 0.08 here without the prior


@pytest.mark.parametrize(
    ("backbone", "size", "stage", "places"),
    [
        (Small(image_size=32, width=2), 32, "block3", 64),
        (ResNet("resnet18", image_size=32), 32, "layer3", 64),
        (ResNet("resnet18", image_size=128, stem="imagenet"), 128, "layer3", 64),
        (VisionTransformer(image_size=32, patch_size=8, width=16, depth=1, num_heads=2), 32, "patches", 16),
    ],
    ids=["small", "resnet at 32", "resnet at 128", "vit"],
)
def test_the_local_map_is_that_nearest_to_8_by_8(backbone: Backbone, size: int, stage: str, places: int) -> None:
    method = small_deep_infomax(backbone, image_size=size)
    assert (method.local_stage, method.places) == (stage, places)
    assert method.effective(64)["local map"] == f"{stage}, {places} places"
    assert method.effective(64)["negative images per vector"] == 63


def test_the_last_map_is_not_chosen_where_there_are_others() -> None:
    maps = {"shallow": torch.zeros(1, 2, 32, 32), "deep": torch.zeros(1, 2, 8, 8)}
    assert choose_stage(maps, None) == "shallow"
    assert choose_stage(maps, "deep") == "deep"


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_those_that_probes_see_whether_the_last_map_gives_them_or_not(pool: str) -> None:
    vit = VisionTransformer(image_size=SIZE, patch_size=4, width=8, depth=1, num_heads=2, pool=pool)
    for backbone, one_pass in ((vit, pool == "mean"), (Small(image_size=SIZE, width=2), True)):
        method = small_deep_infomax(backbone).eval()
        maps, features = method.encode(batch_of().views[0])
        assert method.one_pass == one_pass
        torch.testing.assert_close(features, method.features(batch_of().views[0]))
        torch.testing.assert_close(maps, backbone.stages(batch_of().views[0])[method.local_stage])


def test_a_step_sees_the_images_once() -> None:
    method, batch = small_deep_infomax(), batch_of()
    before = {name: value.clone() for name, value in method.backbone.named_buffers() if name.endswith("tracked")}
    assert all(value == 0 for value in before.values())  # finding the stages left no trace
    method(batch)
    assert {int(value) for name, value in method.backbone.named_buffers() if name.endswith("tracked")} == {1}


def test_embedding_starts_near_the_identity_and_ends_in_a_layer_norm() -> None:
    torch.manual_seed(0)
    embed = Embed(4, 6)
    shortcut = embed.shortcut.weight[:, :, 0, 0].detach()
    assert torch.equal(shortcut.diagonal(), torch.ones(4))
    assert float((shortcut - torch.eye(6, 4)).abs().max()) <= 0.01
    assert float((shortcut - torch.eye(6, 4)).abs().max()) > 0
    out = embed(torch.randn(3, 4, 2, 5) * 100)
    assert out.shape == (3, 6, 2, 5)
    torch.testing.assert_close(out.mean(1), torch.zeros(3, 2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, correction=0), torch.ones(3, 2, 5), atol=1e-2, rtol=0)


def test_vector_has_a_hidden_layer_where_asked_for() -> None:
    assert [type(part) for part in small_deep_infomax().head] == [nn.Linear]
    linear = [part for part in small_deep_infomax(hidden=24).head if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features) for part in linear] == [(16, 24), (24, 4)]


def test_every_batchnorm_is_synchronized() -> None:
    norms = [m for m in small_deep_infomax(alpha=1.0).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 5 + 2 + 2 + 1  # backbone, local term, map encoder, global term
    assert all(type(m) is SyncBatchNorm for m in norms)


class OnePlace(Backbone):
    """Stages of 4 x 4 and of a single place."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)["deep"].flatten(1)

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        return {"shallow": nn.functional.adaptive_avg_pool2d(images, 4), "deep": images.mean((2, 3), keepdim=True)}


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        (TinyNet(), {}, r"TinyNet has no stages\(images\): choose a resnet, small, vit or timm"),
        (Backbone(), {}, "returns features but no feature maps by stage: choose a resnet, small or vit"),
        (None, {"local_stage": "blok2"}, r"stages block1, block2, block3, block4, block5\. Did you mean 'block"),
        (OnePlace(), {"local_stage": "deep"}, "whose map has a single position: choose an earlier one of shallow"),
        (None, {"alpha": -1.0}, "alpha is -1.0, but the weight"),
        (None, {"beta": 0.0}, "alpha and beta are both 0.*set beta=1"),
        (None, {"measure": "jsd"}, r"must be one of: InfoNCE, DV, .*Did you mean 'JSD'"),
        (None, {"measure": "W1"}, "'W1', whose loss decreases without bound"),
        (None, {"measure": "X2"}, "'X2', whose loss decreases without bound"),
        (None, {"score": "cosine"}, "'cosine', but it must be one of: dot, concat"),
        (None, {"official_mask": True, "measure": "JSD"}, "only to measure=InfoNCE with score=dot"),
        (None, {"official_mask": True, "score": "concat"}, "only to measure=InfoNCE with score=dot"),
        (None, {"official_global": True, "score": "concat"}, "official_global applies only to score=dot"),
        (None, {"alpha": 1.0, "official_global": True, "local_stage": "block5"}, "2 x 2 positions.*at least 4 x 4"),
        (None, {"gradient_penalty": -1.0}, r"gradient_penalty is -1\.0, but the weight"),
        (None, {"dim": 0}, "dim is 0"),
        (None, {"units": 0}, "units is 0"),
        (None, {"map_hidden": 0}, "map_hidden is 0"),
        (None, {"hidden": 0}, "all positive"),
    ],
)
def test_impossible_values_are_refused(backbone: nn.Module | None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_deep_infomax(backbone, **changes)
