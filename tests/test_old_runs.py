"""What version 0.1 made still works: runs, exports, a sweep, yaml files and imports. See tests/old/README.md."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.utils import get_args_parser

from command_line import Cli, installed
from sslcli.backbones.small import Small
from sslcli.cli.compose import checked_jobs
from sslcli.config.moved import current_override
from sslcli.config.run_config import RunConfig
from sslcli.engine import checkpoint
from sslcli.methods.base import RENAMED, Method
from sslcli.runs.parts import build_parts
from sslcli.weights.files import load_strictly
from sslcli.weights.renamed import with_current_names

OLD = Path(__file__).parent / "old"
CASES = json.loads((OLD / "state_dicts.json").read_text(encoding="utf-8"))
NAME = "moco_v2_shapes_small_27d674"  # that version 0.1 gave the run in run_moco
ON_CPU = ["device=cpu", "train.precision=fp32", "launcher.threads=1"]
SHAPES = [
    "dataset=shapes",
    "dataset.limit=400",
    "dataset.test_images=200",
    "dataset.image_size=16",
    "dataset.nuisances.color=0.0",
    "dataset.nuisances.texture=0.0",
    "dataset.nuisances.background=0.0",
    "dataset.nuisances.position=0.2",
    "dataset.nuisances.rotation=0.2",
]
PUBLIC = [  # imports of code written for version 0.1
    "from sslcli.methods.base import Batch, Method, maps_of, num_features",
    "from sslcli.nn import SplitBatchNorm, SyncBatchNorm, average_statistics, convert_batch_norm",
    "from sslcli.nn import ema_update, evaluating, frozen_copy, full_precision, mlp, unchanged_statistics",
    "from sslcli.losses import Contrast, check_momentum, check_temperature, cosine_distance, info_nce, mutual_info_nce",
    "from sslcli.noise import Noise",
    "from sslcli.distributed import all_gather, all_gather_with_grad, all_reduce_mean, barrier, gather_objects",
    "from sslcli.distributed import BatchShuffle, is_main, rank, world_size",
    "from sslcli.data.files import Flat, Folder, ImageFiles, ImageNet, ListFile",
    "from sslcli.schedule import ema_momentum, scale_lr, warmup_cosine",
    "from sslcli.evaluate.knn import Knn, KnnResult, knn",
    "from sslcli.data.hf import Hf",
    "from sslcli.data.decode import Encoded, decode, open_file, to_rgb",
    "from sslcli.data.sources import Shapes, Source, TorchvisionSet",
    "from sslcli.data.views import Views",
    "from sslcli.evaluate.base import Protocol",
    "from sslcli.mixture import UnMix, add_mixture",
    "from sslcli.optim import LARS, parameter_groups",
    "import sslcli.losses, sslcli.noise, sslcli.schedule, sslcli.evaluate.linear, sslcli.data.shapes",
]
IMPORT_EACH = """
import os, sys, warnings
from pathlib import Path
import torch, torchvision
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)
warnings.simplefilter("ignore", FutureWarning)
failed = []

def check_modules():
    # Under an old name is the module of today: a second copy of its file would have other classes.
    root = Path(sys.modules["sslcli"].__file__).parents[1]
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        if name.startswith("sslcli.") and path.is_relative_to(root / "sslcli"):
            parts = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
            assert module.__name__ == ".".join(parts), f"{module.__name__} is a copy of {'.'.join(parts)}"

