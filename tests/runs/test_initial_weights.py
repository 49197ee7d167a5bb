"""Runs that start from weights: `init=FILE|run:DIR`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from command_line import Cli, result
from method_runs import METHODS, config_of
from processes import Pair
from small_runs import differences, newest
from sslcli.backbones.base import Backbone
from sslcli.cli import export as ssl_export
from sslcli.cli import train as ssl_train
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.methods.cmc import Encoders
from sslcli.report.metrics import read
from sslcli.runs.build import build_backbone, build_method
from sslcli.runs.initial_weights import InitialWeights, check_start, initial_weights
from sslcli.runs.parts import build_parts
from tiny import copied_state, equal_states

LINE = [
    "dataset.train_images=200", "dataset.test_images=50", "backbone.width=4", "train.batch_size=64",
    "train.max_steps=4", "train.save_every_steps=2", "monitor.pictures=0", "train.precision=fp32", "launcher.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of SimCLR and the export of its backbone."""
    folder = tmp_path_factory.mktemp("source")
    run(ssl_train, *LINE, f"run_dir={folder}/run")
    run(ssl_export, f"run={folder}/run", f"out={folder}/net.pt")
    return folder


def run(program: Any, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ssl", *arguments])
        with pytest.raises(SystemExit) as ended:
            program.main()
    assert not ended.value.code


def knn(run_dir: Path, step: int) -> dict[str, float]:
    (line,) = [line for line in read(run_dir / "metrics.jsonl") if line["step"] == step]
    return {name: value for name, value in line.items() if name.startswith("monitor/")}


def test_a_run_starts_at_the_knn_of_its_source_and_resumes_without_the_file(
    cli: Cli, source: Path, tmp_path: Path
) -> None:
    net, run_dir = tmp_path / "net.pt", tmp_path / "run"
    os.link(source / "net.pt", net)
    line = ["method=byol", "method.hidden=16", "views.normalize=false", *LINE, f"run_dir={run_dir}"]
    ended = cli("ssl-train", *line, f"init={net}")
    assert ended.code == 0, ended.err
    assert ended.out.count("initial weights: ") == 1
    assert "30 tensors taken; dropped: none" in ended.out
    assert "not normalized" not in ended.out + ended.err
    assert knn(run_dir, 0) == knn(source / "run", 4)
    assert cli("ssl-eval", f"weights={net}", "dataset=shapes", *LINE[:2], "protocol=knn", "baselines=false").code == 0
    assert knn(run_dir, 0)["monitor/knn_top1"] == result(tmp_path / "net.pt.eval", "knn*")["top1"]
    effective = yaml.safe_load((run_dir / "config.yaml").read_text())["effective"]
    assert effective["initial weights"]["weights"] == str(net)
    assert effective["initial weights"]["weights_taken"] == 30
    assert len(effective["initial weights"]["checkpoint_sha256"]) == 64

    whole = newest(run_dir)
    net.unlink()
    for name in ("done", "checkpoints/step-00000004.pt"):
        (run_dir / name).unlink()
    ended = cli("ssl-train", *line, f"init={net}")
    assert ended.code == 0, ended.err
    assert "initial weights" not in ended.out
    assert differences(newest(run_dir), whole) == []
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["effective"] == effective
    assert [line["step"] for line in read(run_dir / "metrics.jsonl")].count(0) == 1
    for other in ([], [f"init=run:{source}/run"]):
        ended = cli("ssl-train", *line, *other)
        assert ended.code == 2
        assert f"what differs: init: {net} -> " in ended.err
    ended = cli("ssl-train", *line[:-1], f"init={net}", f"run_dir={tmp_path}/new")
    assert (ended.code, "net.pt cannot be read" in ended.err) == (2, True)


def test_a_run_directory_is_a_source_and_other_normalization_is_told(cli: Cli, source: Path, tmp_path: Path) -> None:
    os.symlink(source / "run", tmp_path / "link")
    line = ["method=moco", "method.queue_size=64", *LINE, "train.max_steps=1", f"run_dir={tmp_path}/run"]
    ended = cli("ssl-train", *line, f"init=run:{tmp_path}/link")
    assert ended.code == 0, ended.err
    assert "tensors taken with the prefix backbone." in ended.out
    assert "trained on images with the mean [0.0, 0.0, 0.0] and std [1.0, 1.0, 1.0], but this run uses" in (
        " ".join((ended.out + ended.err).split())
    )
    assert "is finished already" in cli("ssl-train", *line, f"init=run:{source}/run").out


def test_an_export_of_another_backbone_is_refused_with_the_remedy(cli: Cli, source: Path, tmp_path: Path) -> None:
    line = ["dataset=shapes", *LINE[:2], "backbone=resnet18"]
    ended = cli("ssl-train", *line, f"init={source}/net.pt", f"run_dir={tmp_path}/run")
    assert ended.code == 2
    assert "it has no key of the backbone" in ended.err
    assert "backbone=small backbone.width=4" in ended.err
    ended = cli("ssl-eval", *line, f"weights={source}/net.pt", "protocol=knn", "baselines=false")
    assert ended.code == 2
    assert "Remove backbone=...: the file states its backbone" in ended.err


def saved_backbone(word: str, path: Path, *, seed: int = 5) -> dict[str, Any]:
    """Save the backbone of a method with the weights of another seed."""
    config = config_of(word)
    torch.manual_seed(seed)
    backbone = build_backbone(config.backbone, image_size=32, trust=[])
    state = {name: value + 0.5 if "running" in name else value for name, value in backbone.state_dict().items()}
    torch.save(state, path)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def copies(method: Method, state: dict[str, Any]) -> list[nn.Module]:
    """The modules of a method with the names and shapes of the tensors of the state."""
    shapes = {name: value.shape for name, value in state.items()}
    return [
        module
        for module in method.modules()
        if {n: v.shape for n, v in module.state_dict().items() if isinstance(v, Tensor)} == shapes
    ]


@pytest.mark.parametrize("word", METHODS)
def test_every_copy_of_the_backbone_starts_from_the_weights(word: str, tmp_path: Path) -> None:
    state = saved_backbone(word, tmp_path / "net.pt")
    config = config_of(word).changed(init=str(tmp_path / "net.pt"))
    initial = InitialWeights(config)
    method = build_parts(config, initialize=initial.load).method
    initial.check_kept(method)
    found = copies(method, state)
    for module in found:
        assert equal_states({n: v for n, v in module.state_dict().items() if isinstance(v, Tensor)}, state)
    if isinstance(method.backbone, Encoders):
        for encoder in method.backbone.encoders.values():
            assert all(torch.equal(v, state[n]) for n, v in encoder.state_dict().items() if v.shape == state[n].shape)
    else:
        assert method.backbone in found
        assert method.evaluated_network in found
    without = build_parts(config).method.state_dict()
    heads = [name for name, _ in method.named_parameters() if name.partition(".")[0] in ("head", "projector")]
    assert all(torch.equal(method.get_parameter(name), without[name]) for name in heads)


class Restarting(Method):
    """A method that initializes its backbone again."""

    num_views = 1

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        nn.init.normal_(next(backbone.parameters()))


def test_a_method_that_changes_the_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_backbone("simclr", tmp_path / "net.pt")
    config = config_of("simclr").changed(init=str(tmp_path / "net.pt"))
    initial = InitialWeights(config)
    monkeypatch.setattr("sslcli.methods.simclr.Restarting", Restarting, raising=False)
    monkeypatch.setattr(Restarting, "__module__", "sslcli.methods.simclr")
    node = {"_target_": "sslcli.methods.simclr.Restarting"}
    sizes = {"seed": 0, "image_size": 32, "num_images": 8}
    method = build_method(node, config.backbone, **sizes, trust=[], initialize=initial.load)
    with pytest.raises(ConfigError, match=r"the constructor of .*Restarting changes 1 tensors of the backbone"):
        initial.check_kept(method)


def test_a_run_whose_checkpoints_vanish_at_its_start_does_not_start_from_random_weights(tmp_path: Path) -> None:
    config = config_of("simclr").changed(init="net.pt", run_dir=str(tmp_path))
    assert initial_weights(config) is not None
    assert initial_weights(config.changed(init=None)) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.pt").touch()
    initial = initial_weights(config)
    assert initial is None
    check_start(config, initial, 1)
    with pytest.raises(ConfigError, match="has none now: start again"):
        check_start(config, initial, 0)


def loaded(paths: list[str]) -> str:
    """Return the error of this process, whose file is that of its rank."""
    config = config_of("simclr").changed(init=paths[int(torch.distributed.get_rank())])
    backbone: Backbone = build_backbone(config.backbone, image_size=32, trust=[])
    before = copied_state(backbone)
    try:
        InitialWeights(config).load(backbone)
    except ConfigError as error:
        assert equal_states(backbone.state_dict(), before)
        return str(error)
    return ""


def test_two_processes_read_the_same_weights_or_both_refuse_them(pair: Pair, tmp_path: Path) -> None:
    saved_backbone("simclr", tmp_path / "one.pt")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pt")
    one, other = str(tmp_path / "one.pt"), str(tmp_path / "other.pt")
    assert pair.run(loaded, [one, one]) == ["", ""]
    for errors in (pair.run(loaded, [one, other]), pair.run(loaded, [other, one])):
        assert all("does not fit" in error for error in errors)
    saved_backbone("simclr", tmp_path / "other.pt", seed=6)
    assert all("the processes read different weights" in error for error in pair.run(loaded, [one, other]))
