"""The protocol semi: fine-tuning on few labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from PIL import Image

from learnable import Colors, task_of
from sslcli.data.sources.base import Source
from sslcli.data.sources.files import Folder, ImageNet, ListFile
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.semi import Semi
from sslcli.evaluation.task import Start, Task

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 16, "lrs": [0.1, 1.0]}


def test_few_labels_give_the_mean_and_deviation_over_seeds(task: Task, starts: dict[str, Start]) -> None:
    protocol = Semi(**QUICK, fraction=None, labels_per_class=4, seeds=3)
    found = protocol(starts, task)
    result = found.result
    top1 = [run["top1"] for run in result["runs"]]
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    assert (result["top1"], result["std"]) == (fmean(top1), stdev(top1))
    assert result["n_train"] == 12
    described = (
        "fine-tuning on 12 of 60 labels for 12 steps, mean over 3 seeds (random subsets, not those of publications)"
    )
    assert protocol.description(result).startswith(
        f"{described}, measured on 30 images of test: compare with the random"
    )
    assert torch.bincount(task.source.labels[found.positions]).tolist() == [4, 4, 4]
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]
    for arm in (result, result["baselines"]["random"]):
        assert {"top1", "std", "interval"} <= arm["linear"].keys()
    again = protocol(copy.deepcopy(starts), task)
    assert again.result == result


def test_one_seed_has_no_deviation_and_one_label_a_class_no_choice(task: Task, starts: dict[str, Start]) -> None:
    settings = QUICK | {"fraction": None, "labels_per_class": 1, "seeds": 1, "linear": False}
    result = Semi(**settings)({"trained": starts["trained"]}, task).result
    assert (result["std"], result["grid"], result["chosen"]) == (None, [], {"lr": 0.1})
    assert "linear" not in result
    assert "baselines" not in result


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"fraction": None}, "all null"),
        ({"list": "few.txt", "labels_per_class": 4}, "set only one"),
        ({"list": "nowhere.txt"}, "list=nowhere.txt cannot be read"),
        ({"fraction": 1.5}, "at most 1"),
        ({"labels_per_class": 0}, "at least 1"),
        ({"seeds": 0}, "seeds=0"),
    ],
)
def test_subsets_that_cannot_be_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Semi(**settings)


def image_files(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def source_of(layout: str, root: Path) -> Source:
    """Two classes of ten training images and two test images each, as class folders, as ImageNet or as a CSV list."""
    common: dict[str, Any] = {"image_size": 8, "workers": 0}
    names = [f"n0{c}/n0{c}_{i}.JPEG" for c in range(2) for i in range(12)]
    train = [name for number, name in enumerate(names) if number % 12 < 10]
    test = [name for name in names if name not in train]
    if layout == "list":
        image_files(root / "all", [name.rpartition("/")[2] for name in names])
        for part, members in (("train", train), ("test", test)):
            lines = [f"all/{name.rpartition('/')[2]},{name[:3]}" for name in members]
            (root / f"{part}.csv").write_text("\n".join(["path,label", *lines, ""]))
        return ListFile(file=str(root / "train.csv"), test=str(root / "test.csv"), **common)
    image_files(root / "train", train)
    image_files(root / "val", test)
    if layout == "imagenet":
        return ImageNet(root=str(root), **common)
    return Folder(root=str(root / "train"), test=str(root / "val"), **common)


def labels_of(source: Source, protocol: Semi) -> FeatureSet:
    """A feature set with the images that the protocol uses and without information in its features."""
    positions = protocol.training_positions(source, {})
    tested = source.splits["test"]
    return FeatureSet(
        train=torch.zeros(len(positions), 1),
        train_labels=source.labels[positions],
        train_positions=positions,
        test=torch.zeros(len(tested), 1),
        test_labels=source.labels[tested],
        num_classes=2,
    )


@pytest.mark.parametrize("layout", ["folders", "imagenet", "list"])
def test_a_list_selects_its_images_also_those_of_val(layout: str, tmp_path: Path) -> None:
    source = source_of(layout, tmp_path / "images")
    assert len(source.splits["val"]) == 2
    names = ["n01_3.JPEG", "n00_0.JPEG", *(Path(source.path(int(p))).name for p in source.splits["val"])]
    names = sorted(set(names))
    (tmp_path / "few.txt").write_text("\n".join(names))
    protocol = Semi(list=str(tmp_path / "few.txt"), seeds=2)
    data = labels_of(source, protocol)
    one, other = protocol.subsets(data, source)
    assert torch.equal(one, other)
    assert sorted(Path(source.path(int(p))).name for p in data.train_positions[one]) == names
    assert protocol.variant({}).startswith("list-few-")
    (tmp_path / "few.txt").write_text(Path(source.path(int(source.splits["test"][0]))).name)
    with pytest.raises(ValueError, match=r"1 of the 1 names .* are not names of labeled training images"):
        Semi(list=str(tmp_path / "few.txt")).subsets(data, source)
    (tmp_path / "few.txt").write_text("n00_0.JPEG\nn00_1.JPEG\n")
    with pytest.raises(ValueError, match="single class"):
        Semi(list=str(tmp_path / "few.txt")).subsets(data, source)


def test_a_fraction_is_that_of_all_training_images(tmp_path: Path) -> None:
    source = source_of("folders", tmp_path)
    protocol = Semi(fraction=0.5, seeds=2)
    data = labels_of(source, protocol)
    assert len(data.train) == 20
    one, other = protocol.subsets(data, source)
    assert (
        torch.bincount(data.train_labels[one]).tolist() == torch.bincount(data.train_labels[other]).tolist() == [5, 5]
    )
    assert not torch.equal(one, other)
    source.splits.pop("test")  # then val is reported
    assert protocol.training_positions(source, {}).tolist() == source.splits["train"].tolist()


def test_the_name_says_if_a_fraction_includes_images_that_earlier_results_left_out(starts: dict[str, Start]) -> None:
    class Held(Colors):
        def __init__(self) -> None:
            super().__init__()
            self.splits |= {"train": torch.arange(48), "val": torch.arange(48, 60)}

    settings = QUICK | {"seeds": 1, "linear": False, "steps": 1, "lrs": [0.1]}
    start = {"trained": starts["trained"]}
    assert Semi(**settings, fraction=0.1)(start, task_of(Colors())).variant == ""
    found = Semi(**settings, fraction=0.1)(start, task_of(Held()))
    assert (found.variant, found.result["n_train"], found.result["n_pool"]) == ("train-and-val", 6, 60)
    assert Semi(**settings, labels_per_class=2)(start, task_of(Held())).variant == ""