for line in sys.stdin.read().splitlines():
    child = os.fork()
    if child == 0:
        try:
            exec(line)
            check_modules()
        except BaseException as error:
            print(f"{line}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    failed.append(os.waitpid(child, 0)[1])
sys.exit(any(failed))
"""


def title(case: dict[str, Any]) -> str:
    """The overrides that distinguish a method of state_dicts.json."""
    return " ".join(line for line in case["overrides"] if line.startswith(("method", "mixture", "backbone=")))


def copied(name: str, to: str = "") -> Path:
    """A copy of something in tests/old, in the current directory."""
    target = Path.cwd() / (to or name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (OLD / name).is_dir():
        shutil.copytree(OLD / name, target, symlinks=True)
    else:
        shutil.copy(OLD / name, target)
    return target


@pytest.fixture
def own_method(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that trains a user's method, which is in the current directory."""
    copied("conf")
    copied("own_method.py")
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    small = ["dataset=plain_shapes", "backbone.width=2", "train.batch_size=20", "train.max_steps=4", "run_dir=run"]
    return ["--config-dir", "conf", "method=own_method", "trust=[own_method]", *small, *ON_CPU]


def command_of(run_dir: Path, *without: str) -> list[str]:
    """The overrides that a run was started with, except for those whose keys are in `without`."""
    lines = (run_dir / "overrides.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("=")[0] not in without]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def check_knn(found: dict[str, Any]) -> None:
    """The accuracies are those that version 0.1 measured."""
    before = read(OLD / "run_vae" / "eval" / "knn.json")
    for key in ("top1", "top5", "test_top1", "test_top5"):
        assert found[key] == pytest.approx(before[key], abs=0.005), key
    for key in ("k", "temperature", "n_train", "n_test", "dataset_version", "dataset_fingerprint", "step"):
        assert found.get(key, before[key]) == before[key], key


def method_of(overrides: list[str]) -> Method:
    """The method that today's version builds for a command line of version 0.1."""
    lines = [current_override(line) for line in overrides]
    config = RunConfig.from_plain(checked_jobs("train", get_args_parser().parse_args(lines))[0])
    return build_parts(config).method


def last_line(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])  # type: ignore[no-any-return]


def test_the_data_of_version_0_1_is_unchanged() -> None:
    lines = (OLD / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [path for path in OLD.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.relative_to(OLD).as_posix(): path for path in files if "__pycache__" not in path.parts}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}
    assert {name: digest for name, digest in found.items() if name not in ("README.md", "SHA256SUMS")} == recorded


def test_an_old_run_evaluates_to_the_number_it_had(cli: Cli) -> None:
    run_dir = copied("run_vae")
    (run_dir / "eval" / "knn.json").unlink()
    code, out, err = cli("ssl-eval", "run=run_vae", "protocol=knn", "device=cpu", "baselines=false")
    assert code == 0, err
    assert "linear" in out  # the result of version 0.1 is in the table
    check_knn(read(run_dir / "eval" / "knn.json"))


def test_a_linear_probe_of_an_old_run_has_the_accuracy_it_had(cli: Cli) -> None:
    run_dir = copied("run_vae")
    grid = ["protocol.lrs=[0.3,1.0]", "protocol.weight_decays=[0.0]"]
    code, _, err = cli("ssl-eval", "run=run_vae", "protocol=linear", "device=cpu", "baselines=false", *grid)
    assert code == 0, err
    before, now = (read(folder / "eval" / "linear.json") for folder in (OLD / "run_vae", run_dir))
    assert now["top1"] == pytest.approx(before["top1"], abs=0.01)
    assert now["chosen"]["lr"] == before["chosen"]["lr"]


def test_a_finished_old_run_is_not_started_again(cli: Cli) -> None:
    run_dir = copied("run_vae")
    code, out, err = cli("ssl-train", *command_of(run_dir))
    assert code == 0, err
    assert "finished already" in out
    assert len(checkpoint.all_of(run_dir)) == 1


@pytest.mark.parametrize("what", ["backbone", "method"])
def test_an_old_run_exports_the_weights_that_it_exported_before(cli: Cli, what: str) -> None:
    copied("run_vae")
    code, _, err = cli("ssl-export", "run=run_vae", f"what={what}", "out=now.pt")
    assert code == 0, err
    now = torch.load("now.pt", weights_only=True)["state_dict"]
    before = torch.load(OLD / f"export_{what}.pt", weights_only=True)["state_dict"]
    assert len(now) == len(before)
    for (name, value), old in zip(now.items(), before.values(), strict=True):  # names may have changed, not the order
        assert torch.equal(value, old), name
    if what == "method":
        load_strictly(method_of(command_of(OLD / "run_vae")), now, "now.pt")


def test_an_old_run_resumes_to_its_end_by_its_old_command_line(cli: Cli) -> None:
    run_dir = copied("run_moco", f"runs/{NAME}")
    code, out, err = cli("ssl-train", *command_of(run_dir, "train.max_time"))
    assert code == 0, err
    assert "from step 61" in out + err
    assert [path.name for path in Path("runs").iterdir()] == [NAME]  # no second directory
    assert (run_dir / "done").exists()
    before, now = read(OLD / "run_moco_last.json"), last_line(run_dir)
    assert now["step"] == before["step"] == 90
    assert now["train/loss"] == pytest.approx(before["train/loss"], rel=1e-3)
    assert now["monitor/knn_top1"] == pytest.approx(before["monitor/knn_top1"], abs=0.02)


def test_an_unfinished_old_run_exports_and_evaluates(cli: Cli) -> None:
    copied("run_moco")
    for what in ("backbone", "method"):
        code, _, err = cli("ssl-export", "run=run_moco", f"what={what}", f"out={what}.pt")
        assert code == 0, err
    weights = torch.load("backbone.pt", weights_only=True)["state_dict"]
    Small(image_size=16, width=2).load_state_dict(weights, strict=True)
    code, _, err = cli("ssl-eval", "run=run_moco", "protocol=knn", "device=cpu", "baselines=false")
    assert code == 0, err
    found = read(Path("run_moco/eval/knn.json"))
    lines = (OLD / "run_moco" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    at_60 = next(line for line in map(json.loads, lines) if line["step"] == 60)["monitor/knn_top1"]
    assert found["top1"] == pytest.approx(at_60, abs=0.05)  # the checkpoint is of step 61


def test_a_sharded_old_run_exports_and_resumes(cli: Cli, tmp_path: Path) -> None:
    run_dir = copied("run_sharded")
    code, _, err = cli("ssl-export", "run=run_sharded", "what=method", "out=now.pt")
    assert code == 0, err
    command = command_of(run_dir, "train.max_time")
    single = [line for line in command if not line.startswith(("launcher", "train.sharding"))]
    load_strictly(method_of(single), torch.load("now.pt", weights_only=True)["state_dict"], "now.pt")
    out = installed(tmp_path, "ssl-train", *command)
    assert "from step 2" in out
    assert (run_dir / "done").exists()
    assert last_line(run_dir)["step"] == 30


def test_a_network_that_was_fine_tuned_by_the_old_version_can_be_the_teacher(cli: Cli) -> None:
    run_dir = copied("run_vae")
    distill = ["protocol=distill", "protocol.steps=2", "protocol.batch_size=20", "device=cpu", "baselines=false"]
    code, _, err = cli("ssl-eval", "run=run_vae", *distill)
    assert code == 0, err
    assert read(run_dir / "eval" / "distill_steps-2.json")["teacher"]["net"] == "finetune/net.pt"


def test_the_jobs_of_an_old_sweep_are_finished(cli: Cli) -> None:
    folder = copied("sweep")
    records = {path.name: path.read_bytes() for path in (folder / "jobs").glob("*.json")}
    jobs = sorted(path.parent for path in folder.glob("*/done"))
    views = [line.partition("=")[2] for job in jobs for line in command_of(job) if line.startswith("views=")]
    command = [*command_of(jobs[0], "views", "run_dir"), f"views={','.join(views)}", "hydra.sweep.dir=sweep"]
    code, out, err = cli("ssl-train", "--multirun", *command)
    assert code == 0, err
    assert "2 finished; 0 to run" in out
    assert {path.name: path.read_bytes() for path in (folder / "jobs").glob("*.json")} == records
    assert sorted(path.parent for path in folder.glob("*/done")) == jobs
    assert not list(folder.glob("*/checkpoints"))  # no job ran
    before, now = (list(csv.DictReader((place / "sweep.csv").open())) for place in (OLD / "sweep", folder))
    for key in ("status", "monitor/knn_top1", "run_dir"):  # steps are those of the checkpoints, which were deleted
        assert [row[key] for row in now] == [row[key] for row in before], key
    assert "37.2 %" in out


def test_an_old_export_of_a_backbone_loads() -> None:
    content = torch.load(OLD / "export_backbone.pt", weights_only=True)
    arguments = {key: value for key, value in content["backbone"].items() if key != "_target_"}
    Small(**arguments).load_state_dict(content["state_dict"], strict=True)


@pytest.mark.parametrize("what", ["backbone", "method"])
def test_an_old_export_evaluates_to_the_number_of_its_run(cli: Cli, what: str) -> None:
    weights = copied(f"export_{what}.pt")
    code, _, err = cli("ssl-eval", f"weights={weights}", *SHAPES, "protocol=knn", "device=cpu", "baselines=false")
    assert code == 0, err
    (result,) = Path.cwd().rglob("knn*.json")
    check_knn(read(result))


def test_an_experiment_of_an_old_user_trains_and_evaluates(cli: Cli) -> None:
    copied("conf")
    code, _, err = cli("ssl-train", "--config-dir", "conf", "experiment=mine", "run_dir=run", *ON_CPU)
    assert code == 0, err
    assert last_line(Path("run"))["step"] == 4
    assert "train/mixture_loss" in last_line(Path("run"))
    near = ["--config-dir", "conf", "run=run", "protocol=near", "device=cpu", "baselines=false"]
    code, _, err = cli("ssl-eval", *near)
    assert code == 0, err
    (result,) = Path("run/eval").glob("*.json")
    assert (read(result)["k"], read(result)["temperature"]) == (5, 0.1)


def test_a_method_of_an_old_user_trains(cli: Cli, own_method: list[str]) -> None:
    code, _, err = cli("ssl-train", *own_method)
    assert code == 0, err
    assert (Path("run") / "done").exists()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_method_of_an_old_user_with_a_renamed_attribute_is_rejected_with_the_new_name(
    cli: Cli, own_method: list[str], old: str, new: str
) -> None:
    path = Path("own_method.py")
    path.write_text(path.read_text().replace("    num_views = 2", f"    num_views = 2\n    {old} = None"))
    code, _, err = cli("ssl-train", *own_method)
    assert code == 2
    assert old in err
    assert new in err


@pytest.mark.parametrize(
    "line",
    [
        ["--config-dir", "conf", "dataset=labeled_stl10"],
        ["dataset=stl10", "dataset.unlabelled=false", "dataset.download=false", "dataset.root=stl10"],
    ],
)
def test_an_image_set_of_an_old_user_is_accepted(cli: Cli, line: list[str]) -> None:
    copied("conf")
    code, _, err = cli("ssl-train", *line, *ON_CPU)
    assert code == 2
    assert "STL10 is not in" in err  # the keys are valid; only the files are absent


def test_old_imports_work() -> None:
    child = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH], input="\n".join(PUBLIC), capture_output=True, text=True, timeout=240
    )
    assert child.returncode == 0, child.stdout + child.stderr[-2000:]


def old_defaults(overrides: list[str]) -> list[str]:
    """The overrides that give the defaults of version 0.1, where they change the shapes of the method."""
    defaults = {
        "method=cpc": ["method.min_patch_size=8", "method.directions=1"],
        "method=cpc_v2": ["method.min_patch_size=8"],
    }
    return defaults.get(overrides[0], [])


@pytest.mark.parametrize("case", CASES, ids=title)
def test_old_weights_of_every_method_have_the_names_and_shapes_of_today(case: dict[str, Any]) -> None:
    old = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, *shape) in case["state_dict"].items()
    }
    method = method_of([*case["overrides"], *old_defaults(case["overrides"])])
    now = method.state_dict()
    current = with_current_names(old, now)
    assert {name: (value.dtype, value.shape) for name, value in current.items()} == {
        name: (value.dtype, value.shape) for name, value in now.items()
    }
    parameters = [name for name, _ in method.named_parameters()]  # the optimizer's state follows this order
    assert [name for name in current if name in set(parameters)] == parameters
