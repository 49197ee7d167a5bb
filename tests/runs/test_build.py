"""Only classes of the right kind and of trusted packages are built."""

from __future__ import annotations

import sys
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
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.errors import ConfigError
from sslcli.methods.mixture import UnMix
from sslcli.runs.build import build
from sslcli.runs.parts import build_parts

SMALL = ["dataset=shapes", "dataset.train_images=20", "dataset.test_images=0"]


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
