"""The attentive probe: one query attends to the tokens of a frozen network."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnable import start_of, task_of
from sslcli.backbones.base import Backbone
from sslcli.data.sources.base import Source
from sslcli.errors import ConfigError
from sslcli.evaluation import attentive
from sslcli.evaluation.attentive import Attentive
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.task import Task
from sslcli.methods.simclr import SimCLR
from tiny import TinyNet, copied_state, equal_states, vit

QUICK: dict[str, Any] = {
    "epochs": 40, "batch_size": 60, "lrs": [0.02, 0.1], "weight_decays": [0.0], "feature_norm": "none", "resamples": 20,
}  # fmt: skip
CROPS: dict[str, Any] = {**QUICK, "epochs": 2, "crop_scale": [0.9, 1.0], "flip": 0.5}


class Marked(Source):
    """Images of 16 patches, one of them red, at a random place: its green is the class, and that of others is noise."""

    name, classes = "marked", ["dark", "bright"]

    def __init__(self) -> None:
        super().__init__(image_size=8)
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(360) % 2
        patches = torch.randint(0, 256, (360, 16, 3), generator=generator)
        patches[:, :, 0] = 0
        place = torch.randint(0, 16, (360,), generator=generator)
        patches[torch.arange(360), place, 0] = 255
        patches[torch.arange(360), place, 1] = 40 + 175 * self.labels
        maps = patches.transpose(1, 2).view(360, 3, 4, 4)
        self.images = F.interpolate(maps.float(), scale_factor=2).to(torch.uint8)
        self.splits = {"train": torch.arange(300), "val": torch.arange(0), "test": torch.arange(300, 360)}


class Patches(Backbone):
    """Tokens are the pixels of patches of 2 x 2 pixels, and the features are the mean token."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)["patches"].mean((2, 3))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        return {"patches": F.pixel_unshuffle(images, 2)}


@pytest.fixture(scope="module")
def marked() -> Task:
    return task_of(Marked())


@pytest.fixture(scope="module")
def result(marked: Task) -> dict[str, Any]:
    starts = {name: start_of(Patches(), marked, layer="patches-tokens") for name in ("trained", "random")}
    return Attentive(**QUICK)(starts, marked).result


def test_attention_finds_the_class_in_one_patch_that_the_mean_of_patches_hides(
    marked: Task, result: dict[str, Any]
) -> None:
    mean = Linear(epochs=20, resamples=20).measure(start_of(Patches(), marked, layer="patches").features)
    assert mean["top1"] < 0.75 < 0.95 <= result["top1"]


def test_the_result_states_its_settings_and_is_selected_on_held_out_images(
    marked: Task, result: dict[str, Any]
) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["protocol"], result["split"], result["n_train"], result["n_test"]) == ("attentive", "test", 300, 60)
    assert (result["num_tokens"], result["num_heads"]) == (16, 1)
    best = max(result["grid"], key=lambda entry: (entry["val_top1"], -entry["val_loss"]))
    assert result["chosen"] == {"lr": best["lr"], "weight_decay": best["weight_decay"]}
    assert {"top1", "top5", "interval", "chosen"} == result["baselines"]["random"].keys()
    assert result["baselines"]["random"]["top1"] == result["top1"]  # the same network
    assert Attentive(**QUICK).description(result) == (
        "attentive probe (one query attends to 16 tokens of the frozen backbone, 1 x image size, no crop), 40 epochs, "
        "trained on 300 training images, measured on 60 images of test: the published protocol trains on random crops "
        "(protocol.crop_scale=[0.08,1] protocol.flip=0.5), which can change the accuracy; not comparable with linear "
        "accuracies"
    )
    assert "flip p=0.5), 2 epochs, trained on" in (published := Attentive(**CROPS).description(
        result | {"train_transform": Attentive(**CROPS).view().describe()}
    ))  # fmt: skip
    assert published.endswith("comparable with published attentive accuracies of the same backbone and pre-training, "
                              "not with linear accuracies")  # fmt: skip


def test_the_reported_images_have_no_influence_on_the_selection(marked: Task) -> None:
    quick = Attentive(**QUICK | {"epochs": 2})
    start = start_of(Patches(), marked, layer="patches-tokens")
    found = quick.measure("trained", start, marked)
    other = quick.measure(
        "trained", replace(start, features=replace(start.features, test=-start.features.test)), marked
    )
    assert (other["grid"], other["chosen"]) == (found["grid"], found["chosen"])
    # the classifiers that select have seen no held-out image: its label changes their accuracy, but not their weights
    _, out = attentive.held_out(torch.arange(300), start.features.train_labels, fraction=0.1, seed=0)
    labels = start.features.train_labels.clone()
    labels[out] = 1 - labels[out]
    relabeled = replace(start, features=replace(start.features, train_labels=labels))
    heads, others = (quick.train("trained", each, marked, out).heads for each in (start, relabeled))
    assert torch.equal(heads.weight[2:], others.weight[2:])
    assert not torch.equal(heads.weight[:2], others.weight[:2])


