import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sslcli.data.sources.base import Shapes, Source
from sslcli.data.sources.files import ImageNet
from sslcli.data.sources.shapes import CLASSES, Nuisances, draw
from sslcli.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf" / "dataset"


class Numbered(Source):
    """n images that are distinguishable by their position only."""

    def __init__(self, n: int, *, unlabeled: int = 0, **keywords):
        super().__init__(image_size=8, **keywords)
        self.labels = torch.zeros(n, dtype=torch.int64)
        self.labels[n - unlabeled :] = -1
        self.split(torch.arange(n), labeled=self.labels >= 0)


def test_a_tenth_of_fifty_thousand_is_exactly_held_out():
    splits = Numbered(50_000).splits
    assert (len(splits["train"]), len(splits["val"])) == (45_000, 5_000)
    both = torch.cat([splits["train"], splits["val"]])
    assert torch.equal(both.sort().values, torch.arange(50_000))
    assert bool((splits["train"].diff() > 0).all())
    assert "test" not in splits


def test_split_depends_on_the_seed_alone():
    assert torch.equal(Numbered(500).splits["val"], Numbered(500).splits["val"])
    assert not torch.equal(Numbered(500).splits["val"], Numbered(500, seed=1).splits["val"])


def test_more_images_move_few_others_between_splits():
    before, after = set(Numbered(10_000).splits["val"].tolist()), set(Numbered(10_100).splits["val"].tolist())
    assert len({position for position in before ^ after if position < 10_000}) < 60


def test_unlabeled_images_are_never_held_out():
    splits = Numbered(1000, unlabeled=800).splits
    assert len(splits["val"]) == 20
    assert int(splits["val"].max()) < 200
    assert len(Numbered(1000, unlabeled=1000).splits["val"]) == 0


def test_limits_nest_and_bound_both_splits():
    small, large, everything = Numbered(1000, limit=30), Numbered(1000, limit=60), Numbered(1000)
    for split in ("train", "val"):
        assert len(small.splits[split]) == 30
        assert set(small.splits[split].tolist()) < set(large.splits[split].tolist())
        assert set(large.splits[split].tolist()) < set(everything.splits[split].tolist())


def test_pre_training_on_val_adds_its_images_to_train_and_keeps_val():
    splits, apart = Numbered(1000, unlabeled=100, pretrain_on_val=True).splits, Numbered(1000, unlabeled=100).splits
    assert torch.equal(splits["train"], torch.arange(1000))
    assert torch.equal(splits["val"], apart["val"])
    without = Numbered(1000, unlabeled=100, pretrain_on_val=True).without_labels_of("val", "test")
    assert torch.equal(without, apart["train"])


def test_a_limit_includes_the_images_of_val_that_are_pre_trained_on():
    sizes = {limit: Numbered(1000, limit=limit, pretrain_on_val=True) for limit in (1, 2, 30, 60, 2000)}
    assert [len(s.splits["train"]) for s in sizes.values()] == [1, 2, 30, 60, 1000]
    assert [len(s.splits["val"]) for s in sizes.values()] == [0, 1, 3, 6, 100]
    for small, large in ((2, 30), (30, 60), (60, 2000)):
        for split in ("train", "val"):
            assert set(sizes[small].splits[split].tolist()) < set(sizes[large].splits[split].tolist())
        assert set(sizes[large].splits["val"].tolist()) < set(sizes[large].splits["train"].tolist())


def test_images_that_a_list_holds_out_are_not_pre_trained_on():
    source = Numbered(10, pretrain_on_val=True)
    source.split(torch.arange(10), labeled=torch.ones(10, dtype=torch.bool), held_out=torch.arange(10) < 4)
    assert source.splits["val"].tolist() == [0, 1, 2, 3]
    assert source.splits["train"].tolist() == [4, 5, 6, 7, 8, 9]


