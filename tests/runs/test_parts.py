"""Combinations that cannot be trained are rejected when a run is built, with reason and remedy."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from small_runs import make_folder
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.distributed import processes
from sslcli.errors import ConfigError
from sslcli.runs.parts import Parts, build_parts

SMALL = ["dataset=shapes", "dataset.train_images=20", "dataset.test_images=0"]
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def parts(*lines: str) -> Parts:
    config = checked_jobs("train", get_args_parser().parse_args([*SMALL, *lines]))[0]
    return build_parts(RunConfig.from_plain(config))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["method=cpc", "method.grid=7", "backbone=dcgan", "backbone.norm=layer"],
            r"patches of 8 pixels .* a larger dataset.image_size",
        ),
        (
            ["method=cpc", "dataset.image_size=224", "backbone=vit_tiny", "backbone.depth=1"],
            r"VisionTransformer does not accept patches of 56 pixels .*change patch_size.* a larger dataset.image_size",
        ),
        (["method=cpc", "backbone=small"], r"BatchNorm \(5 layers.*choose backbone=small_layernorm"),
        (["method=cpc", "+views.views.0.size=40"], r"the view has 40 pixels.*set views.views.0.size to null"),
        (["method=cpc", "dataset.image_size=37"], r"no grid of 3 x 3 .* set dataset.image_size to a size such as 32"),
        (["method=infomin", "backbone=dcgan"], r"jigsaw patches of 12 pixels .* views.views.1.size"),
        (["method=infomin", "views.views.1.size=47"], r"3 x 3 cells: set views.views.1.size to a multiple of 3"),
        (["method=vae", "views.normalize=true"], r"values from -2 to 2.* set views.normalize=false"),
        (["method=autoencoder", "views.color_space=ydbdr"], r"values from .* views.color_space=rgb"),
        (["method=bigan", "+views.views.0.size=16"], r"\(3, 16, 16\).* set views.views.0.size to null"),
        (["method=byol", "views=plain"], r"needs 2 views per image, but the chosen views give 1"),
        (["method=vae", "views=byol"], r"needs 1 view per image, but the chosen views give 2: .*views=\.\.\.$"),
        (["method=lejepa", "views=lejepa"], r"the chosen views give 8: .*, or set method\.num_views=8$"),
        (["method=cmc", "views=plain"], r"splits the channels of lab or ydbdr images.* views=lab"),
    ],
)
def test_views_and_backbones_that_a_method_cannot_train_are_refused(lines: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parts(*lines)


@needs_timm
@pytest.mark.parametrize("method", ["dcgan", "deep_infomax"])
def test_methods_that_need_maps_take_those_of_timm(method: str) -> None:
    views = ["views.normalize=false"] if method == "dcgan" else []
    built = parts(f"method={method}", "backbone=timm", "backbone.name=resnet10t", *views)
    images = built.source.images[:2].float() / 255
    assert built.method.features(images).shape[0] == 2
    assert len(built.method.backbone.stages(images)) == 5


def test_only_rank_0_warns_about_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_folder(tmp_path / "images", broken=0)
    (images / "a/notes.txt").touch()
    config = checked_jobs(
        "train", get_args_parser().parse_args(["dataset=folder", f"dataset.root={images}", "dataset.image_size=16"])
    )[0]
    for rank in (0, 1):
        monkeypatch.setattr(processes, "number", lambda rank=rank: rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build_parts(RunConfig.from_plain(config))
        assert len([each for each in caught if "1 .txt" in str(each.message)]) == (1 if rank == 0 else 0)
