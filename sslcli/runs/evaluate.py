"""Carry out ssl-eval: load, extract once, apply the protocol, set the baselines beside it, write down what was done."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from sslcli import __version__
from sslcli.distributed import devices
from sslcli.engine import checkpoint
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError, TrainingFailed
from sslcli.evaluation import layers
from sslcli.evaluation.base import Protocol
from sslcli.evaluation.distill import Distill, Teacher
from sslcli.evaluation.features import FeatureSet, computed, from_bank
from sslcli.evaluation.finetune import Outcome, Tuned
from sslcli.evaluation.knn import Knn
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.online import bank_positions, check_answers, unanswerable
from sslcli.evaluation.training import Progress, Recipe, Start
from sslcli.methods.base import Method
from sslcli.report.console import Screen
from sslcli.report.evaluation_tables import SUBJECTS, comparison, details, results, summary
from sslcli.runs.build import build
from sslcli.runs.evaluation import Evaluation, check_home
from sslcli.runs.image_changes import warn_of_changes
from sslcli.runs.result_name import facts_of_set, joined
from sslcli.runs.subject import load_subject
from sslcli.system.memory import keep_freed_memory
from sslcli.weights.files import load_strictly, load_weights


class BySignal(BaseException):
    """A signal to stop, wherever the evaluation is; no handler of errors may take it for one."""


def run(config: dict[str, Any]) -> int:
    """Carry out a checked configuration of ssl-eval; the exit code."""
    try:
        return _listening(config)
    except BySignal as signalled:
        print(
            f"ssl-eval: stopped by {signalled}; features that were complete are kept: start the same command again",
            file=sys.stderr,
        )
        return EXIT_STOPPED


def _listening(config: dict[str, Any]) -> int:
    """The same, with BySignal raised where a scheduler's signal arrives, or the terminal's when it is closed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise BySignal(signal.Signals(number).name)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # as nohup has it
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        return _answered(config)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answered(config: dict[str, Any]) -> int:
    """The same, with a message where the user's configuration is wrong or the machine fails."""
    try:
        device = devices.pick_device(config["device"])
        keep_freed_memory()
        devices.prepare(device, deterministic=True)
        with Screen() as screen:
            path = None if config["run"] is None else Path(config["run"])
            if path is not None and not (path / "config.yaml").exists():
                return _sweep(path, config, device, screen)
            result = evaluate(config, device, screen)
            details(result, screen)
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
    comparison(rows, screen)
    return 0


def evaluate(config: dict[str, Any], device: torch.device, screen: Screen) -> dict[str, Any]:
    """One evaluation, from the configuration to the result, which is also written to its home."""
    started = time.perf_counter()
    node = dict(config["protocol"])
    subject, source = load_subject(config, device)
    check_home(subject.home)
    if config["run"] is not None and not subject.foreign:
        warn_of_changes(Path(config["run"]), source, screen)
    if not source.labeled:
        raise ConfigError(f"{source.name} has no labels, which a probe needs: choose a labeled dataset=...")
    if len(source.classes) < 2:
        raise ConfigError(
            f"{source.name} has a single class, {source.classes[0]!r}, so every answer would be right: "
            "a probe needs two or more"
        )
    splits = {name: part for name, part in source.splits.items() if len(part)}
    if node["_target_"].endswith(".Knn"):
        for name in ("k", "temperature"):
            if node[name] is None:
                node[name] = subject.monitor.get(f"knn_{name}")
        splits["train"] = bank_positions(source, subject.monitor.get("knn_images"))
    check_answers(source, splits["train"])
    torch.manual_seed(node.get("seed", 0))  # of a net that is part of the protocol
    protocol: Any = build(node, base=Protocol, trust=config["trust"], where="protocol")
    for name in ("val", "test") if isinstance(protocol, Knn) else ("test" if "test" in splits else "val",):
        if told := unanswerable(source, splits["train"], splits.get(name, splits["train"])):
            screen.warn(f"of the images of {name} {told}")
    this = Evaluation(config, device, screen, subject, source, splits, variant=protocol.variant(subject.monitor))
    result = _trained(this, protocol) if isinstance(protocol, Recipe) else _frozen(this, protocol, node)
    result |= {
        "measured": this.measured(result["protocol"]),
        **subject.provenance,
        "protocol_settings": {key: value for key, value in node.items() if key != "_target_"},
        "feature_layer": this.layer,
        "transform": f"test transform at {source.image_size} px, normalized as in pre-training",
        **facts_of_set(source),
        "precision": subject.precision,
        "sslcli": __version__,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
    }
    place = this.place(result["protocol"])
    this.write(place.with_name(f"{place.name}.json"), json.dumps(result, indent=2).encode())
    return result | {"home": str(subject.home)}


