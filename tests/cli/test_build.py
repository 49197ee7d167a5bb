"""What cannot be trained is refused when the parts of a run are built, with the reason and a remedy."""

from __future__ import annotations

import importlib.util

import pytest
from hydra._internal.utils import get_args_parser

from sslcli.cli._build import Parts, build_parts
from sslcli.cli._compose import checked_jobs
from sslcli.errors import ConfigError

SMALL = ["dataset=shapes", "dataset.train_images=20", "dataset.test_images=0"]
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="sslcli[timm] is not installed")


def parts(*lines: str) -> Parts:
    config = checked_jobs("train", get_args_parser().parse_args([*SMALL, *lines]))[0]
    return build_parts(config, trust=config["trust"])


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["method=cpc", "backbone=dcgan", "backbone.norm=layer"],
            r"patches of 8 pixels .* a larger dataset.image_size",
        ),
        (
            ["method=cpc", "dataset.image_size=224", "backbone=vit_tiny", "backbone.depth=1"],
            r"VisionTransformer does not take patches of 56 pixels .*change patch_size.* a larger dataset.image_size",
        ),
        (["method=cpc", "backbone=small"], r"BatchNorm \(5 layers.*take backbone=small_layernorm"),
        (["method=cpc", "+views.views.0.size=40"], r"the view has 40 pixels.*leave views.views.0.size at null"),
        (["method=cpc", "dataset.image_size=37"], r"no grid of 3 x 3 .* take a dataset.image_size such as 32"),
        (["method=infomin", "backbone=dcgan"], r"jigsaw's patches of 12 pixels .* views.views.1.size"),
        (["method=infomin", "views.views.1.size=47"], r"3 x 3 cells: set views.views.1.size to a multiple of 3"),
        (["method=vae", "views.normalize=true"], r"values from -2 to 2.* set views.normalize=false"),
        (["method=autoencoder", "views.color_space=ydbdr"], r"values from .* views.color_space=rgb"),
        (["method=bigan", "+views.views.0.size=16"], r"\(3, 16, 16\).* leave views.views.0.size at null"),
        (["method=byol", "views=plain"], r"needs 2 views, but the chosen views are 1"),
        (["method=vae", "views=byol"], r"needs 1 view, but the chosen views are 2"),
        (["method=cmc", "views=plain"], r"splits the channels of lab or ydbdr images.* views=lab"),
    ],
)
def test_views_and_backbones_that_a_method_cannot_train_are_refused(lines: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parts(*lines)


@needs_timm
@pytest.mark.parametrize("method", ["dcgan", "deep_infomax"])
def test_methods_that_need_maps_take_those_of_timm(method: str) -> None:
    views = ["views.normalize=false"] if method == "dcgan" else []
    built = parts(f"method={method}", "backbone=timm", "backbone.name=resnet10t", *views)
    images = built.source.images[:2].float() / 255
    assert built.method.features(images).shape[0] == 2
    assert len(built.method.backbone.stages(images)) == 5
