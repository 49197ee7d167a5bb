"""Command lines that are rejected, with their messages; no test here starts a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from sslcli.cli import command, compose
from sslcli.config.run_config import RunConfig
from sslcli.runs import launch
from sslcli.runs.identity import run_dir_of

CONF = Path(__file__).parents[2] / "conf"
METHODS = ", ".join(sorted(path.stem for path in (CONF / "method").glob("*.yaml")))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the configurations that would be run."""
    jobs: list[dict[str, Any]] = []

    def note(config: dict[str, Any]) -> int:
        jobs.append(config)
        return 0

    monkeypatch.setattr(launch, "launch", note)
    return jobs


@pytest.fixture
def refused(cli: Cli, started: list[dict[str, Any]]) -> Any:
    """Call a command that must exit with code 2 and one line on stderr; return that line."""

    def call(*arguments: str, program: str = "ssl-train") -> str:
        ended = cli(program, *arguments)
        assert (ended.code, ended.out, started) == (2, "", []), ended
        assert ended.err.startswith(f"{program}: "), ended.err
        assert ended.err.count("\n") == 1, ended.err
        return ended.err

    return call


WRONG: list[tuple[str, list[str]]] = [
    # choices
    ("method=mocooo", ["method=mocooo", METHODS, "Did you mean 'moco'?"]),
    ("method=MoCo", ["method=MoCo", METHODS, "Did you mean 'moco'?"]),
    ("method=", ["method=", METHODS]),
    ("method=null", ["method", METHODS]),
    ("~method", ["method is missing", "method=..."]),
    ("backbone=resnet19", ["backbone=resnet19", "resnet18, resnet34", "Did you mean 'resnet18'?"]),
    ("+experiment=nonesuch", ["experiment=nonesuch", "cifar10_simclr"]),
    ("mixture=unmixed", ["mixture=unmixed", "Did you mean 'unmix'?"]),
    ("mixture=null", ["mixture needs a choice: set one, or remove mixture", "unmix"]),
    (
        "method=memory_bank mixture=unmix",
        ["method.mixture", "does not support a mixture", "moco, moco_v2, moco_v3, simclr"],
    ),
    ("method.mixture=unmix", ["chosen by its group: write mixture=unmix"]),
    ("method.mixture.beta=2", ["method.mixture.beta", "Choose a mixture first"]),
    ("mixture=unmix method.mixture.betta=2", ["method.mixture.betta", "Did you mean 'beta'?"]),
    ("+mixture.beta=2", ["method.mixture.KEY"]),
    ("launcher=slurmm", ["launcher=slurmm", "local, multi"]),
    ("hydra/launcher=nonesuch", ["hydra/launcher=nonesuch", "basic"]),
    ("methd=moco", ["methd", "Did you mean 'method'?", "backbone, dataset"]),
    ("+methd=moco", ["methd", "Did you mean 'method'?", "backbone, dataset"]),
    ("protocol=knn", ["protocol", "ssl-train has no such group", "method, dataset"]),
    ("method@other=moco", ["method@other"]),
    # keys
    ("dataset=folder dataset.root=p train.epohcs=1", ["train.epohcs", "Did you mean 'epochs'?"]),
    ("method.tempreature=1", ["method.tempreature", "Did you mean 'temperature'?", "dim, hardness, hidden"]),
    ("+method.lrr=1", ["method.lrr", "Known keys in method: ", "temperature"]),
    ("++method.lrr=1", ["method.lrr", "Known keys in method: ", "temperature"]),
    ("~method.temperature", ["method.temperature", "cannot be deleted"]),
    ("~method.tempreature", ["method.tempreature", "Did you mean 'temperature'?"]),
    ("~train.epochs", ["train lacks epochs", "train.epochs=..."]),
    ("~seed", ["lacks seed", "seed=..."]),
    ("+method._partial_=true", ["method._partial_", "Known keys in method"]),
    ("+train.epohcs=1", ["train.epohcs", "Did you mean 'epochs'?"]),
    ("train.epochs.more=1", ["train.epochs", "has no keys"]),
    ("+train.epochs=1", ["train.epochs", "plus sign"]),
    ("optimizer.lrr=1", ["optimizer.lrr", "Did you mean 'lr'?", "momentum"]),
    ("+optimizer.lrr=1", ["optimizer.lrr", "Did you mean 'lr'?", "momentum"]),
    ("run=runs/x", ["run", "Did you mean 'run_dir'?"]),
    ("dataset.nuisances.colr=1", ["dataset.nuisances.colr", "Did you mean 'color'?", "texture"]),
    ("views.views.0.solarise=1", ["views.views.0.solarise", "Known keys in views.views.0", "+views.views.0.solarise"]),
    ("views.views.7.blur=1", ["views.views.7.blur", "list of length 1"]),
    ("views.views.x.blur=1", ["views.views.x.blur", "list of length 1"]),
    ("launcher.processes=2", ["launcher.processes", "kind, threads"]),
    ("hydra.nonesuch=1", ["hydra.nonesuch"]),
    # values
    ("train.epochs=-3", ["train.epochs is -3", "at least 1"]),
    ("train.epochs=2.5", ["train.epochs is 2.5", "integer"]),
    ("train.epochs=", ["train.epochs is ''", "integer"]),
    ("train.epochs=true", ["train.epochs is True", "integer"]),
    ("train.epochs={a:1}", ["train.epochs is {'a': 1}", "integer"]),
    ("train.batch_size=abc", ["train.batch_size is 'abc'", "integer"]),
    ("train.milestones=[a]", ["train.milestones is ['a']", "list of finite numbers"]),
    ("train.milestones=[2]", ["train.milestones is [2]", "between 0 and 1"]),
    ("train.max_time=abc", ["train.max_time is 'abc'", "10m"]),
    ("train.clip_grad=inf", ["train.clip_grad is inf", "finite"]),
    ("train.final_lr=nan", ["train.final_lr is nan", "finite"]),
    ("train.precision=bf17", ["train.precision is 'bf17'", "auto, fp32, bf16, fp16", "Did you mean 'bf16'?"]),
    ("train.accumulate=3", ["train.accumulate is 3", "divisor"]),
    ("train=5", ["train is 5", "epochs"]),
    ("seed=-1", ["seed is -1", "at least 0"]),
    ("seed=99999999999999999999", ["seed is 99999999999999999999", "at most 4294967295"]),
    ("dataset.seed=99999999999999999999", ["dataset.seed", "at most 4294967295"]),
    ("seed=[1,2]", ["seed is [1, 2]", "integer"]),
    ("resume=atuo", ["resume is 'atuo'", "auto, never, must", "Did you mean 'auto'?"]),
    ("name=true", ["name is True", "string", "name='\"True\"'"]),
    ("device=gpu", ["device is 'gpu'", "auto, cpu, cuda"]),
    ("monitor.on_collapse=explode", ["monitor.on_collapse is 'explode'", "ignore, warn, stop"]),
    ("launcher.kind=cloud", ["launcher.kind is 'cloud'", "local, multi"]),
    ("launcher.threads=0", ["launcher.threads is 0", "at least 1"]),
    ("launcher.timeout=soon", ["launcher.timeout is 'soon'", "10m"]),
    ("launcher.timeout=0s", ["launcher.timeout is 0.0", "greater than 0"]),
    ("launcher=multi launcher.max_restarts=-1", ["launcher.max_restarts is -1", "at least 0"]),
    ("method.temperature=abc", ["method.temperature is 'abc'", "finite number"]),
    ("method.temperature=null", ["method.temperature is None", "finite number"]),
    ("dataset.mean=0.5", ["dataset.mean is 0.5", "list of finite numbers"]),
    ("views.views=5", ["views.views is 5", "list of mappings"]),
    ("optimizer.lr=abc", ["optimizer.lr is 'abc'", "finite number"]),
    ("optimizer=adamw optimizer.betas=[0.9]", ["optimizer.betas is [0.9]", "list of 2 finite numbers"]),
    ("dataset=folder", ["dataset.root has no value", "dataset.root=..."]),
    ("backbone=timm", ["backbone.name has no value", "backbone.name=..."]),
    # several values, and what cannot be read
    ("method=moco,simclr", ["method=moco,simclr", "--multirun"]),
    ("seed=range(0,3)", ["seed=range(0,3)", "--multirun"]),
    ("--multirun seed=range(0,3,0)", ["--multirun", "zero"]),
    ("--multirun optimizer.lr=interval(0,1)", ["--multirun", "INTERVAL_SWEEP"]),
    ("--multirun --cfg job", ["--multirun", "--cfg"]),
    ("epochs", ["'epochs'", "key=value"]),
    ("=5", ["'=5'", "key=value"]),
    ("train.milestones=[0.5", ["'train.milestones=[0.5'", "quote a value"]),
    ("run_dir=größe", ["letters other than a to z", "run_dir='\"größe\"'"]),
    ("run_dir=/tmp/a=b", ["'run_dir=/tmp/a=b'", "run_dir='\"/tmp/a=b\"'"]),
    ("views.views[0].blur=1", ["'views.views[0].blur=1'", "key.0"]),
    ("--epochs 5", ["--epochs", "key=value"]),
    # interpolation
    ("train.epochs=${nonesuch}", ["train.epochs", "nonesuch"]),
    ("train.epochs=${train.epochs}", ["train.epochs", "Recursive"]),
    ("train.epochs=${oc.env:SSLCLI_NONESUCH}", ["train.epochs", "SSLCLI_NONESUCH"]),
    # where yaml files are
    ("--config-dir /nonesuch", ["--config-dir", "/nonesuch"]),
    ("--config-path /nonesuch", ["--config-path", "/nonesuch"]),
    ("--config-name nonesuch", ["--config-name", "nonesuch"]),
    ("--config-name eval", ["run", "there is no such key"]),
    ("hydra.searchpath=[/nonesuch]", ["hydra.searchpath", "/nonesuch"]),
]


