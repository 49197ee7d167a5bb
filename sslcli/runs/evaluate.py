"""Carry out ssl-eval: load, extract once, apply the protocol, set the baselines beside it, write down what was done."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sslcli import __version__
from sslcli.config.run_config import EvalConfig
from sslcli.data.sources.base import Source
from sslcli.distributed import devices
from sslcli.engine import checkpoint
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError, TrainingFailed, print_error
from sslcli.evaluation.base import Outcome, Protocol
from sslcli.evaluation.online import check_answers, unanswerable
from sslcli.report.console import Screen
from sslcli.report.evaluation_tables import comparison, details, summary
from sslcli.runs import fine_tuned
from sslcli.runs.build import build, find
from sslcli.runs.evaluation import Evaluation, Starts, check_home
from sslcli.runs.image_changes import warn_of_changes
from sslcli.runs.result_name import facts_of_set, joined
from sslcli.runs.subject import Subject, load_subject
from sslcli.system.memory import keep_freed_memory


class BySignal(BaseException):
    """A signal to stop, wherever the evaluation is; no handler of errors may take it for one."""


def run(config: EvalConfig) -> int:
    """Carry out a checked configuration of ssl-eval; the exit code."""
    try:
        return _listening(config)
    except BySignal as signalled:
        print(
            f"ssl-eval: stopped by {signalled}; features that were complete are kept: start the same command again",
            file=sys.stderr,
        )
        return EXIT_STOPPED


def _listening(config: EvalConfig) -> int:
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


def _answered(config: EvalConfig) -> int:
    """The same, with a message where the user's configuration is wrong or the machine fails."""
    try:
        device = devices.pick_device(config.device)
        keep_freed_memory()
        devices.prepare(device, deterministic=True)
        with Screen() as screen:
            path = None if config.run is None else Path(config.run)
            if path is not None and not (path / "config.yaml").exists():
                return _sweep(path, config, device, screen)
            result = evaluate(config, device, screen)
            details(result, screen)
            summary(Path(result["home"]), screen)
        return 0
    except ValueError as error:
        print_error("eval", error)
        return EXIT_CONFIG
    except TrainingFailed as error:
        print_error("eval", error)
        return EXIT_FAILED


def _sweep(folder: Path, config: EvalConfig, device: torch.device, screen: Screen) -> int:
    """Evaluate every run below a folder and print a table of all, best first."""
    runs = sorted(path.parent for path in folder.glob("*/config.yaml") if checkpoint.all_of(path.parent))
    if not runs:
        raise ConfigError(f"{folder} is neither a run directory nor a directory of runs with checkpoints")
    rows = []
    for number, path in enumerate(runs, start=1):
        screen.say(f"[{number}/{len(runs)}] {path}")
        rows.append(evaluate(replace(config, run=str(path)), device, screen))
    comparison(rows, screen)
    return 0


def evaluate(config: EvalConfig, device: torch.device, screen: Screen) -> dict[str, Any]:
    """One evaluation, from the configuration to the result, which is also written to the results folder."""
    started = time.perf_counter()
    subject, source = load_subject(config, device)
    check_home(subject.home)
    if config.run is not None and not subject.foreign:
        warn_of_changes(Path(config.run), source, screen)
    check_classes(source)
    node, protocol = protocol_of(config, subject)
    splits = {name: part for name, part in source.splits.items() if len(part)}
    splits["train"] = protocol.training_positions(source, subject.monitor)
    check_answers(source, splits["train"])
    for name in protocol.reported_splits(splits):
        if warning := unanswerable(source, splits["train"], splits.get(name, splits["train"])):
            screen.warn(f"of the images of {name} {warning}")
    this = Evaluation(config, device, screen, subject, source, splits, variant=protocol.variant(subject.monitor))
    outcome = run_protocol(this, protocol, node)
    this.variant = joined(outcome.variant, this.variant)
    result = outcome.result | written(outcome, this)
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


def check_classes(source: Source) -> None:
    """Raise ConfigError unless a source has labels of at least two classes."""
    if not source.has_labels:
        raise ConfigError(f"{source.name} has no labels, which a probe needs: choose a labeled dataset=...")
    if len(source.classes) < 2:
        raise ConfigError(
            f"{source.name} has a single class, {source.classes[0]!r}, so every answer would be right: "
            "a probe needs two or more"
        )


def protocol_of(config: EvalConfig, subject: Subject) -> tuple[dict[str, Any], Protocol]:
    """Return the settings of the chosen protocol, with those that are null filled in, and the protocol."""
    node = dict(config.protocol)
    kind = find(node["_target_"], base=Protocol, trust=config.trust, where="protocol._target_")
    node |= {key: value for key, value in kind.defaults(subject.monitor).items() if node.get(key) is None}
    torch.manual_seed(node.get("seed", 0))  # of a net that is part of the protocol
    return node, build(node, base=Protocol, trust=config.trust, where="protocol")


def run_protocol(this: Evaluation, protocol: Protocol, node: dict[str, Any]) -> Outcome:
    """Call the protocol with the networks that it evaluates."""
    trained = this.subject.net("trained")
    example = this.task().example()
    this.layer, this.usual_layer = protocol.choose_layer(this.config.feature_layer, trained, example)
    this.check_layer(trained)
    names = ("trained", *(protocol.baselines if this.config.baselines else ()))
    starts = Starts(this, names, {"trained": trained}, keep=protocol.trains)
    task = this.task(fine_tuned=partial(fine_tuned.load, this), kept=partial(this.baseline, node))
    return protocol(starts, task)


def written(outcome: Outcome, this: Evaluation) -> dict[str, Any]:
    """Write the files and the network of an outcome; return what the result says of them."""
    folder = this.place(outcome.result["protocol"])
    for name, text in outcome.files.items():
        this.write(folder / name, text.encode())
        this.screen.say(f"picture: {folder / name}")
    return {} if outcome.net is None else fine_tuned.save(outcome, folder / "net.pt", this)
