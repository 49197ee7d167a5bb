"""Execution of ssl-embed, and `sslcli.embed`: features of images to a file, or to a tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli.config.run_config import EmbedConfig
from sslcli.data import worker_server
from sslcli.data.bad_images import BadImages
from sslcli.distributed import devices
from sslcli.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    TrainingFailed,
    disk_failure,
    print_error,
)
from sslcli.evaluation import layers
from sslcli.evaluation.online import BATCH
from sslcli.report.console import Screen
from sslcli.runs.embedding import Embedding, prepare
from sslcli.runs.embedding_files import check_format, sidecar, stored_identity, write
from sslcli.runs.embedding_parts import Parts
from sslcli.runs.encoder import network_config
from sslcli.system.memory import keep_freed_memory
from sslcli.system.stop_signals import StoppedBySignal, raised_signals

LONGEST_ENDING = len(".unreadable.txt")  # of the files beside the written file
RESUME = "the features so far are saved: run the same command again to resume"


def run(config: EmbedConfig) -> int:
    """Run ssl-embed with a validated configuration, and return the exit code."""
    try:
        keep_freed_memory()
        with raised_signals():
            embed_to_file(config)
        return 0
    except StoppedBySignal as stopped:
        print_error("embed", f"stopped by {stopped}; {RESUME}")
        return EXIT_STOPPED
    except TrainingFailed as error:
        print_error("embed", error)
        return EXIT_FAILED
    except OSError as error:
        failure = disk_failure(error, config.out, "out")
        if failure is None:
            raise
        print_error("embed", failure[0])
        return failure[1]
    except ValueError as error:
        print_error("embed", error)
        return EXIT_CONFIG


def embed_to_file(config: EmbedConfig) -> None:
    """Write the features to the file `config.out`, and print a table. Resume if an earlier process was stopped."""
    out = Path(str(config.out))
    check_out(out)
    device = devices.pick_device(config.device)
    worker_server.start(device)
    devices.prepare(device, deterministic=True)
    with Screen() as screen:
        embedding = prepare(config, device, screen, images=given_images(config.images), split=config.split)
        provenance = embedding.provenance()
        parts_folder = sidecar(out, "parts")
        if out.exists():
            if stored_identity(out) != provenance["identity"]:
                raise ConfigError(f"out is {out}, which exists with other features: remove it, or choose another file")
            screen.say(f"these features are complete already: {out}")
            if parts_folder.exists():
                with Parts(parts_folder, provenance["identity"]) as parts:
                    parts.remove()
            return
        with Parts(parts_folder, provenance["identity"]) as parts:
            resumed, started = parts.done, time.monotonic()
            if parts.removed:
                screen.warn(
                    f"{parts.removed} part files of an earlier command were removed, because its checkpoint, images, "
                    "device or settings differ"
                )
            if resumed:
                screen.say(f"resuming after {resumed:,} of {embedding.total:,} images")
            extract(embedding, parts, screen)
            seconds = time.monotonic() - started
            finish(out, embedding, parts, provenance)
        screen.table(
            f"embedded: {out}",
            {
                "images": embedding.total,
                "features": parts.num_features,
                "feature layer": config.feature_layer,
                "precision": embedding.subject.precision,
                "images/s": (embedding.total - resumed) / seconds,
            },
        )
        if parts.unreadable:
            count, listed = len(parts.unreadable), sidecar(out, "unreadable.txt")
            screen.warn(f"{count:,} of {embedding.total:,} images cannot be read: see {listed}")


def check_out(out: Path) -> None:
    """Raise ConfigError if `out` has an unknown format, or if its folder does not exist and cannot be created."""
    check_format(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out is {out}, but its folder cannot be created ({error.strerror}): choose another folder"
        ) from error
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, but that is a directory: set it to a file name")
    longest = os.pathconf(out.parent, "PC_NAME_MAX") - LONGEST_ENDING
    if len(os.fsencode(out.name)) > longest:
        raise ConfigError(f"out is {out}, but its file name must have at most {longest} bytes: choose a shorter name")


def given_images(images: str | list[str] | None) -> list[str] | None:
    """Return the setting `images` as a list.

    Raises ConfigError if a single path does not exist, or if there are no paths or empty ones.
    """
    if isinstance(images, str):
        if not os.path.exists(images):
            raise ConfigError(f"images is {images!r}, but there is no such file or folder: correct the path")
        return [images]
    if images is not None and not all(images or [""]):
        raise ConfigError(f"images is {images}, but it must name at least one image file or folder")
    return images


def paths_of(images: Any) -> str | list[str]:
    """Return the argument `images` of `embed` as texts. Raises ConfigError if it contains anything but paths."""
    try:
        is_one = isinstance(images, (str, os.PathLike))
        found = [os.fspath(path) for path in ([images] if is_one else images)]
        if isinstance(images, (bytes, Mapping)) or not all(isinstance(path, str) for path in found):
            raise TypeError
    except TypeError as error:
        raise ConfigError(f"images is {images!r}, but it must be a path or a list of paths") from error
    return found[0] if is_one else found


def extract(embedding: Embedding, parts: Parts, screen: Screen) -> None:
    """Add the batches that are not in `parts` yet."""
    screen.start("embedding", total=embedding.total, done=parts.done)
    for batch in embedding.batches(parts.done):
        parts.add(batch)
        screen.advance(parts.done)
    parts.flush()
    screen.stop()


def finish(out: Path, embedding: Embedding, parts: Parts, provenance: dict[str, Any]) -> None:
    """Write the list of unreadable images, and the features with paths and labels. Then remove the part files."""
    if not parts.rows:
        parts.remove()
    check_any_readable(parts.rows, parts.unreadable)
    listed = sidecar(out, "unreadable.txt")
    if parts.unreadable:
        bad = BadImages(max_bad=1.0, total=embedding.total)
        bad.reasons = parts.unreadable
        bad.write(listed)
    else:
        listed.unlink(missing_ok=True)
    write(out, embedding, parts, provenance | {"images": parts.rows, "unreadable": len(parts.unreadable)})
    parts.remove()


def check_any_readable(rows: int, unreadable: dict[str, str]) -> None:
    """Raise ConfigError if no image can be read."""
    if not rows:
        path, reason = next(iter(unreadable.items()))
        raise ConfigError(f"none of the {len(unreadable):,} images can be read, the first being {path}: {reason}")


@dataclass(frozen=True)
class Embeddings:
    """Features of images.

    Attributes:
        features: (n, d) float32, on the CPU, one row per readable image.
        paths: paths of the n readable images.
        unreadable: path -> reason, of the images that cannot be read.
        provenance: JSON values that state the origin of the features.
    """

    features: Tensor
    paths: list[str]
    unreadable: dict[str, str]
    provenance: dict[str, Any]


def embed(
    run: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    checkpoint: str | int = "last",
    device: str | torch.device = "auto",
    precision: str = "auto",
    feature_layer: str = layers.BACKBONE,
    batch_size: int = BATCH,
    workers: int | None = None,
    backbone: str | Mapping[str, Any] | None = None,
    weights_prefix: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust: Sequence[str] = (),
) -> Embeddings:
    """Return the features of image files, with the same bits as ssl-embed and ssl-eval.

    All features are kept in memory. For many images, use the command ssl-embed.

    Args:
        run: a run directory, a weight file or timm:NAME, see `load`.
        images: an image file, a folder, or a list of files and folders.
        checkpoint, device, backbone, weights_prefix, image_size, mean, std, trust: see `load`.
        precision: fp32, bf16 or fp16; "auto" = the precision of the training run.
        feature_layer: backbone, projection, head1 ..., or a stage such as layer3.
        batch_size: images per forward pass.
        workers: number of processes that read images; None = a default for this machine.

    Raises ConfigError if the network or all images cannot be read.
    """
    config = network_config(
        run,
        checkpoint=checkpoint,
        device=str(device),
        precision=precision,
        backbone=backbone,
        weights_prefix=weights_prefix,
        image_size=image_size,
        mean=mean,
        std=std,
        trust=trust,
        feature_layer=feature_layer,
        batch_size=batch_size,
        workers=workers,
    )
    given = given_images(paths_of(images))
    chosen = devices.pick_device(config.device)
    worker_server.start(chosen)  # reading the random state of a GPU initializes CUDA
    with devices.unchanged_settings(), devices.unchanged_random_state(chosen), Screen() as screen:
        devices.prepare(chosen, deterministic=True)
        try:
            embedding = prepare(config, chosen, screen, images=given, split="all")
        except ConfigError:
            raise
        except ValueError as error:  # an image folder or the layer is wrong
            raise ConfigError(str(error)) from error
        screen.start("embedding", total=embedding.total)
        features, paths, unreadable, done = [], list[str](), dict[str, str](), 0
        for batch in embedding.batches():
            features.append(torch.from_numpy(batch.features))
            paths += map(embedding.source.path, batch.positions.tolist())
            unreadable |= batch.unreadable
            done += batch.images
            screen.advance(done)
        screen.stop()
        check_any_readable(len(paths), unreadable)
        return Embeddings(torch.cat(features), paths, unreadable, embedding.provenance())