def test_limit_above_the_set_means_all():
    assert torch.equal(Numbered(50, limit=10_000).splits["train"], Numbered(50).splits["train"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"limit": -1}, r"dataset\.limit is -1, .*at least 1.*null"),
        ({"limit": 0}, r"dataset\.limit is 0"),
        ({"val_fraction": 1.0}, r"dataset\.val_fraction is 1\.0"),
        ({"val_fraction": -0.1}, r"dataset\.val_fraction is -0\.1"),
        ({"pretrain_on_val": 1}, r"dataset\.pretrain_on_val is 1, but it must be true or false"),
        ({"val_fraction": 0.99}, r"leaves none of the 4 images for training"),
        ({"workers": -1}, r"dataset\.workers is -1"),
        ({"workers": 1.5}, r"dataset\.workers is 1\.5"),
        ({"std": (0.2, 0.0, 0.2)}, r"dataset\.std .*above 0"),
        ({"mean": (0.5,)}, r"dataset\.mean is \[0\.5\], .*3 numbers"),
    ],
)
def test_wrong_keyword_is_named_with_its_value(keywords, message):
    with pytest.raises(ValueError, match=message):
        Numbered(4, **keywords)


def test_shapes_are_those_drawn_at_their_position():
    source = Shapes(train_images=20, test_images=5, image_size=16, seed=3, nuisances={"color": 0.0})
    images, labels = draw(torch.arange(25), seed=3, size=16, nuisances=Nuisances(color=0.0))
    assert torch.equal(source.images, images)
    assert torch.equal(source.labels, labels)
    assert source.splits["test"].tolist() == list(range(20, 25))
    assert source.classes == list(CLASSES)
    assert source.has_labels
    assert np.array_equal(np.asarray(source.read(7)).transpose(2, 0, 1), images[7].numpy())


def test_limited_shapes_are_the_same_images_at_the_same_positions():
    whole = Shapes(train_images=60, test_images=3, image_size=16)
    few = Shapes(train_images=60, test_images=3, image_size=16, limit=10)
    assert len(few) == len(whole)
    for positions in few.splits.values():
        assert torch.equal(few.images[positions], whole.images[positions])
        assert torch.equal(few.labels[positions], whole.labels[positions])
    assert few.fingerprint == whole.fingerprint


def test_unknown_nuisance_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"unknown key 'colour': the known keys are color, texture"):
        Shapes(nuisances={"colour": 1.0})
    with pytest.raises(ValueError, match="light is 2"):
        Shapes(nuisances={"light": 2})
    with pytest.raises(ValueError, match=r"nuisances\.light is 'much'"):
        Shapes(nuisances={"light": "much"})


def test_shapes_fingerprint_tells_what_is_drawn():
    keywords = [{}, {"seed": 1}, {"image_size": 24}, {"nuisances": {"light": 0.5}}, {"train_images": 9}]
    prints = [Shapes(**{"train_images": 8, "test_images": 2, "image_size": 16, **k}).fingerprint for k in keywords]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


def keywords_of(kind) -> set[str]:
    names = set()
    for base in kind.__mro__[:-1]:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                return names
    return names


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_writes_out_every_keyword_of_its_class(path):
    values = yaml.safe_load(path.read_text())
    module, _, name = values.pop("_target_").rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    expected = keywords_of(kind) - ({"test"} if kind is ImageNet else set())
    assert set(values) == expected
    if kind is Shapes:
        assert set(values["nuisances"]) == set(Nuisances.__dataclass_fields__)
        small = {"train_images": 4, "test_images": 1, "image_size": 16}
        assert Shapes(**{**values, **small}).has_labels


def test_yaml_words():
    words = {path.stem for path in CONF.glob("*.yaml")}
    assert words == {
        "shapes",
        "cifar10",
        "cifar100",
        "stl10",
        "svhn",
        "imagenet",
        "folder",
        "flat",
        "list",
        "parallel",
        "hf",
        "hf_stream",
    }


def test_a_source_that_sets_an_old_name_is_rejected_with_the_new_one():
    with pytest.raises(ConfigError, match="Mine sets place, which is now modality_channels: rename it"):
        type("Mine", (Source,), {"place": None})