def _frozen(this: Evaluation, protocol: Callable[[FeatureSet], dict[str, Any]], node: dict[str, Any]) -> dict[str, Any]:
    """A protocol that looks at features, which it does not change."""
    this.layer = this.config["feature_layer"]
    if this.layer == layers.BANK and this.subject.foreign:
        raise ConfigError("feature_layer is 'bank', but its rows are of the images of pre-training: leave out dataset=")
    net = this.subject.net("trained")
    features = this.features("trained", net)
    if this.layer == layers.BANK:
        assert isinstance(net, Method)
        rows = net.stored()
        assert rows is not None  # else the layer would not be among those of the net
        features = from_bank(features, rows, this.source.splits["train"])
    result = _measure(this, protocol, "trained", features)
    if this.config["baselines"]:
        result["baselines"] = {
            name: this.baseline(name, node, partial(_beside, this, protocol, name)) for name in ("pixels", "random")
        }
    return result


def _measure(
    this: Evaluation, protocol: Callable[[FeatureSet], dict[str, Any]], name: str, features: FeatureSet
) -> dict[str, Any]:
    """What a protocol finds in features. A probe shows how far it is: of wide features it takes minutes."""
    if not isinstance(protocol, Linear):
        return computed(protocol, features, this.device)
    told = Progress(this.screen, f"linear probe, {SUBJECTS[name]}", total=protocol.passes)
    try:
        return computed(protocol, features, this.device, tell=told)
    finally:
        this.screen.stop()


def _beside(this: Evaluation, protocol: Callable[[FeatureSet], dict[str, Any]], name: str) -> dict[str, Any]:
    """The numbers of a baseline."""
    features = this.features(name, None if name == "pixels" else this.subject.net(name))
    found = _measure(this, protocol, name, features)
    return {key: value for key, value in found.items() if "top" in key or "interval" in key}


def _trained(this: Evaluation, protocol: Any) -> dict[str, Any]:
    """A protocol that trains; what it made is kept in a folder beside its result."""
    if this.config["feature_layer"] == layers.BANK:
        raise ConfigError("feature_layer is 'bank', which cannot be trained: take protocol=knn or linear")
    nets = {"trained": this.subject.net("trained")}
    from_layer, images = protocol.from_layer if isinstance(protocol, Tuned) else 0, this.task().example()
    this.layer = _layer(this.config["feature_layer"], from_layer, nets["trained"], images)
    usual = None if isinstance(protocol, Tuned) else 0
    this.usual_layer = _layer(layers.BACKBONE, usual, nets["trained"], images)
    given = {}
    if isinstance(protocol, Distill):
        given["teacher"] = _teacher(this, protocol.teacher)
        taught_by = given["teacher"].provenance["measured"]
        this.variant = joined(taught_by if taught_by != Distill.teacher else "", this.variant)
    if this.config["baselines"]:
        nets["random"] = this.subject.net("random")
    starts = {arm: Start(net=net, layer=this.layer, features=this.features(arm, net)) for arm, net in nets.items()}
    found: Outcome = protocol(starts, this.task(), **given)
    folder = this.place(found.result["protocol"])
    for name, text in found.files.items():
        this.write(folder / name, text.encode())
        this.screen.say(f"picture: {folder / name}")
    return found.result | (_keep(found, folder / "net.pt", this) if found.net is not None else {})


