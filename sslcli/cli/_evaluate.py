"""Carry out ssl-eval: load, extract once, apply the protocol, set the baselines beside it, write down what was done."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from sslcli import __version__, checkpoint, launch, precision
from sslcli.cli import _run_dir
from sslcli.cli._build import build, build_backbone, build_method, build_source
from sslcli.data.sources import Source
from sslcli.data.views import Views
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError, TrainingFailed
from sslcli.evaluate.features import FeatureSet, cached, evaluating, pixels
from sslcli.evaluate.online import bank_positions, collect
from sslcli.report.console import Screen, percent

SUBJECTS = {"pixels": "raw pixels", "random": "random initialisation", "trained": "trained"}


@dataclass(frozen=True)
class Subject:
    """What is measured: a net, what it was made from, and how images are prepared for it."""

    trained: Callable[[], nn.Module]  # the loaded net
    fresh: Callable[[], nn.Module]  # the same net as initialised
    prepare: Callable[[Tensor], Tensor]
    precision: str
    provenance: dict[str, Any]
    home: Path  # where results go
    monitor: dict[str, Any]  # the run's monitor.* values, {} for a bare backbone
    foreign: bool  # measured on other images than it was trained on


def run(config: dict[str, Any]) -> int:
    """Carry out a checked configuration of ssl-eval; the exit code."""
    try:
        device = launch.pick_device(config["device"])
        with Screen() as screen:
            path = None if config["run"] is None else Path(config["run"])
            if path is not None and not (path / "config.yaml").exists():
                return _sweep(path, config, device, screen)
            result = evaluate(config, device, screen)
            summary(Path(result["home"]), screen)
        return 0
    except ValueError as error:
        print(f"ssl-eval: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except TrainingFailed as error:
        print(f"ssl-eval: {error}", file=sys.stderr)
        return EXIT_FAILED


def _sweep(folder: Path, config: dict[str, Any], device: torch.device, screen: Screen) -> int:
    """Evaluate every run below a folder and print a table of all, best first."""
    runs = sorted(path.parent for path in folder.glob("*/config.yaml") if checkpoint.all_of(path.parent))
    if not runs:
        raise ConfigError(f"{folder} is neither a run directory nor a directory of runs with checkpoints")
    rows = []
    for number, path in enumerate(runs, start=1):
        screen.say(f"[{number}/{len(runs)}] {path}")
        rows.append(evaluate(config | {"run": str(path)}, device, screen))
    rows.sort(key=lambda row: -row["top1"])
    table = Table("run", "top-1", "95 % interval", "random initialisation", title=rows[0]["protocol"])
    for row in rows:
        low, high = row["interval"]
        random = row.get("baselines", {}).get("random")
        table.add_row(
            Path(row["home"]).parent.name,
            percent(row["top1"]),
            f"{percent(low)} to {percent(high)}",
            percent(random["top1"]) if random else "-",
        )
    screen.console.print(table)
    return 0


def evaluate(config: dict[str, Any], device: torch.device, screen: Screen) -> dict[str, Any]:
    """One evaluation, from the configuration to the result, which is also written to its home."""
    started = time.perf_counter()
    trust, protocol_node = config["trust"], dict(config["protocol"])
    subject, source = load_subject(config, device)
    if not source.labelled:
        raise ConfigError(f"{source.name} has no labels, which a probe needs: choose a labelled dataset=...")
    splits = {name: part for name, part in source.splits.items() if len(part)}
    if protocol_node["_target_"].endswith(".Knn"):
        for name in ("k", "temperature"):
            if protocol_node[name] is None:
                protocol_node[name] = subject.monitor.get(f"knn_{name}")
        splits["train"] = bank_positions(source, subject.monitor.get("knn_images"))
    protocol = build(protocol_node, trust=trust, where="protocol")

    def features(name: str) -> FeatureSet:
        return _features(name, subject, source, splits, config, device, screen)

    result: dict[str, Any] = protocol(features("trained"))
    if config["baselines"]:
        result["baselines"] = {
            name: {key: value for key, value in protocol(features(name)).items() if "top" in key or "interval" in key}
            for name in ("pixels", "random")
        }
    result |= {
        **subject.provenance,
        "protocol_settings": {key: value for key, value in protocol_node.items() if key != "_target_"},
        "feature_layer": "backbone",
        "transform": f"test transform at {source.image_size} px, normalised as in pre-training",
        "dataset": source.name,
        "dataset_fingerprint": source.fingerprint,
        "precision": subject.precision,
        "sslcli": __version__,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
    }
    path = subject.home / f"{result['protocol']}{'_' + source.name if subject.foreign else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace(path, json.dumps(result, indent=2).encode())
    return result | {"home": str(subject.home)}


def load_subject(config: dict[str, Any], device: torch.device) -> tuple[Subject, Source]:
    """The net to measure and the images to measure it on."""
    trust = config["trust"]
    if config["weights"] is not None:
        return _bare(config, device)
    run_dir = Path(config["run"])
    saved = _run_dir.read_config(run_dir)
    source = build_source(config if config.get("dataset") else saved, trust=trust)
    views: Views = build(saved["views"], trust=trust, where="views")
    paths = checkpoint.all_of(run_dir)
    if config["checkpoint"] != "last":
        paths = [path for path in paths if path == checkpoint.path_of(run_dir, int(config["checkpoint"]))]
    if not paths:
        kept = ", ".join(str(int(path.stem[5:])) for path in checkpoint.all_of(run_dir)) or "none"
        raise ConfigError(f"checkpoint is {config['checkpoint']!r}, but {run_dir} holds the steps: {kept}")
    path = paths[-1]
    mean, std = saved["dataset"]["mean"], saved["dataset"]["std"]

    def method() -> nn.Module:
        return build_method(
            saved,
            image_size=saved["dataset"]["image_size"],
            num_images=saved["effective"]["training images"],
            trust=trust,
        ).to(device)

    def trained() -> nn.Module:
        net = method()
        load_strictly(net, checkpoint.load(path, device=device)["method"], str(path))
        return net

    wanted = config["precision"] if config["precision"] != "auto" else saved["effective"]["precision"]
    provenance = {
        "run": str(run_dir.absolute()),
        "checkpoint": path.name,
        "checkpoint_sha256": checkpoint.sha256(path),
        "step": int(path.stem[5:]),
        "method": saved["method"]["_target_"],
        "backbone": saved["backbone"]["_target_"],
        "pretrained_on": type_name(saved["dataset"]),
        "pretraining_seed": saved["seed"],
    }
    prepare = _prepare(views, mean, std)
    resolved = precision.resolve(wanted, device)
    foreign = bool(config.get("dataset")) and images_of(config["dataset"]) != images_of(saved["dataset"])
    if not foreign:
        provenance["pretrained_on"] = source.name
    return Subject(trained, method, prepare, resolved, provenance, run_dir / "eval", saved["monitor"], foreign), source


def images_of(node: dict[str, Any]) -> dict[str, Any]:
    """What decides which images a set has, and not how they are read."""
    return {key: value for key, value in node.items() if key not in ("workers", "max_bad", "download", "memory_gb")}


def type_name(node: dict[str, Any]) -> str:
    """The name of an image set without building it: what torchvision calls it, or its class."""
    return str(node.get("name") or node["_target_"].rpartition(".")[2].lower())


def _prepare(views: Views, mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: views.finish(images, mean=mean, std=std)


def _bare(config: dict[str, Any], device: torch.device) -> tuple[Subject, Source]:
    """A backbone from a file of its own."""
    for group in ("backbone", "dataset"):
        if not config.get(group):
            raise ConfigError(f"weights=FILE needs {group}=... as well")
    source = build_source(config, trust=config["trust"])
    path = Path(config["weights"])

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        net = build_backbone(config, image_size=source.image_size, trust=config["trust"]).to(device)
        return net.to(memory_format=torch.channels_last)

    def trained() -> nn.Module:
        net = fresh()
        load_strictly(net, checkpoint.load_weights(path, device=device), str(path))
        return net

    provenance = {
        "weights": str(path.absolute()),
        "checkpoint_sha256": checkpoint.sha256(path),
        "backbone": config["backbone"]["_target_"],
    }
    views = Views([{"crop_scale": None}])
    resolved = precision.resolve(config["precision"], device)
    home = path.with_name(path.name + ".eval")
    prepare = _prepare(views, source.mean, source.std)
    return Subject(trained, fresh, prepare, resolved, provenance, home, {}, foreign=False), source


def load_strictly(net: nn.Module, state: dict[str, Any], where: str) -> None:
    """Load a state whose keys and shapes all match. Raises ConfigError, naming what does not, otherwise."""
    own = net.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if isinstance(own[key], Tensor) and own[key].shape != state[key].shape
    ]
    if missing or unknown or shapes:
        raise ConfigError(
            f"{where} does not fit this net, and a net with other weights would be measured in its place: "
            f"{len(missing)} keys are missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3]) or '-'}), "
            f"{len(shapes)} differ in shape ({'; '.join(sorted(shapes)[:3]) or '-'}). Give the backbone it belongs to"
        )
    net.load_state_dict(state)


def _features(
    name: str,
    subject: Subject,
    source: Source,
    splits: dict[str, Tensor],
    config: dict[str, Any],
    device: torch.device,
    screen: Screen,
) -> FeatureSet:
    """Features of all splits by the trained net, the fresh one, or none; from the cache where they are known."""
    net = None if name == "pixels" else (subject.trained if name == "trained" else subject.fresh)()
    encode = pixels if net is None else getattr(net, "features", net)

    def compute() -> dict[str, Tensor]:
        seen: dict[str, int] = {}

        def progress(split: str, done: int, total: int) -> None:
            seen[split] = done
            screen.advance(sum(seen.values()), split)

        screen.start(f"features, {SUBJECTS[name]}", total=sum(len(part) for part in splits.values()))
        found = collect(
            encode,
            source,
            splits,
            prepare=(lambda images: images) if net is None else subject.prepare,
            batch_size=config["batch_size"],
            device=device,
            precision="fp32" if net is None else subject.precision,
            workers=config["workers"],
            progress=progress,
        )
        screen.stop()
        return {key: value for key, value in vars(found).items() if isinstance(value, Tensor)}

    positions = hashlib.sha256(b"".join(part.numpy().tobytes() for part in splits.values())).hexdigest()[:16]
    of_checkpoint = ("checkpoint", "checkpoint_sha256", "step", "weights")
    facts = subject.provenance if name == "trained" else {}
    if name == "random":
        facts = {key: value for key, value in subject.provenance.items() if key not in of_checkpoint}
    key = json.dumps([__version__, name, facts, source.fingerprint, positions, subject.precision, config["batch_size"]])
    with evaluating(net) if net is not None else nullcontext():
        if not config["cache"]:
            tensors = compute()
        else:
            digest = hashlib.sha256(key.encode()).hexdigest()[:12]
            tensors = cached(subject.home / "features" / f"{name}_{digest}.pt", key, compute)
    return FeatureSet(**tensors, num_classes=len(source.classes), classes=tuple(source.classes))


def summary(home: Path, screen: Screen) -> None:
    """All protocols measured so far on this subject: raw pixels, random initialisation, trained."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(home.glob("*.json"))}
    table = Table("top-1", *(f"{name} ({result['split']})" for name, result in results.items()))
    for name, title in SUBJECTS.items():
        cells = []
        for result in results.values():
            found = result if name == "trained" else result.get("baselines", {}).get(name)
            cells.append("-" if found is None else _cell(found))
        table.add_row(title, *cells)
    screen.console.print(table)
    screen.say(f"results: {home}")


def _cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{percent(found['top1'])} ({100 * low:.1f} to {100 * high:.1f})"
