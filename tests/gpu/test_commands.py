"""ssl-train, ssl-eval and ssl-export on the device."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from command_line import SMALL, Cli, Ended, installed
from method_runs import FAMILIES, config_of
from small_runs import differences, newest
from sslcli.runs import worker

pytestmark = pytest.mark.gpu
PROTOCOLS = {path.stem: path for path in (Path(__file__).parents[2] / "conf" / "protocol").glob("*.yaml")}
QUICK = {  # of the keys that a protocol has
    "epochs": "1",
    "steps": "2",
    "lrs": "[0.02,0.1]",
    "weight_decays": "[0.0]",
    "seeds": "1",
    "smallest": "20",
    "points": "2",
    "labels_per_class": "2",
    "batch_size": "16",
}


def succeeded(ended: Ended) -> str:
    assert (ended.code, ended.err) == (0, "")
    return ended.out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    """A finished run of the installed command on the device, with k-NN. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("finished")
    installed(folder, "ssl-train", *SMALL, f"device={device.type}", "monitor.knn_k=10", "run_dir=run")
    return folder / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def evaluate(cli: Cli, run_dir: Path, protocol: str, device: torch.device, *overrides: str) -> dict[str, object]:
    """Return the result of a protocol, evaluated with few and short trainings."""
    keys = yaml.safe_load(PROTOCOLS[protocol].read_text())
    if "teacher" in keys:
        evaluate(cli, run_dir, keys["teacher"], device)
    settings = [f"protocol.{key}={value}" for key, value in QUICK.items() if key in keys]
    line = [f"run={run_dir}", f"protocol={protocol}", f"device={device.type}", "cache=false", *settings, *overrides]
    succeeded(cli("ssl-eval", *line))
    written = max((run_dir / "eval").glob(f"{protocol}*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = json.loads(written.read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_every_protocol(protocol: str, cli: Cli, run_dir: Path, device: torch.device) -> None:
    found = evaluate(cli, run_dir, protocol, device)
    assert found["protocol"] == protocol


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_accuracies_equal_those_of_the_cpu(protocol: str, cli: Cli, run_dir: Path, device: torch.device) -> None:
    """At most 2 of the 100 test images are classified differently, because features are rounded differently."""
    found = evaluate(cli, run_dir, protocol, device, "precision=fp32")
    expected = evaluate(cli, run_dir, protocol, torch.device("cpu"), "precision=fp32")
    key = "test_top1" if "test_top1" in expected else "top1"
    assert float(str(found[key])) == pytest.approx(float(str(expected[key])), abs=0.02)


def test_knn_of_the_last_step_is_that_of_ssl_eval(cli: Cli, run_dir: Path, device: torch.device) -> None:
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["monitor/knn_top1"] == evaluate(cli, run_dir, "knn", device)["top1"]


def test_the_exported_backbone_computes_on_the_cpu(cli: Cli, run_dir: Path) -> None:
    succeeded(cli("ssl-export", f"run={run_dir}", "out=backbone.pt"))
    exported = torch.load("backbone.pt", weights_only=True)
    tensors = [value for value in flat(exported) if isinstance(value, torch.Tensor)]
    assert tensors
    assert {value.device.type for value in tensors} == {"cpu"}


def flat(value: object) -> list[object]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    return [value] if parts is None else [leaf for part in parts for leaf in flat(part)]


def test_a_dry_run_measures_the_memory_of_the_device(cli: Cli, device: torch.device) -> None:
    out = succeeded(cli("ssl-train", *SMALL, "dry_run=true", "run_dir=dry", f"device={device.type}"))
    (peak,) = re.findall(r"peak memory \(GB\) +([\d.e-]+)", out)
    assert 0 < float(peak) < 500


@pytest.mark.parametrize("word", FAMILIES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_run(word: str, device: torch.device, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    config = config_of(word)
    train = config.values["train"] | {"deterministic": True, "precision": "auto"}
    config = config.changed(device=str(device), train=train)
    assert worker.run(config.changed(run_dir=str(whole))) == 0
    (half / "checkpoints").mkdir(parents=True)
    for path in (whole / "checkpoints").glob("step-00000005.*"):
        shutil.copy(path, half / "checkpoints")
    assert newest(half)["step"] == 5
    assert worker.run(config.changed(run_dir=str(half), resume="must")) == 0
    assert differences(newest(half), newest(whole)) == []


@pytest.mark.cuda
def test_out_of_memory_ends_with_the_keys_that_help(cli: Cli, device: torch.device) -> None:
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(device) + 2e8  # ResNet-50, its gradients and its momentum need 300 MB
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    try:
        ended = cli("ssl-train", *SMALL, "backbone=resnet50", "device=cuda", "run_dir=large", "dataset.image_size=64")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
    assert ended.code == 2
    assert "ssl-train: out of memory (Tried to allocate" in ended.err
    assert f"Memory of this process on {device}, in GB: parameters 0." in ended.err
    assert "reduce train.batch_size" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.cuda
def test_the_largest_batch_that_fits_is_found(cli: Cli) -> None:
    ended = cli("ssl-train", *SMALL, "dry_run=true", "find_batch_size=true", "device=cuda")
    assert (ended.code, ended.err) == (0, "")
    assert "the largest train.batch_size that fits is 200, which is limited by" in ended.out