def _layer(feature_layer: str, from_layer: int | None, net: nn.Module, images: Tensor) -> str:
    """Where training starts from: a layer of the head goes before the backbone, and with nothing else."""
    if feature_layer != layers.BACKBONE:
        if from_layer:
            raise ConfigError(
                f"feature_layer is {feature_layer!r} and protocol.from_layer {from_layer}, which is another place: "
                "give one of them"
            )
        return feature_layer
    if from_layer and f"head{from_layer}" not in layers.names(net, images):
        last = net.head_layers if isinstance(net, Method) else 0
        has = f"has the layers 1 to {last}" if last else "lets nothing in (simclr_v2 does)"
        raise ConfigError(f"protocol.from_layer is {from_layer}, but the head of this net {has}; 0 is the backbone")
    own = net.finetune_layer if isinstance(net, Method) else 0
    number = own if from_layer is None else from_layer
    return f"head{number}" if number else layers.BACKBONE


def _teacher(this: Evaluation, wanted: str) -> Teacher:
    """The net that an earlier protocol left in this run directory, of the same checkpoint and on the same images."""
    name, result = _result_of_teacher(this, wanted)
    path, protocol = this.subject.home / result["net"], result["protocol"]
    if not path.exists():
        raise ConfigError(f"there is no teacher {path}, of which {name}.json tells: run protocol={protocol} again")
    state = load_weights(path, device=this.device)
    version = state.get("dataset_version", this.source.version)  # older versions stored the fingerprint alone
    if (state["dataset_fingerprint"], version) != (this.source.fingerprint, this.source.version):
        raise ConfigError(f"the teacher {path} was trained on other images: run protocol={protocol} again")
    if state["checkpoint_sha256"] != this.subject.provenance["checkpoint_sha256"]:
        raise ConfigError(f"the teacher {path} is of another checkpoint: run protocol={protocol} again, or choose that")
    shape = {"width": state["width"], "num_classes": len(state["classes"])}
    net = Classifier(this.subject.fresh(), state["layer"], images=this.task().example(), **shape)
    load_strictly(net, state["net"], str(path))
    provenance = {
        "protocol": protocol,
        "measured": result.get("measured", protocol),
        "net": str(path.relative_to(this.subject.home)),
    }
    return Teacher(
        net=net, positions=state["positions"].cpu(), provenance=provenance | {"sha256": checkpoint.sha256(path)}
    )


def _result_of_teacher(this: Evaluation, wanted: str) -> tuple[str, dict[str, Any]]:
    """The name and the content of the result that `wanted` means: a protocol, or one with its variant."""
    home, found = this.subject.home, {}
    for name, result in results(home, this.screen).items():
        measured = result.get("measured", result["protocol"])
        fits = measured == wanted or measured.startswith(f"{wanted}_") or name == wanted
        if "net" in result and fits and name == joined(measured, this.measured_on):
            found[measured] = (name, result)
    if len(found) > 1 and wanted not in found:
        raise ConfigError(f"protocol.teacher is {wanted!r}, which may be any of: {', '.join(found)}. Give one of them")
    if not found:
        of = f" of {this.measured_on}" if this.measured_on else ""
        raise ConfigError(
            f"there is no teacher {wanted!r}{of} in {home}: make it with protocol={wanted.partition('_')[0]} on the "
            "same run first"
        )
    return found[wanted] if wanted in found else next(iter(found.values()))


def _keep(found: Outcome, path: Path, this: Evaluation) -> dict[str, Any]:
    """Write a trained net, which protocol=distill can take as its teacher; its name and checksum."""
    assert found.net is not None
    assert found.positions is not None
    buffer = io.BytesIO()
    torch.save(
        {
            "net": found.net.state_dict(),
            "layer": found.net.layer,
            "width": found.net.classify.in_features,
            "positions": found.positions,
            "classes": list(this.source.classes),
            "dataset_fingerprint": this.source.fingerprint,
            "dataset_version": this.source.version,
            "checkpoint_sha256": this.subject.provenance["checkpoint_sha256"],
        },
        buffer,
    )
    this.write(path, buffer.getvalue())
    return {"net": str(path.relative_to(this.subject.home)), "net_sha256": checkpoint.sha256(path)}