@pytest.mark.parametrize(("line", "wanted"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_refused_in_one_message_that_helps(line: str, wanted: list[str], refused: Any) -> None:
    message = refused(*line.split(" "))
    assert [part for part in wanted if part not in message] == [], message


EVAL_WRONG: list[tuple[str, list[str]]] = [
    ("", ["run=DIR", "weights=FILE"]),
    ("run=. weights=.", ["run=DIR", "weights=FILE"]),
    ("run=nonesuch", ["run is '/", "/nonesuch', but there is no such path"]),
    ("run=true", ["run is True", "string"]),
    ("run=. protocol=knnn", ["protocol=knnn", "knn, knn_full, linear", "Did you mean 'knn'?"]),
    ("run=. protocol=null", ["protocol", "knn, knn_full, linear"]),
    ("run=. method=moco", ["method", "ssl-eval has no such group", "protocol, dataset, backbone"]),
    ("run=. protocl.k=5", ["protocl", "Did you mean 'protocol'?"]),
    ("run=. protocol.lrr=5", ["protocol.lrr", "Did you mean 'lrs'?"]),
    ("run=. protocol.lrs=[a]", ["protocol.lrs is ['a']", "list of finite numbers"]),
    ("run=. checkpoint=first", ["checkpoint is 'first'", "last"]),
    ("run=. checkpoint=1.5", ["checkpoint is 1.5", "integer"]),
    ("run=. device=gpu", ["device is 'gpu'", "auto, cpu, cuda"]),
    ("run=. precision=half", ["precision is 'half'", "auto, fp32, bf16, fp16"]),
    ("run=. batch_size=0", ["batch_size is 0", "at least 1"]),
    ("run=. workers=-1", ["workers is -1", "at least 0"]),
]


@pytest.mark.parametrize(("line", "wanted"), EVAL_WRONG, ids=[line for line, _ in EVAL_WRONG])
def test_ssl_eval_refuses_likewise(line: str, wanted: list[str], refused: Any) -> None:
    message = refused(*line.split(), program="ssl-eval")
    assert [part for part in wanted if part not in message] == [], message


RIGHT: list[tuple[list[str], str, Any]] = [
    (["method.temperature=0.5"], "method.temperature", 0.5),
    (["train.max_time=1.5h"], "train.max_time", "1.5h"),
    (["optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
    (["++train.epochs=7"], "train.epochs", 7),
    (["+optimizer.dampening=0.1"], "optimizer.dampening", 0.1),
    (["views.views.0.blur=0.25"], "views.views.0.blur", 0.25),
    (["+views.views.0.solarize=0.25"], "views.views.0.solarize", 0.25),
    (["backbone=timm", "backbone.name=x", "+backbone.options.drop_rate=0.1"], "backbone.options.drop_rate", 0.1),
    (["name='my run'"], "name", "my run"),
    (["name=my run"], "name", "my run"),
    (['run_dir="/tmp/a=b,c"'], "run_dir", "/tmp/a=b,c"),
    (["dataset=folder", "dataset.root=[/a,/b]"], "dataset.root", ["/a", "/b"]),
    (["dataset=folder", "dataset.root={/a: 2.0}"], "dataset.root", {"/a": 2.0}),
    (["train.epochs=1", "train.epochs=2"], "train.epochs", 2),
    (["train.epochs=${train.keep}"], "train.epochs", 3),
    (["~experiment"], "seed", 0),
    (["seed=1", "--config-name", "train", "train.epochs=4"], "train.epochs", 4),  # flags between overrides
]


@pytest.mark.parametrize(("line", "key", "value"), RIGHT, ids=[" ".join(line) for line, _, _ in RIGHT])
def test_what_is_right_is_understood(
    line: list[str], key: str, value: Any, cli: Cli, started: list[dict[str, Any]]
) -> None:
    ended = cli("ssl-train", *line)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    found: Any = started[0]
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    assert found == value


def write(folder: Path, text: str) -> None:
    """Write an experiment of a user, named `mine`."""
    folder.joinpath("experiment").mkdir()
    folder.joinpath("experiment/mine.yaml").write_text(text)


HEAD = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (HEAD + "train:\n  epohcs: 3\n", ["train.epohcs", "Did you mean 'epochs'?"]),
        (HEAD + "train:\n  epochs: abc\n", ["train.epochs is 'abc'", "integer"]),
        (HEAD + "trian:\n  epochs: 3\n", ["trian", "Did you mean 'train'?"]),
        (HEAD + "method:\n  tempreature: 3\n", ["method.tempreature", "Did you mean 'temperature'?"]),
        (HEAD + "method:\n  _target_: os.system\n", ["method._target_", "os.system", "sslcli, torch.optim", "trust"]),
        (HEAD + "views:\n  views: [{_target_: os.system}]\n", ["views.views.0._target_", "os.system", "trust"]),
        (HEAD + "train:\n  milestones: [{a: {_target_: os.system}}]\n", ["train.milestones.0.a._target_", "trust"]),
        (HEAD + "method:\n  _target_: sslcli.methods.moco.MoCoo\n", ["sslcli.methods.moco.MoCoo", "no such class"]),
        (HEAD + "defaults:\n  - override /methd: moco\n", ["methd", "Did you mean 'method'?", "mine"]),
        (HEAD + "defaults:\n  - override /method: mocooo\n", ["method=mocooo", METHODS]),
        (HEAD + "train:\n  epochs: ${nonesuch.key}\n", ["train.epochs", "nonesuch.key"]),
        (HEAD + "train:\n  epochs: [3\n", ["mine.yaml", "line 4"]),
        (HEAD + "train:\n  epochs: 3\n  epochs: 4\n", ["mine.yaml", "duplicate key epochs"]),
        (HEAD + "defaults:\n  - method: byol\n", ["experiment/method=byol", "`- override /method: byol`"]),
        (HEAD + "defaults:\n  - /method: byol\n", ["method has two choices", "`- override /method: byol`"]),
        (HEAD + "defaults:\n  - override method: byol\n", ["experiment/mine", "`- override /method: NAME`"]),
        (HEAD + "method: byol\n", ["method is 'byol'", "mapping of keys", "`- override /method: byol`"]),
        ("\ufeff" + HEAD + "seed: 3\n", ["mine.yaml begins with a byte order mark", "save it without BOM"]),
        ("\ufeff# note\n" + HEAD + "seed: 3\n", ["mine.yaml begins with a byte order mark"]),
        ("train:\n  epochs: 3\n", ["experiment", "# @package _global_"]),
        ("- a\n- b\n", ["experiment", "# @package _global_"]),
    ],
)
def test_a_mistake_in_a_yaml_of_the_users_own_is_refused(
    text: str, wanted: list[str], refused: Any, tmp_path: Path
) -> None:
    write(tmp_path, text)
    message = refused("--config-dir", str(tmp_path), "experiment=mine")
    assert [part for part in wanted if part not in message] == [], message


def test_a_yaml_with_a_name_or_an_encoding_that_hydra_misreads_is_refused(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/ext.yml").write_text("_target_: torch.optim.SGD\nlr: 0.1\n")
    (tmp_path / "optimizer/wide.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.1\n", encoding="utf-16")
    for line in ("optimizer=ext", "+optimizer=ext", "optimizer@optimizer=ext"):
        message = refused("--config-dir", str(tmp_path), line)
        assert f"{tmp_path}/optimizer/ext.yml has the ending .yml: rename it to ext.yaml" in message
    assert "wide.yaml is encoded as UTF-16: save it as UTF-8" in refused(
        "--config-dir", str(tmp_path), "optimizer=wide"
    )


def test_a_byte_order_mark_that_hides_no_header_is_accepted(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mark.yaml").write_text("\ufeff_target_: torch.optim.SGD\nlr: 0.25\n")
    ended = cli("ssl-train", "--config-dir", str(tmp_path), "optimizer=mark", "--cfg", "job")
    assert (ended.code, "lr: 0.25" in ended.out) == (0, True)


def test_a_second_choice_of_a_group_is_refused_with_the_way_to_replace_the_first(refused: Any, tmp_path: Path) -> None:
    write(tmp_path, HEAD + "seed: 3\n")
    message = refused("--config-dir", str(tmp_path), "+experiment=mine")
    assert "write experiment=mine without a plus sign" in message


def test_a_method_of_the_users_own_is_checked_against_its_class(refused: Any, tmp_path: Path) -> None:
    tmp_path.joinpath("method").mkdir()
    tmp_path.joinpath("method/mine.yaml").write_text("_target_: sslcli.methods.byol.BYOL\nhiden: 5\n")
    message = refused("--config-dir", str(tmp_path), "method=mine")
    assert "method.hiden" in message
    assert "Did you mean 'hidden'?" in message
    choices = ", ".join(sorted([*METHODS.split(", "), "mine"]))
    assert choices in refused("--config-dir", str(tmp_path), "method=mien")


OWN_CLASS = """
class OwnMethodOfTest:
    def __init__(self, backbone, *, dim: int = 8, weight: float = 1.0) -> None:
        self.dim = dim
"""


def test_a_class_in_the_folder_of_the_command_is_read_before_a_typo_is_told(refused: Any, tmp_path: Path) -> None:
    tmp_path.joinpath("own_method_of_test.py").write_text(OWN_CLASS)
    tmp_path.joinpath("method").mkdir()
    tmp_path.joinpath("method/own.yaml").write_text(
        HEAD + "method:\n  _target_: own_method_of_test.OwnMethodOfTest\n  dim: 8\n"
    )
    line = ["--config-dir", ".", "method=own", "trust=[own_method_of_test]"]
    for sign in ("", "+"):
        message = refused(*line, f"{sign}method.wieght=10")
        assert "method.wieght" in message
        assert "Did you mean 'weight'?" in message
    assert "+method.weight=..." in refused(*line, "method.weight=10")


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_class_outside_the_trusted_packages_is_refused_and_trust_is_named(sign: str, refused: Any) -> None:
    message = refused(f"{sign}method._target_=os.system")
    assert "os.system" in message
    assert "sslcli, torch.optim" in message
    assert "trust=[os]" in message


@pytest.mark.parametrize("target", ["torch.optimal.Thing", "sslclix.Thing", "torch.load", "builtins.eval"])
def test_a_package_is_trusted_by_its_whole_name(target: str, refused: Any) -> None:
    assert "trust" in refused(f"optimizer._target_={target}")


@pytest.mark.parametrize("value", ["torch", "null", "[1]", "['']", "{a:1}"])
def test_trust_that_is_no_list_of_names_is_refused(value: str, refused: Any) -> None:
    assert "list of package names" in refused(f"trust={value}", "backbone._target_=torch.nn.Identity")


def test_trust_allows_the_classes_of_a_package(cli: Cli, started: list[dict[str, Any]], tmp_path: Path) -> None:
    assert cli("ssl-train", "trust=[torch]", "backbone._target_=torch.nn.Identity").code == 0
    write(tmp_path, HEAD + "trust: [torch]\n")
    assert cli("ssl-train", "--config-dir", ".", "experiment=mine", "backbone._target_=torch.nn.Identity").code == 0
    assert [job["backbone"]["_target_"] for job in started] == ["torch.nn.Identity"] * 2


def test_another_class_may_take_the_place_of_one_with_other_keywords(cli: Cli, started: list[dict[str, Any]]) -> None:
    line = [
        "trust=[torch]",
        "backbone._target_=torch.nn.Identity",
        "~backbone.width",
        "~backbone.in_channels",
        "~backbone.norm",
    ]
    assert cli("ssl-train", *line).code == 0
    assert set(started[0]["backbone"]) == {"_target_", "image_size"}


def test_composing_and_checking_takes_less_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-train", "method=moco_v2", "dataset=cifar10", "train.epochs=3"])
    times = []
    for _ in range(3):
        before = time.process_time()
        compose.checked_jobs("train", command.read_arguments("train"))
        times.append(time.process_time() - before)
    assert min(times) < 1.0


def names(cli: Cli, started: list[dict[str, Any]], *lines: str) -> list[str]:
    """The run directories that command lines would use."""
    started.clear()
    for line in lines:
        assert cli("ssl-train", *line.split()).code == 0
    return [Path(run_dir_of(RunConfig.from_plain(job))).name for job in started]


def test_the_run_directory_is_named_after_what_makes_the_run(cli: Cli, started: list[dict[str, Any]]) -> None:
    plain, seed, both, turned, named = names(
        cli, started, "", "seed=1", "seed=1 method=byol", "method=byol seed=1", "seed=1 name=mine"
    )
    assert plain == "simclr_shapes_small"
    assert seed.startswith("simclr_shapes_small_")
    assert both.startswith("byol_shapes_small_")
    assert both == turned
    assert named == "mine"


def test_what_does_not_change_a_run_does_not_change_its_directory(cli: Cli, started: list[dict[str, Any]]) -> None:
    found = names(
        cli,
        started,
        "seed=1",
        "seed=1 train.max_time=5m launcher=multi launcher.threads=1 device=cpu resume=must dry_run=true",
        "seed=1 trust=[torch] train.keep=9 train.save_every_steps=5 dataset.workers=1 hydra.job.name=x",
    )
    assert len(set(found)) == 1
    assert names(cli, started, "seed=1 train.log_every_steps=3") != found[:1]


def test_a_folder_whose_name_is_a_number(cli: Cli, started: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "2023/a").mkdir(parents=True)
    for line, key, expected in (
        ("run_dir=2023", "run_dir", f"{tmp_path}/2023"),
        ("name=2_023", "name", "2_023"),
        ("dataset.root=2023", "dataset", f"{tmp_path}/2023"),
        ("dataset.root=[2023]", "dataset", [f"{tmp_path}/2023"]),
    ):
        assert cli("ssl-train", "dataset=folder", *([] if "root" in line else ["dataset.root=2023"]), line).code == 0
        found = started.pop()[key]
        assert (found["root"] if key == "dataset" else found) == expected
