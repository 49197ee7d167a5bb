"""Execution of ssl-eval: load a network, run the protocol and its baselines, write the result file."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslcli import __version__
from sslcli.config.run_config import EvalConfig, NetworkConfig
from sslcli.data import worker_server
from sslcli.data.sources.base import Source
from sslcli.distributed import collectives, devices, processes, shared_work
from sslcli.engine import checkpoint
from sslcli.engine.precision import autocast
from sslcli.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    ProcessLost,
    TrainingFailed,
    first_line,
    is_out_of_memory,
    print_error,
    user_code,
)
from sslcli.evaluation import layers
from sslcli.evaluation.base import Outcome, Protocol, check_outcome, described, shares_work
from sslcli.evaluation.splits import check_answers, check_reported, unanswerable
from sslcli.evaluation.variants import join_parts
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.report.console import Screen
from sslcli.report.evaluation_tables import comparison, details, summary
from sslcli.runs import fine_tuned
from sslcli.runs.agreement import check_agreement
from sslcli.runs.build import build, find_class
from sslcli.runs.evaluation import Evaluation, Starts, check_results_dir
from sslcli.runs.image_changes import warn_of_changes
from sslcli.runs.out_of_memory import evaluation_message
from sslcli.runs.result_name import dataset_facts
from sslcli.runs.subject import Subject, load_subject
from sslcli.system.launch_variables import AGENT
from sslcli.system.memory import keep_freed_memory
from sslcli.system.stop_signals import StoppedBySignal, raised_signals

WAIT = 5.0  # seconds that ranks other than 0 wait before they print, see _end
LONGEST = 30 * 86400.0  # maximum seconds in which one process waits for another
LOST_CONTACT = "another process of this evaluation ended; run the same command again to continue with cached features"
MAY_DIFFER = ("launcher", "device", "workers")  # settings that may differ between processes


def run(config: EvalConfig) -> int:
    """Run ssl-eval with a validated configuration in this process, and return the exit code."""
    try:
        with raised_signals():
            return _run_with_messages(config)
    except StoppedBySignal as stopped:
        if config.launcher.kind == "slurm" and stopped.args != ("SIGTERM",):
            return EXIT_STOPPED  # Slurm signals every process; the batch script logs the reason, and requeues the job
        if AGENT in os.environ:  # our agent prints the message, unless it ended this process after another one failed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if processes.number() == 0:
            print_error(
                "eval", f"stopped by {stopped}; complete features are cached: run the same command again to resume"
            )
        return EXIT_STOPPED


def _run_with_messages(config: EvalConfig) -> int:
    """Evaluate, and print a message if the configuration is invalid, or if the machine or another process fails."""
    try:
        device = devices.pick_device(config.device)
        keep_freed_memory()
        if processes.is_launched() or config.launcher.threads is not None:
            devices.set_threads(config.launcher.threads)
        worker_server.start(device)
        devices.prepare(device, deterministic=True)
        with _all_processes(config, device), Screen(silent=not collectives.is_main()) as screen:
            return _run(config, device, screen)
    except ProcessLost as error:
        return _end(error, processes.exit_lost())
    except (ValueError, TrainingFailed) as error:
        return _end(error, exit_code(error))
    except RuntimeError as error:
        if processes.lost_contact(error):
            # The process that was lost prints why it ended, unless the network connection failed.
            return _end(f"{LOST_CONTACT} (noticed here: {first_line(error)})", processes.exit_lost(), wait=2 * WAIT)
        raise


@contextmanager
def _all_processes(config: EvalConfig, device: torch.device) -> Iterator[None]:
    """Join the processes of the evaluation within the `with` block, if a launcher started several."""
    if not processes.is_launched():
        yield
        return
    limit = config.launcher.timeout_seconds
    # A process may wait for a long time until rank 0 has trained. The watchdog ends processes that hang.
    with processes.process_group(device, limit=limit, end=_end_stalled_process, timeout=LONGEST):
        check_agreement({name: value for name, value in asdict(config).items() if name not in MAY_DIFFER})
        yield


def _run(config: EvalConfig, device: torch.device, screen: Screen) -> int:
    """Evaluate a run, a weight file or a folder of runs, print the tables, and return the exit code."""
    path = None if config.run is None else Path(config.run)
    if path is not None and not (path / "config.yaml").exists():
        return _evaluate_folder(path, config, device, screen)
    result = evaluate(config, device, screen)
    if collectives.is_main():
        details(result, screen)
        summary(Path(result["results_dir"]), screen)
    return 0


def evaluated(config: EvalConfig) -> dict[str, Any]:
    """Evaluate one run or weight file in this process, print the tables, and return the result, see `evaluate`."""
    device = devices.pick_device(config.device)
    keep_freed_memory()
    if config.launcher.threads is not None:
        devices.set_threads(config.launcher.threads)
    devices.prepare(device, deterministic=True)
    with Screen() as screen:
        result = evaluate(config, device, screen)
        details(result, screen)
        summary(Path(result["results_dir"]), screen)
    return result


def exit_code(error: Exception) -> int:
    """Return the exit code for the error of an evaluation."""
    return EXIT_FAILED if isinstance(error, TrainingFailed) else EXIT_CONFIG


def _end(message: BaseException | str, code: int, *, wait: float = WAIT) -> int:
    """Print why this process ends, and return the exit code, see `processes.end_process`.

    Ranks other than 0 first wait `wait` seconds. Rank 0 waits only for a process that it lost contact with.
    """
    return processes.end_process("eval", message, code, wait=wait if processes.number() > 0 or wait != WAIT else 0.0)


def _end_stalled_process(message: str) -> None:
    """End this process from its watchdog thread. If `message` is "", another process prints the message."""
    if message:
        print_error("eval", message)
    else:
        time.sleep(WAIT)
    os._exit(EXIT_FAILED)


def _evaluate_folder(folder: Path, config: EvalConfig, device: torch.device, screen: Screen) -> int:
    """Evaluate every run directly below a folder, and print a table with the best run first.

    If one run cannot be evaluated, its error is printed, and the evaluation continues with the next run. Returns the
    largest exit code.
    """
    runs = sorted(path.parent for path in folder.glob("*/config.yaml") if checkpoint.all_of(path.parent))
    if not runs:
        raise ConfigError(f"{folder} is neither a run directory nor a directory of runs with checkpoints")
    rows, codes, is_main = [], {0}, collectives.is_main()
    for number, path in enumerate(runs, start=1):
        screen.say(f"[{number}/{len(runs)}] {path}")
        try:
            rows.append(evaluate(replace(config, run=str(path)), device, screen))
        except (ValueError, TrainingFailed) as error:
            if not shared_work.is_agreed(error):  # the other processes do not know of it
                raise
            screen.stop()
            codes.add(exit_code(error))
            if is_main:
                print_error("eval", error)
    if rows and is_main:
        comparison(rows, screen)
        for line in dict.fromkeys(row["description"] for row in rows):
            screen.say(line)
    if len(rows) < len(runs):
        screen.warn(f"{len(runs) - len(rows)} of {len(runs)} runs could not be evaluated, see the errors above")
    return max(codes)


@user_code("evaluating", passes=lambda error: isinstance(error, ValueError) or _is_lost_contact(error))
def evaluate(config: EvalConfig, device: torch.device, screen: Screen) -> dict[str, Any]:
    """Evaluate one checkpoint or weight file, write the result file, and return the result.

    The returned result contains `results_dir`, the folder of the result file. With several processes, only rank 0
    writes files and returns the result, and all other processes return {}. Raises ConfigError if the evaluation runs
    out of memory.
    """
    try:
        return _evaluate(config, device, screen)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ConfigError(evaluation_message(error, config, device)) from error
        raise


def _is_lost_contact(error: BaseException) -> bool:
    return isinstance(error, Exception) and processes.lost_contact(error)


@dataclass(frozen=True)
class Prepared:
    """An evaluation before the first feature is computed: the protocol, its settings, and the network with images."""

    evaluation: Evaluation
    protocol: Protocol
    node: dict[str, Any]


def _evaluate(config: EvalConfig, device: torch.device, screen: Screen) -> dict[str, Any]:
    started = time.perf_counter()
    prepared = shared_work.agreed(partial(prepare, config, device, screen))
    steps = collectives.gather_objects(prepared.evaluation.subject.provenance.get("step"))
    if steps[0] is not None and len(set(steps)) > 1:  # a checkpoint was saved while the processes started
        prepared = shared_work.agreed(partial(prepare, replace(config, checkpoint=steps[0]), device, screen))
    outcome = run_protocol(prepared.evaluation, prepared.protocol, prepared.node)
    write = partial(write_result, outcome, prepared, started)
    return shared_work.agreed(write if collectives.is_main() else dict)


def prepare(config: EvalConfig, device: torch.device, screen: Screen) -> Prepared:
    """Load the network and the images, build the protocol, and check that accuracies can be reported."""
    subject, source = load_subject(config, device)
    if collectives.is_main():
        check_results_dir(subject.results_dir)
    for message in subject.messages:
        screen.say(message)
    report_other_images(config, subject, source, screen)
    check_classes(source)
    node, protocol = build_protocol(config, subject)
    splits = source.nonempty_splits()
    reported = protocol.reported_splits(splits)
    if protocol.trains_on_val and "val" not in reported:
        splits.pop("val", None)
    splits["train"] = protocol.training_positions(source, subject.monitor)
    for name in (name for name in reported if name in splits):
        splits[name] = protocol.query_positions(source, name, subject.monitor)
    check_answers(source, splits["train"])
    check_reported(source, reported, splits["train"])
    for name in reported:
        if warning := unanswerable(source, splits["train"], splits[name]):
            screen.warn(f"of the images of {name} {warning}")
    variant = protocol.variant(subject.monitor)
    return Prepared(Evaluation(config, device, screen, subject, source, splits, variant=variant), protocol, node)


def report_other_images(config: NetworkConfig, subject: Subject, source: Source, screen: Screen) -> None:
    """Print a note if the images have another size than in pre-training, or changed since pre-training."""
    if subject.image_size not in (None, source.image_size):
        screen.say(
            f"images are evaluated at {source.image_size} pixels, but the network was trained at {subject.image_size}: "
            f"dataset.image_size={subject.image_size} selects this size"
        )
    if config.run is not None and not subject.has_other_images:
        warn_of_changes(Path(config.run), source, screen)


def write_result(outcome: Outcome | None, prepared: Prepared, started: float) -> dict[str, Any]:
    """Write the result file and the files of the protocol, and return the result.

    `started` is the start time of the evaluation, by time.perf_counter.
    """
    assert outcome is not None
    evaluation, subject, source = prepared.evaluation, prepared.evaluation.subject, prepared.evaluation.source
    evaluation.variant = join_parts(outcome.variant, evaluation.variant)
    result = outcome.result | write_outcome(outcome, evaluation)
    normalization = "normalized as in pre-training" if subject.views.normalize else "not normalized, as in pre-training"
    if not {"run", "exported_from"} & subject.provenance.keys():  # other weight files do not state their normalization
        normalization = f"normalized with mean {list(subject.mean)} and std {list(subject.std)}"
    result |= {
        "measured": evaluation.quantity(result["protocol"]),
        "description": described(prepared.protocol, outcome.result),
        **subject.provenance,
        "protocol_settings": {key: value for key, value in prepared.node.items() if key != "_target_"},
        "feature_layer": evaluation.layer,
        "evaluated_part": evaluation.evaluated_part,
        "transform": f"test transform at {source.image_size} px, {normalization}",
        **dataset_facts(source),
        "precision": subject.precision,
        "sslcli": __version__,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
    }
    path = evaluation.result_path(result["protocol"])
    evaluation.write(path.with_name(f"{path.name}.json"), json.dumps(result, indent=2).encode())
    return result | {"results_dir": str(subject.results_dir)}


def check_classes(source: Source) -> None:
    """Raise ConfigError unless the dataset has labels of at least two classes."""
    if not source.has_labels:
        raise ConfigError(f"{source.name} has no labels, but an evaluation needs them: choose a labeled dataset=...")
    if len(source.classes) < 2:
        raise ConfigError(
            f"{source.name} has a single class, {source.classes[0]!r}, so every prediction would be correct: "
            "choose a dataset=... with at least two classes"
        )


def build_protocol(config: EvalConfig, subject: Subject) -> tuple[dict[str, Any], Protocol]:
    """Return the settings of the chosen protocol and an instance of it.

    A setting of null is replaced by the protocol's default for the run, if the protocol has one.
    """
    node = dict(config.protocol)
    kind = find_class(node["_target_"], base=Protocol, trust=config.trust, where="protocol._target_")
    node |= {key: value for key, value in kind.defaults(subject.monitor).items() if node.get(key) is None}
    torch.manual_seed(node.get("seed", 0))  # for networks that the protocol initializes
    return node, build(node, base=Protocol, trust=config.trust, where="protocol")


def run_protocol(evaluation: Evaluation, protocol: Protocol, node: dict[str, Any]) -> Outcome | None:
    """Run the protocol on the trained network and the baselines. Return its `Outcome`, such as the accuracies.

    `node` contains the settings of the protocol. With several processes, the result is None on all ranks but rank 0
    unless the protocol shares its work.
    """

    def choose_layer() -> nn.Module:
        trained = evaluation.subject.net("trained")
        check_images_fit(evaluation.subject, evaluation.source, trained, evaluation.device)
        example = evaluation.task().example()
        named = trained if isinstance(trained, Method) else evaluation.subject
        evaluation.evaluated_part = named.evaluated_part
        evaluation.layer, evaluation.default_layer = protocol.choose_layer(
            evaluation.config.feature_layer, trained, example
        )
        return trained

    trained = shared_work.agreed(choose_layer)
    names = ("trained", *(protocol.baselines if evaluation.config.baselines else ()))
    starts = Starts(evaluation, names, trained, keep=protocol.trains, on_main=not shares_work(protocol))
    task = evaluation.task(fine_tuned=partial(fine_tuned.load, evaluation), kept=partial(evaluation.baseline, node))

    def call() -> Outcome:
        outcome = protocol(starts, task)
        check_outcome(outcome, protocol)
        return outcome

    return starts.call_on_main(call) if starts.on_main else call()


def check_images_fit(subject: Subject, source: Source, net: nn.Module, device: torch.device) -> None:
    """Raise ConfigError unless the network `net` accepts images with the size and channels of those of `source`."""
    size, pixels = subject.image_size, f"{source.image_size}x{source.image_size} pixels"
    has = f"the images of {source.name} have {source.channels} channels and {pixels}"
    if len(subject.mean) != source.channels:
        raise ConfigError(
            f"{has}, but the network was trained on images with {len(subject.mean)} channels: choose a dataset=... "
            "with the channels of pre-training"
        )
    remedy = (
        "choose a dataset=... with the channels of pre-training"
        if size == source.image_size
        else f"set dataset.image_size to {'the image size of pre-training' if size is None else size}"
    )
    with (
        user_code(
            "computing features",
            explain=lambda error: f"{has}, which the network does not accept ({first_line(error)}): {remedy}",
        ),
        evaluating(net),
        torch.no_grad(),
        devices.unchanged_random_state(device),
        autocast(device, subject.precision),
    ):
        example = torch.zeros(2, source.channels, source.image_size, source.image_size, device=device)
        layers.read(net, layers.BACKBONE, subject.prepare(example))


def write_outcome(outcome: Outcome, evaluation: Evaluation) -> dict[str, Any]:
    """Write the files and the trained network that a protocol returned.

    Return the entries of the result about the network: the path and the checksum of its file. If there is no network,
    return {}.
    """
    folder = evaluation.result_path(outcome.result["protocol"])
    for name, text in outcome.files.items():
        evaluation.write(folder / name, text.encode())
        evaluation.screen.say(f"picture: {folder / name}")
    return {} if outcome.net is None else fine_tuned.save(outcome, folder / "net.pt", evaluation)
