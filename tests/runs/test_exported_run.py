from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exported import exported_run
from sslcli.errors import ConfigError
from sslcli.methods.simclr import SimCLR


def test_the_backbone_has_the_weights_of_the_checkpoint(run_dir: Path) -> None:
    run = exported_run(run_dir)
    weights = run.backbone_weights()
    net = run.backbone(weights)
    assert not net.training
    assert weights
    assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())
    assert (run.image_size, run.loaded.step, run.facts["provenance"]["step"]) == (32, 3, 3)


def test_preprocessing_is_that_of_the_views(run_dir: Path) -> None:
    run, images = exported_run(run_dir), torch.rand(2, 3, 32, 32)
    given = run.preprocessing(is_native=False)
    assert (given.image_size, given.resized_side, given.color_space) == (32, 37, "rgb")
    assert run.preprocessing(is_native=True).resized_side == 32
    assert torch.allclose(given.normalize(images), run.prepare(images), atol=1e-6)


def test_a_method_with_features_of_its_own_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def features(self: SimCLR, images: Tensor) -> Tensor:
        return images.flatten(1)

    run = exported_run(run_dir)
    monkeypatch.setattr(SimCLR, "features", features)
    with pytest.raises(ConfigError, match=r"SimCLR overrides features.*what=method"):
        run.backbone(run.backbone_weights())


def test_a_method_that_changes_its_backbone_is_refused(run_dir: Path) -> None:
    run = exported_run(run_dir)
    weights = run.backbone_weights()
    weights.popitem()
    with pytest.raises(ConfigError, match="changes the layers of the backbone"):
        run.backbone(weights)
    with pytest.raises(ConfigError, match="checkpoint is 2"):
        exported_run(run_dir, checkpoint=2)
