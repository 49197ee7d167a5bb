"""k-NN evaluation during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from learnable import Colors
from processes import Pair
from small_runs import make_folder
from sslcli.config.settings import MonitorSettings
from sslcli.data.sources.files import Folder
from sslcli.data.views.views import Views
from sslcli.distributed import collectives
from sslcli.errors import ConfigError, NotFinite
from sslcli.evaluation import online
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.knn import Knn
from sslcli.evaluation.online import collect, knn_probe
from sslcli.methods.base import Method
from sslcli.nn.modes import statistics_of_main
from tiny import TinyNet


def test_a_split_whose_images_have_become_unreadable_is_named(tmp_path: Path) -> None:
    source = Folder(root=make_folder(tmp_path, per_class=4, broken=0), image_size=8, val_fraction=0.5)
    for position in source.splits["val"].tolist():
        Path(source.path(position)).write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"none of the 4 images of val can be read.* repair or remove them"):
        collect(
            lambda images: images.flatten(1),
            source,
            {"train": source.splits["train"], "val": source.splits["val"]},
            prepare=lambda images: images,
            batch_size=4,
            device=torch.device("cpu"),
            precision="fp32",
        )


class Counting(Folder):
    """Records the positions of the images that this process reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root=root, image_size=8, val_fraction=0.3, workers=0)
        self.reads: list[int] = []

    def read(self, position: int) -> Image.Image:
        self.reads.append(position)
        return super().read(position)


def monitor_settings(**changes: Any) -> MonitorSettings:
    settings = {"knn_every_epochs": 1, "knn_k": 5, "knn_temperature": 0.1, "knn_images": None, "pictures": 0}
    return MonitorSettings(**(settings | {"health_every_steps": 0, "on_collapse": "ignore"} | changes))


def probed_folder(root: Path, batch: int, precision: str) -> tuple[list[int], dict[str, float]]:
    """Measure k-NN with two images per batch. The network has other statistics on each process."""
    source = Counting(root)
    torch.manual_seed(0)
    method = Method(TinyNet())
    norm = method.backbone.norm
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.full((8,), 0.1 + collectives.rank())
    online.BATCH, before = batch, online.BATCH
    try:
        found = knn_probe(
            method, source, Views([{}]), monitor_settings(), device=torch.device("cpu"), precision=precision
        )()
    finally:
        online.BATCH = before
    assert torch.equal(norm.running_mean, torch.full((8,), 0.1 + collectives.rank()))
    return source.reads, found


@pytest.mark.parametrize(("batch", "precision"), [(2, "fp32"), (2, "bf16"), (64, "fp32")])
def test_processes_share_the_images_and_measure_the_accuracy_of_one(
    tmp_path: Path, pair: Pair, four: Pair, batch: int, precision: str
) -> None:
    root = make_folder(tmp_path, per_class=15, broken=1)
    reads, one = probed_folder(root, batch, precision)
    assert 0 < one["knn_top1"] < 1
    for processes in (pair, four):
        answers = processes.run(probed_folder, root, batch, precision)
        assert [found for _, found in answers] == [one] * processes.size
        assert sorted(position for each, _ in answers for position in each) == sorted(reads)
        assert len(set(reads)) == len(reads)
        if batch == 2:
            assert max(len(each) for each, _ in answers) <= len(reads) / processes.size + 2 * batch


def features_of_colors(fails_at: int) -> FeatureSet | str:
    source, net = Colors(), nn.Flatten()
    splits = {name: source.splits[name] for name in ("train", "test")}

    def encode(images: torch.Tensor) -> torch.Tensor:
        if collectives.rank() == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return net(images)

    device = torch.device("cpu")
    try:
        return collect(encode, source, splits, prepare=lambda x: x, batch_size=7, device=device, precision="fp32")
    except MemoryError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"own: {error}"


def test_features_have_the_bits_of_one_process_and_an_error_ends_all(pair: Pair) -> None:
    one = features_of_colors(-1)
    assert isinstance(one, FeatureSet)
    for found in pair.run(features_of_colors, -1):
        assert isinstance(found, FeatureSet)
        for name, tensor in vars(one).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(getattr(found, name), tensor), name
    assert pair.run(features_of_colors, 1) == ["CUDA out of memory.", "own: CUDA out of memory."]


def batches_of_colors() -> list[tuple[int, float]]:
    """Return the number of images and the sum of the pixels of every batch that this process encodes."""
    found = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        found.append((len(images), float(images.double().sum())))
        return images.flatten(1)

    source = Colors()
    splits = {name: source.splits[name] for name in ("train", "test")}
    device = torch.device("cpu")
    collect(encode, source, splits, prepare=lambda x: x, batch_size=7, device=device, precision="fp32")
    return found


def test_batches_do_not_depend_on_the_number_of_processes(pair: Pair, four: Pair) -> None:
    one = batches_of_colors()
    assert len(one) == 9 + 5
    for processes in (pair, four):
        found = processes.run(batches_of_colors)
        assert len({len(each) for each in found}) == 1, "a forward pass of a sharded network is a collective"
        assert sorted(batch for each in found for batch in each if batch != (1, 0.0)) == sorted(one)


def classified(chunk: int) -> dict[str, Any]:
    torch.manual_seed(0)
    features = FeatureSet(
        train=torch.randn(60, 4),
        train_labels=torch.arange(60) % 5,
        val=torch.randn(23, 4),
        val_labels=torch.arange(23) % 5,
        test=torch.randn(9, 4),
        test_labels=torch.arange(9) % 5,
        num_classes=5,
    )
    return Knn(k=7, chunk=chunk).measure(features)


@pytest.mark.parametrize("chunk", [4, 10, 1024])
def test_processes_classify_parts_of_the_queries(pair: Pair, chunk: int) -> None:
    one = classified(chunk)
    assert {"top1", "top5", "interval", "test_top1"} <= one.keys()
    assert pair.run(classified, chunk) == [one] * 2


def diverged() -> str:
    method = Method(TinyNet())
    nn.init.constant_(method.backbone.conv.weight, float("inf"))  # type: ignore[arg-type,union-attr]
    source = Colors()
    source.splits["val"] = source.splits["test"]
    probe = knn_probe(method, source, Views([{}]), monitor_settings(), device=torch.device("cpu"), precision="fp32")
    with pytest.raises(NotFinite) as error:
        probe()
    return str(error.value)


def test_features_that_are_not_finite_are_an_error_on_every_process(pair: Pair) -> None:
    first, second = pair.run(diverged)
    assert first == second
    assert "NaN or infinite" in first


def statistics() -> tuple[list[float], list[float]]:
    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None
    norm.running_mean.fill_(collectives.rank() + 1)
    with statistics_of_main(norm):
        inside = norm.running_mean.tolist()
    return inside, norm.running_mean.tolist()


def test_every_process_uses_the_statistics_of_the_main_process_and_keeps_its_own(pair: Pair) -> None:
    assert pair.run(statistics) == [([1, 1], [1, 1]), ([1, 1], [2, 2])]
    assert statistics() == ([1, 1], [1, 1])
