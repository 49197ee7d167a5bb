from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from exported import round_trip, run_usage, trained
from sslcli.weights.export.onnx import Normalized, Onnx, quiet
from tiny import vit

onnxruntime = pytest.importorskip("onnxruntime")
TARGET = Onnx()


def test_a_graph_normalizes_images_and_takes_any_number_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = trained(vit(registers=2, layer_scale=0.1, in_channels=4), size=8, channels=4)
    assert round_trip(TARGET, one, tmp_path) < 1e-6
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for number in (1, 5):
        images = np.ones((number, 4, 8, 8), dtype=np.float32)
        assert session.run(["features"], {"images": images})[0].shape == (number, 16)
    images = torch.rand(2, 4, 8, 8)
    expected = one.net(one.preprocessing.normalize(images))
    assert np.allclose(run_usage(TARGET, one, tmp_path, images), expected.detach(), atol=1e-5)


def test_the_normalization_is_that_of_the_run() -> None:
    one = trained(torch.nn.Flatten(), size=8)
    images = torch.rand(2, 3, 8, 8)
    found = Normalized(one.net, one.preprocessing)(images)
    assert torch.allclose(found, one.preprocessing.normalize(images).flatten(1))
    assert TARGET.obstacle(one) is None


def test_log_levels_are_restored() -> None:
    logger = logging.getLogger("torch.onnx")
    logger.setLevel(logging.INFO)
    with quiet():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.level == logging.INFO
    logger.setLevel(logging.NOTSET)
