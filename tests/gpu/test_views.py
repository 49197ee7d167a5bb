"""The views that the device computes equal the views of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from command_line import composed
from method_runs import CPU
from small_runs import make_folder
from sslcli.config.run_config import RunConfig
from sslcli.data.loader import Loader
from sslcli.kernels import color, resize
from sslcli.runs.build import build_source, build_views

pytestmark = pytest.mark.gpu
VIEWS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "views").glob("*.yaml"))
SHAPES = ["dataset=shapes", "dataset.test_images=0", "dataset.val_fraction=0"]
LARGE = [*SHAPES, "dataset.train_images=16", "dataset.image_size=96"]


def views_of(device: torch.device, *overrides: str) -> Tensor:
    """Return the views of the first epoch of a run, in levels from 0 to 255: (3, pixels of all views), on the CPU."""
    config = RunConfig.from_plain(composed("train", *overrides))
    source, views = build_source(config.dataset, trust=[]), build_views(config.views, trust=[])
    loader = Loader(source, views, batch_size=16, accumulate=1, seed=0, device=device)
    images = [view for (batch,) in loader.steps(0, loader.steps_per_epoch) for view in batch.views]
    assert {view.device for view in images} == {device}
    restored = [views.restore(view.float().cpu(), mean=source.mean, std=source.std) for view in images]
    return 255 * torch.cat([view.transpose(0, 1).flatten(1) for view in restored], 1)


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_images_in_memory(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All values are equal within 2 of 255 levels. RandAugment rounds to levels: 1 value in 1,000 may differ more."""
    expected = views_of(CPU, f"views={name}", *LARGE)
    for kernel in (color, resize):  # so that the CPU uses torch's operations too, as GPUs do
        monkeypatch.setattr(kernel, "library", lambda: None)
    found = views_of(device, f"views={name}", *LARGE)
    assert off_by_more_than_two(found, expected) <= (1e-3 if "infomin" in name else 0.0)


@pytest.mark.parametrize("resident", ["true", "false"])
def test_views_of_many_batches(resident: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches are selected on the GPU, or copied to it one batch ahead on a stream of their own."""
    line = [*SHAPES, "dataset.train_images=160", "dataset.image_size=16", "views=byol_cifar"]
    expected = views_of(CPU, *line)
    for kernel in (color, resize):
        monkeypatch.setattr(kernel, "library", lambda: None)
    assert off_by_more_than_two(views_of(device, *line, f"dataset.resident={resident}"), expected) == 0.0


@pytest.mark.parametrize("workers", [2, 0])
def test_views_of_image_files(
    workers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With workers, batches are copied from pinned memory. The workers are forked after CUDA was initialized.

    The CPU crops files, also if the device is a GPU.
    """
    torch.ones(1, device=device)
    make_folder(tmp_path / "images", per_class=32, broken=0)
    folder = [
        "dataset=folder",
        f"dataset.root={tmp_path / 'images'}",
        "dataset.val_fraction=0",
        "dataset.image_size=24",
    ]
    expected = views_of(CPU, *folder, "views=byol", "dataset.workers=0")
    monkeypatch.setattr(color, "library", lambda: None)
    found = views_of(device, *folder, "views=byol", f"dataset.workers={workers}")
    assert off_by_more_than_two(found, expected) == 0.0


def off_by_more_than_two(found: Tensor, expected: Tensor) -> float:
    """Return the fraction of values that differ by more than 2 of 255 levels."""
    assert found.shape == expected.shape
    assert expected.std() > 10
    return float(((found - expected).abs() > 2).double().mean())
