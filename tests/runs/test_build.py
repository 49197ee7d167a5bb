"""Combinations that cannot be trained are rejected when a run is built, with reason and remedy."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra._internal.utils import get_args_parser
from torch import nn

from command_line import SMALL as QUICK
from command_line import Cli
from small_runs import make_folder
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.distributed import processes
from sslcli.errors import ConfigError
from sslcli.methods.mixture import UnMix
from sslcli.runs.build import Parts, build, build_parts

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


RUN_A_PROGRAM = (
    "sslcli.distributed.elastic.run_processes"  # a function of a trusted package that starts what it is given
)
GROUPS = ("method", "dataset", "backbone", "views", "optimizer")


def config_with(group: str, node: dict[str, Any], *, trust: Sequence[str] = ()) -> RunConfig:
    """A checked configuration in which one group was replaced afterwards, as a stored file may have it."""
    config = checked_jobs("train", get_args_parser().parse_args(SMALL))[0]
    return RunConfig.from_plain(config | {group: node, "trust": list(trust)})


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (RUN_A_PROGRAM, "which is a function"),
        ("sslcli.system.atomic.replace", "which is a function"),
        ("sslcli.report.console.Screen", "must be a class derived from"),
        ("sslcli.distributed.elastic.Rendezvous", "must be a class derived from"),
        ("sslcli.runs.build.inspect", "not a class of a trusted package"),
        ("torch.optim.lr_scheduler.StepLR", "must be a class derived from"),
    ],
)
def test_only_classes_of_a_groups_kind_are_built(
    group: str, target: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sslcli.data.sources.base.Shapes.__init__", lambda *args, **given: pytest.fail("built too early")
    )
    with pytest.raises(ConfigError, match=rf"{group}._target_ is '{target}'.*{expected}"):
        build_parts(config_with(group, {"_target_": target}))


@pytest.mark.parametrize("group", GROUPS)
def test_a_trusted_package_has_no_more_rights(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acts_when_called.py").write_text(
        "def act(**given): raise SystemExit('it ran')\n\n\nclass Act: __init__ = act\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "acts_when_called"
    for target, output in (("act", "which is a function"), ("Act", "must be a class derived from")):
        with pytest.raises(ConfigError, match=output):
            build_parts(config_with(group, {"_target_": f"{name}.{target}"}, trust=[name]))


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("method", "sslcli.methods.base.Method"),
        ("dataset", "sslcli.data.sources.base.Source"),
        ("backbone", "sslcli.backbones.base.Backbone"),
        ("optimizer", "torch.optim.Optimizer"),
    ],
)
def test_a_bare_contract_is_refused(group: str, target: str) -> None:
    with pytest.raises(ConfigError, match=f"{group}._target_ is '{target}', which is an abstract base class"):
        build_parts(config_with(group, {"_target_": target}))


@pytest.mark.parametrize("node", [None, 3, "sslcli.data.views.views.Views", [], {}, {"views": []}])
def test_a_node_without_a_class_is_refused(node: Any) -> None:
    with pytest.raises(ConfigError, match=r"views (is|has no _target_)"):
        build_parts(config_with("views", node))


class Inner:
    """Base class of a keyword's values."""


class Outer(nn.Module):
    """Has keywords of each kind."""

    def __init__(self, *, inner: Inner | None = None, either: Inner | UnMix | None = None, free: Any = None) -> None:
        super().__init__()
        self.built = [inner, either, free]


HERE = "test_build"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file under its own name, as a trusted package would be."""
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, HERE, module)
    for kind in (Inner, Outer):
        monkeypatch.setattr(kind, "__module__", HERE)


def outer(**values: Any) -> Outer:
    return build({"_target_": f"{HERE}.Outer", **values}, base=Outer, trust=[HERE], where="x")


@pytest.mark.usefixtures("importable")
def test_a_node_inside_is_of_the_class_that_its_keyword_is_annotated_with() -> None:
    assert isinstance(outer(inner={"_target_": f"{HERE}.Inner"}).built[0], Inner)
    assert isinstance(outer(either={"_target_": f"{HERE}.Inner"}).built[1], Inner)
    assert isinstance(outer(either={"_target_": "sslcli.methods.mixture.UnMix"}).built[1], UnMix)
    with pytest.raises(
        ConfigError, match=r"x.inner._target_ is 'sslcli.methods.mixture.UnMix', but it must be a class derived"
    ):
        outer(inner={"_target_": "sslcli.methods.mixture.UnMix"})
    for keyword in ("inner", "either"):
        with pytest.raises(ConfigError, match=rf"x.{keyword}._target_ is '{RUN_A_PROGRAM}', which is a function"):
            outer(**{keyword: {"_target_": RUN_A_PROGRAM}})
    with pytest.raises(ConfigError, match=r"x.free has a _target_, but the parameter free of Outer has no annotation"):
        outer(free={"_target_": RUN_A_PROGRAM})


def test_a_file_of_weights_and_a_run_directory_have_no_more_rights_than_a_command_line(
    cli: Cli, tmp_path: Path
) -> None:
    node = {"_target_": RUN_A_PROGRAM, "arguments": ["-c", "open('ran', 'w')"], "processes": 1, "max_restarts": 0}
    node |= {"on_message": "x"}
    assert cli("ssl-train", *QUICK, "run_dir=run").code == 0
    assert cli("ssl-export", "run=run", "out=net.pt").code == 0
    exported = torch.load("net.pt", weights_only=True)
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    for place in ("views", "backbone"):
        torch.save(exported | {place: node}, "changed.pt")
        ended = cli("ssl-eval", "weights=changed.pt", *SMALL, "protocol=knn")
        assert (ended.code, "is a function" in ended.err) == (2, True), ended.err
    for place in GROUPS[:4]:
        Path("run/config.yaml").write_text(yaml.safe_dump(stored | {place: node}))
        ended = cli("ssl-eval", "run=run", "protocol=knn")
        assert (ended.code, "is a function" in ended.err) == (2, True), ended.err
    assert not Path("ran").exists()


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
