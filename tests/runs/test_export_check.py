from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sslcli.errors import ConfigError
from sslcli.runs.directory import read_trained_config
from sslcli.runs.export_check import (
    Images,
    check_difference,
    comparison_images,
    difference,
    features_of,
    result_of,
)


def test_the_difference_is_relative_to_the_largest_feature() -> None:
    expected = torch.tensor([[4.0, -8.0], [0.0, 1.0]])
    assert difference(expected + torch.tensor([[0.0, 0.0], [2.0, 0.0]]), expected) == 0.25
    assert difference(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    with pytest.raises(ConfigError, match=r"\(2, 3\) instead of \(2, 2\)"):
        difference(torch.zeros(2, 3), expected)


def test_a_large_difference_or_nan_is_an_error() -> None:
    images = Images(torch.zeros(1), "32 images of shapes")
    check_difference(9e-6, "timm", images)
    for found in (2e-5, float("nan")):
        with pytest.raises(ConfigError, match=r"format=timm: the export was removed.*32 images of shapes"):
            check_difference(found, "timm", images)
    assert "at most 2.0e-07" in result_of(2e-7, images)


def test_images_come_from_the_dataset_or_are_noise(run_dir: Path) -> None:
    saved = read_trained_config(run_dir)
    found = comparison_images(saved, trust=[])
    assert (tuple(found.images.shape[1:]), found.is_native) == ((3, 32, 32), True)
    assert found.origin == "32 images of shapes"  # 20 of val, and 12 others
    assert len(found.images.flatten(1).unique(dim=0)) == 32
    gone = {"_target_": "sslcli.data.sources.base.Vision", "name": "cifar10", "root": str(run_dir / "nothing")}
    saved["dataset"] = gone | {"image_size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "download": True}
    noise = comparison_images(saved, trust=[])
    assert (tuple(noise.images.shape), noise.is_native) == ((32, 3, 8, 8), False)
    assert noise.origin.startswith("32 noise images, since the dataset cannot be read (")
    assert 0 <= noise.images.min() < noise.images.max() <= 1


def test_features_are_float32_without_gradient() -> None:
    found = features_of(torch.nn.Flatten(), torch.rand(2, 3, 4, 4, dtype=torch.float64))
    assert (found.dtype, found.requires_grad, tuple(found.shape)) == (torch.float32, False, (2, 48))