def test_tokens_are_the_positions_of_the_feature_map_in_both_modes(marked: Task, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    net = vit().eval()
    start = start_of(net, marked, layer="patches-tokens")
    images = marked.prepare(marked.source.images[300:].float() / 255)
    with torch.no_grad():
        tokens, _ = net.tokens(images)
    torch.testing.assert_close(start.features.test.view(60, 16, 16), tokens[:, 1:])
    monkeypatch.setattr(attentive, "PART", 32)
    positions = start.features.test_positions
    kept = list(Attentive(**QUICK).whole_images(start, marked, start.features.test, positions))
    pooled = start_of(net, marked, layer="patches")
    found = list(Attentive(**CROPS).whole_images(pooled, marked, pooled.features.test, positions))
    assert [len(part) for part in kept] == [len(part) for part in found] == [32, 28]
    assert torch.equal(torch.cat(kept), torch.cat(found))


def test_random_crops_train_a_frozen_network_in_evaluation_mode(marked: Task) -> None:
    class Normed(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(12)

        def stages(self, images: Tensor) -> dict[str, Tensor]:
            return {"patches": self.norm(F.pixel_unshuffle(images, 2))}

    start = start_of(Normed(), marked, layer="patches")
    before, modes = copied_state(start.net), list[bool]()
    hook = start.net.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    found = Attentive(**CROPS)({"trained": start}, marked).result
    hook.remove()
    assert set(modes) == {False}
    assert equal_states(before, copied_state(start.net))
    assert (found["train_transform"], found["num_tokens"]) == ("1 x image size, crop 0.9-1, flip p=0.5", 16)
    of_vit = start_of(vit().eval(), marked, layer="patches")  # its maps are transposed tokens
    assert Attentive(**CROPS).measure("trained", of_vit, marked)["num_tokens"] == 16


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(marked: Task) -> None:
    start = start_of(Patches(), marked, layer="patches-tokens")
    settings = QUICK | {"epochs": 2, "feature_norm": "batch_norm"}
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(Attentive(**settings).measure("trained", start, marked))
    assert found[0] == found[1]
    assert Attentive(**settings, seed=1).measure("trained", start, marked)["grid"] != found[0]["grid"]
    alone = Attentive(**settings | {"lrs": [found[0]["chosen"]["lr"]]}).measure("trained", start, marked)
    assert (alone["grid"], alone["chosen"]) == ([], found[0]["chosen"])
    assert alone["top1"] == found[0]["top1"]  # a classifier does not depend on the others


def test_tokens_of_another_scale_are_normalized_by_batch_norm(marked: Task) -> None:
    class Scaled(Patches):
        def stages(self, images: Tensor) -> dict[str, Tensor]:
            return {"patches": super().stages(images)["patches"] * 1e-3 + 10}

    start = start_of(Scaled(), marked, layer="patches-tokens")
    raw, normed = (
        Attentive(**QUICK | {"lrs": [0.1], "feature_norm": norm}).measure("trained", start, marked)
        for norm in ("none", "batch_norm")
    )
    assert raw["top1"] < 0.75 < 0.9 < normed["top1"]


def test_the_layer_is_the_last_feature_map() -> None:
    images = torch.zeros(2, 3, 8, 8)
    probe, crops = Attentive(), Attentive(flip=0.5)
    assert probe.choose_layer("backbone", vit(), images) == ("patches-tokens", "patches-tokens")
    assert crops.choose_layer("backbone", SimCLR(vit()), images) == ("patches", "patches")
    with pytest.raises(ConfigError, match=r"TinyNet has neither .* choose protocol=linear .* backbone=vit_tiny"):
        probe.choose_layer("backbone", TinyNet(), images)
    with pytest.raises(ConfigError, match=r"'projection', but protocol=attentive .*: choose one of patches"):
        probe.choose_layer("projection", SimCLR(vit()), images)
    with pytest.raises(ConfigError, match="num_heads=3 must divide the width 16"):
        Attentive(num_heads=3).choose_layer("backbone", vit(), images)


def test_heads_have_64_values_where_the_width_allows() -> None:
    assert [Attentive().heads_of(width) for width in (16, 64, 192, 200, 384, 2048)] == [1, 1, 3, 2, 6, 32]
    assert Attentive(num_heads=4).heads_of(16) == 4


def test_the_name_has_what_changes_the_quantity() -> None:
    assert Attentive().variant({}) == Attentive(lrs=[0.1], batch_size=512).variant({}) == ""
    changed = Attentive(epochs=10, crop_scale=[0.08, 1.0], flip=0.5, num_heads=3, feature_norm="none")
    assert changed.variant({}) == "epochs-10_num-heads-3_feature-norm-none_crop-scale-0.08-1_flip-0.5"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lrs": []}, "at least one number"),
        ({"lrs": [0.0]}, "all above 0"),
        ({"weight_decays": [-1.0]}, "all at least 0"),
        ({"feature_norm": "layer"}, "choose none or batch_norm"),
        ({"epochs": 0}, "epochs=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"crop_scale": [2.0, 3.0]}, "crop_scale"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Attentive(**settings)
