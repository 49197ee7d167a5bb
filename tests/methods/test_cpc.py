from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sslcli.backbones.small import Small
from sslcli.backbones.vit import VisionTransformer
from sslcli.methods.base import Batch
from sslcli.methods.cpc import CPC, CPCv2, PatchPrediction
from sslcli.methods.cpc_context import CONTEXTS
from sslcli.methods.cpc_losses import sampled_contrast
from sslcli.methods.cpc_patches import PatchAugmentation, patchify
from tiny import TinyNet, make_batch

KINDS = {"v1": CPC, "v2": CPCv2}
DIRECTIONS = range(4)


def tiny_cpc(kind: str = "v1", **changes: object) -> PatchPrediction:
    """16-pixel images in 3 x 3 patches of 8 pixels; what is predicted is the last row."""
    values: dict[str, object] = {"image_size": 16, "grid": 3, "hidden": 6, "skip": 1, "steps": 1}
    return KINDS[kind](TinyNet(norm=False), **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "expected"), [("v1", math.log(1 + 5)), ("v2", 4 * math.log(8 * 3 * 3))])
def test_predictions_of_zero_are_a_guess(kind: str, expected: float) -> None:
    method = tiny_cpc(kind, directions=4, **({"negatives": 5} if kind == "v1" else {}))
    for parameter in method.predict.parameters():
        nn.init.zeros_(parameter)
    found = method(make_batch(8, views=1, size=16))
    assert float(found["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(found["accuracy"]) == 0.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_direction_predicts_the_patch_that_lies_ahead_of_it(direction: int) -> None:
    """Of one image the loss of a direction reads contexts of the first row as seen from it, targets of the last."""
    method = tiny_cpc("v1", directions=4, negatives=1).double()
    marked = torch.arange(9, dtype=torch.float64).view(1, 3, 3, 1).expand(1, 3, 3, 8)
    seen: list[tuple[Tensor, Tensor]] = []
    method.contrasts = lambda context, z, d: (
        seen.append((context, z))
        or [  # type: ignore[method-assign,func-returns-value]
            sampled_contrast(context, context, torch.zeros(1, 1, 3, 1, dtype=torch.long))
        ]
    )
    method.encode = lambda patches: marked  # type: ignore[method-assign]
    method(make_batch(1, views=1, size=16, dtype=torch.float64))
    context, z = seen[direction]
    last_rows = [[6, 7, 8], [2, 5, 8], [2, 1, 0], [6, 3, 0]]
    assert sorted(z[0, 2, :, 0].tolist()) == sorted(last_rows[direction])
    torch.testing.assert_close(context, method.context(z.mT.transpose(1, 2)).movedim(1, 3)[:, :1])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_of_the_rows_without_targets_add_nothing_to_loss_and_gradients(kind: str, context: str) -> None:
    """The same loss as with the contexts of all rows, from which `contrasts` takes the first."""
    torch.manual_seed(0)
    method = tiny_cpc(kind, image_size=32, grid=7, steps=2, skip=1, directions=4, context=context).double()
    batch = make_batch(3, views=1, size=32, dtype=torch.float64)
    noise = copy.deepcopy(method.noise)
    loss = method(batch)["loss"]
    found = [loss.detach(), *torch.autograd.grad(loss, list(method.parameters()))]
    method.noise, losses = noise, []
    z = method.encode(patchify(batch.views[0], method.patch))
    for direction in DIRECTIONS:
        turned = torch.rot90(z, -direction, (1, 2))
        all_rows = method.context(turned.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        losses += [part.loss for part in method.contrasts(all_rows, turned, direction)]
    loss = method.total(torch.stack(losses))
    torch.testing.assert_close(found, [loss.detach(), *torch.autograd.grad(loss, list(method.parameters()))])


def test_directions_share_the_context_network_and_not_the_predictions() -> None:
    one, four = (tiny_cpc("v2", directions=number) for number in (1, 4))
    count = [sum(p.numel() for p in method.context.parameters()) for method in (one, four)]
    assert count[0] == count[1]
    assert sum(p.numel() for p in four.predict.parameters()) == 4 * sum(p.numel() for p in one.predict.parameters())


def test_loss_of_v1_is_a_mean_and_that_of_v2_a_sum_over_offsets_and_directions() -> None:
    parts = torch.tensor([1.0, 2.0, 6.0])
    assert float(tiny_cpc("v1").total(parts)) == 3.0
    assert float(tiny_cpc("v2").total(parts)) == 9.0


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_mean_over_patches_encoded_one_by_one_without_augmentation(kind: str) -> None:
    method = tiny_cpc(kind, augmentation=PatchAugmentation(crop=0.2, jitter=1.0, jitter_p=1.0, grayscale=1.0))
    images = torch.randn(2, 3, 16, 16)
    windows = [images[:, :, y : y + 8, x : x + 8] for y in (0, 4, 8) for x in (0, 4, 8)]
    expected = torch.stack([method.backbone(window) for window in windows]).mean(0)
    torch.testing.assert_close(method.features(images), expected)
    assert not torch.allclose(expected, method.backbone(images))
    assert method.features(torch.randn(2, 3, 24, 24)).shape == (2, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_gray_images_are_seen_in_training_and_in_features(kind: str) -> None:
    color, gray = (tiny_cpc(kind, grayscale=value) for value in (False, True))
    color.load_state_dict(gray.state_dict())
    images = torch.randn(2, 3, 16, 16)
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    gray_images = luma.expand(2, 3, 16, 16)
    torch.testing.assert_close(gray.features(images), color.features(gray_images))
    assert not torch.allclose(gray.features(images), color.features(images))
    losses = [
        method(Batch([view], torch.arange(2), torch.arange(2)))["loss"]
        for method, view in ((gray, images), (color, gray_images))
    ]
    torch.testing.assert_close(*losses)


def test_encodings_of_patches_do_not_depend_on_other_patches() -> None:
    method = tiny_cpc()
    patches = torch.randn(2, 3, 3, 3, 8, 8, requires_grad=True)
    method.encode(patches)[0, 1, 2].sum().backward()
    assert patches.grad is not None
    touched = patches.grad.abs().sum((3, 4, 5)) > 0
    assert touched[0, 1, 2]
    assert int(touched.sum()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_with_batchnorm_is_refused_with_the_remedy(kind: str) -> None:
    with pytest.raises(ValueError, match=r"Small has BatchNorm \(5 layers, the first is block1.1\).*norm=layer"):
        KINDS[kind](Small(image_size=32), image_size=32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 64])
def test_networks_without_batchnorm_train_at_every_usual_size(kind: str, size: int) -> None:
    for net in (
        Small(image_size=size, width=4, norm="layer"),
        Small(image_size=size, width=4, norm="none"),
        VisionTransformer(image_size=size, patch_size=4, width=16, depth=1, num_heads=2),
    ):
        method = KINDS[kind](net, image_size=size, hidden=4)
        found = method(make_batch(2, views=1, size=size))
        found["loss"].backward()
        assert found["loss"].isfinite()
        assert method.features(torch.zeros(2, 3, size, size)).shape == (2, net.num_features)
        assert method.effective(2)["patches"] == f"7 x 7 of {size // 4} pixels"
        large = KINDS[kind](net, image_size=size, hidden=4, min_patch_size=16, skip=None)
        assert large.effective(2)["patches"] == f"{3 if size == 32 else 7} x {3 if size == 32 else 7} of 16 pixels"
        assert large(make_batch(2, views=1, size=size))["loss"].isfinite()


def test_offsets_are_all_rows_below_the_skipped_ones_or_the_first_of_them() -> None:
    def offsets(**values: int | None) -> list[int]:
        return list(tiny_cpc(image_size=32, grid=7, **values).offsets)

    assert offsets(steps=None, skip=1) == [2, 3, 4, 5, 6]
    assert offsets(steps=2, skip=0) == [1, 2]
    assert list(tiny_cpc("v2", image_size=32, grid=7, steps=1, skip=2).offsets) == [3]
    assert tiny_cpc("v2", image_size=32, grid=7, steps=1, skip=2).effective(4) == {
        "patches": "7 x 7 of 8 pixels",
        "predicted row offsets": "3",
        "negatives per query": 4 * 49 - 1,
    }


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("v1", {"steps": 3}, r"steps is 3, but with 3 rows of patches and skip=1 it must be 1 to 1"),
        ("v1", {"steps": 0}, "steps is 0"),
        ("v2", {"skip": 2}, "skip is 2, but it must be 0 to 1"),
        ("v1", {"skip": -1}, "skip is -1"),
        ("v1", {"directions": 5}, "directions is 5"),
        ("v1", {"negatives": 0}, "negatives is 0"),
        ("v1", {"context": "lstm"}, "context is 'lstm', but it must be one of: gru, pixelcnn_gated, pixelcnn_v2"),
        ("v2", {"hidden": 0}, "hidden is 0"),
        ("v2", {"dim": 0}, "dim is 0"),
        ("v2", {"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_impossible_values_are_refused(kind: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_cpc(kind, **changes)
