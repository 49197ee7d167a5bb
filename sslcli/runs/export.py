"""Execution of ssl-export: write the weights of a checkpoint for sslcli or for another tool."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sslcli.config.settings import ExportSettings
from sslcli.errors import EXIT_FAILED, ConfigError, TrainingFailed, is_disk_failure, print_error
from sslcli.report.console import Screen
from sslcli.runs.export_check import Images, comparison_images, features_of, result_of
from sslcli.runs.export_folder import CARD, check_folder, check_packages, check_target, write_folder
from sslcli.runs.export_torch import USAGE, write_file
from sslcli.runs.exported_run import ExportedRun
from sslcli.runs.initial_weights import ROW as INITIAL_WEIGHTS
from sslcli.runs.model_card import accuracies, model_card, sentence
from sslcli.runs.teacher import ROW as TEACHER
from sslcli.system import atomic
from sslcli.weights.export.formats import TARGETS
from sslcli.weights.export.preprocessing import PREPROCESSING
from sslcli.weights.export.target import Target, Trained, json_text, not_finite


def run(config: ExportSettings) -> int:
    """Run ssl-export with a validated configuration, and return the exit code."""
    try:
        with Screen() as screen:
            export(config, screen)
    except TrainingFailed as error:
        print_error("export", error)
        return EXIT_FAILED
    return 0


def export(config: ExportSettings, screen: Screen) -> None:
    """Write the weights of a checkpoint in the chosen format, and print a table.

    Raises ConfigError if the format does not fit the run, if the features of the export differ from those of the run,
    or if `out` cannot be written. Raises TrainingFailed if the disk is full or broken.
    """
    target = TARGETS.get(config.format)
    if target is not None:
        if config.what != "backbone":
            raise ConfigError(f"what is {config.what!r}, but format={target.name} exports only what=backbone")
        check_packages(target)
    found = ExportedRun.read(config)
    step = f"step-{found.loaded.step:08d}"
    name = f"{config.what}-{step}.pt" if target is None else f"{target.name}-{step}"
    out = Path(config.out or found.run_dir / "export" / name)
    try:
        if target is None:
            export_file(found, config.what, out, screen)
        else:
            export_folder(found, target, out, screen)
    except OSError as error:
        if is_disk_failure(error):
            raise TrainingFailed(
                f"{error.filename or out} cannot be written ({error.strerror}): free space or repair the disk"
            ) from error
        raise ConfigError(f"out is {out}, but it cannot be written ({error.strerror or error})") from error


def export_folder(run: ExportedRun, target: Target, out: Path, screen: Screen) -> None:
    """Write the backbone of a run to the folder `out` for another tool, and print a table."""
    check_folder(out, target)
    weights = run.backbone_weights()
    net = run.backbone(weights)
    trained = Trained(
        net=net,
        build=run.new_backbone,
        settings=run.saved["backbone"],
        preprocessing=run.preprocessing(is_native=False),
        facts=run.facts,
    )
    check_target(target, trained)
    images = images_of(run, screen)
    trained = replace(trained, preprocessing=run.preprocessing(is_native=images.is_native))
    screen.say(f"writing {out}, then comparing features on {images.origin}")
    card = partial(card_of, run, images, usage=target.usage(trained), target=target, table=accuracies(run, screen))
    expected = features_of(net, run.prepare(images.images))
    difference = write_folder(target, trained, out, images, expected, card)
    size = sum(path.stat().st_size for path in out.iterdir())
    show(screen, out, run, weights, size, {"format": target.name, "difference of features": difference})
    screen.say(f"to use it: see {out / CARD}")


def export_file(run: ExportedRun, what: str, out: Path, screen: Screen) -> None:
    """Write the backbone or the method of a run to the file `out` for sslcli, and print a table."""
    images = images_of(run, screen)
    screen.say(f"writing {out}, then comparing features on {images.origin}")
    weights, difference = write_file(run, what, out, images)
    usage, table = USAGE.format(name=out.name), accuracies(run, screen)
    card = card_of(run, images, difference, usage=usage, target=None, table=table)
    plain = run.preprocessing(is_native=images.is_native).to_plain(is_normalized_by_model=False)
    for name, text in ((PREPROCESSING, json_text(plain)), (CARD, card)):
        atomic.replace(out.with_name(f"{out.name}.{name}"), text.encode())
    rows = {"what": what, "evaluated part": run.method.evaluated_part}
    compared = "not compared" if difference is None else difference
    show(screen, out, run, weights, out.stat().st_size, {**rows, "difference of features": compared})
    diverged = not_finite(weights)
    if diverged:
        screen.warn(diverged)
    screen.say(f"to evaluate it: ssl-eval weights={out} dataset=... dataset.image_size={run.image_size}")


def images_of(run: ExportedRun, screen: Screen) -> Images:
    """Return the images for the comparison. Finding the files of a large dataset takes some time."""
    screen.say(f"reading images of {run.facts['provenance']['pretrained_on']}")
    return comparison_images(run.saved, trust=run.trust)


def card_of(
    run: ExportedRun, images: Images, difference: float | None, *, usage: str, target: Target | None, table: str
) -> str:
    """Return the text of the model card. `target` is None for format=torch.

    `difference` is the result of the comparison on `images`, or None if the weights are not finite.
    """
    does_normalize = target is not None and target.normalizes
    effective = run.saved["effective"]
    check = "The weights are not finite." if difference is None else result_of(difference, images)
    return model_card(
        run.facts,
        run.saved.get("about") or {},
        sources={row: effective[row] for row in (INITIAL_WEIGHTS, TEACHER) if row in effective},
        preprocessing=sentence(run.preprocessing(is_native=images.is_native), is_normalized_by_model=does_normalize),
        usage=usage,
        table=table,
        check=check,
        packages=target.packages if target is not None else (),
        library=target.library if target is not None else "",
    )


def show(screen: Screen, out: Path, run: ExportedRun, weights: dict[str, Any], size: int, rows: dict[str, Any]) -> None:
    """Print the table of an export. `size` is its size in bytes, and `rows` are the first rows."""
    numbers = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    last = {"step": run.loaded.step, "parameters": numbers, "size (MB)": round(size / 1e6, 1)}
    screen.table(f"exported: {out}", {**rows, **last})
