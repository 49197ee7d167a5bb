"""One evaluation: what is measured, on which images, where its files go, and the features it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli import __version__
from sslcli.config.run_config import EvalConfig
from sslcli.data.bad_images import BadImage, BadImages
from sslcli.data.sources.base import Source
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.evaluation import layers
from sslcli.evaluation.features import FeatureSet, cached, from_bank, pixels
from sslcli.evaluation.online import collect
from sslcli.evaluation.task import Start, Task
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.report.console import SUBJECTS, Screen
from sslcli.runs.result_name import joined, name_of_set
from sslcli.runs.subject import Subject
from sslcli.system import atomic

PLACES = ("run", "weights", "checkpoint")  # of the provenance: where files lie, and not what is in them
WEIGHTS = ("checkpoint_sha256", "step")  # of the provenance: what a net as initialized does not depend on


@dataclass
class Evaluation:
    """One evaluation.

    `splits` are the positions of the images in `source`, `layer` is where features are taken, `usual_layer` where they
    are taken if nobody says so, and `variant` what of the protocol's settings belongs in the name of the result.
    """

    config: EvalConfig
    device: torch.device
    screen: Screen
    subject: Subject
    source: Source
    splits: dict[str, Tensor]
    layer: str = layers.BACKBONE
    usual_layer: str = layers.BACKBONE
    variant: str = ""

    def measured(self, protocol: str) -> str:
        """The protocol and what of its settings and of the layer makes the number another quantity."""
        return joined(protocol, self.variant, self.layer if self.layer != self.usual_layer else "")

    @property
    def measured_on(self) -> str:
        """The checkpoint and the images, where they are not the last one and those of the run."""
        of_run, step = self.config.run is not None, self.config.checkpoint
        checkpoint = f"step-{step}" if of_run and step != "last" else ""
        images = name_of_set(self.source, image_size=self.subject.image_size) if self.subject.foreign else ""
        return joined(checkpoint, images)

    def place(self, protocol: str) -> Path:
        """Where the files of the result go, the name without its ending; numbers of different things never share it."""
        return self.subject.home / joined(self.measured(protocol), self.measured_on)

    def task(self, **callbacks: Any) -> Task:
        """Return what a protocol needs to know of the images, with the `callbacks` of `Task`."""
        return Task(
            source=self.source,
            views=self.subject.views,
            mean=self.subject.mean,
            std=self.subject.std,
            device=self.device,
            precision=self.subject.precision,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            screen=self.screen,
            **callbacks,
        )

    def features(self, name: str, net: nn.Module | None) -> FeatureSet:
        """Features of all splits by the net `trained` or `random`, or of `pixels`; cached where they cost something."""
        if net is not None:
            self.check_layer(net)

        def compute() -> dict[str, Tensor]:
            return self.extracted(name, net)

        # Pixels that lie in memory are there sooner than their file, which would be the largest of all.
        free = net is None and self.source.images is not None
        with evaluating(net) if net is not None else nullcontext():
            if free or not self.config.cache:
                tensors = compute()
            else:
                key = json.dumps(self.key(name))
                path = self.subject.home / "features" / f"{name}_{short(key)}.pt"
                tensors = cached(path, key, compute, warn=self.screen.warn)
        if name == "trained":
            self.tell_unreadable(tensors)
        found = FeatureSet(**tensors, num_classes=len(self.source.classes), classes=tuple(self.source.classes))
        if name != "trained" or self.layer != layers.BANK:
            return found
        assert isinstance(net, Method)
        rows = net.stored()
        assert rows is not None  # else the layer would not be among those of the net
        return from_bank(found, rows, self.source.splits["train"])

    def check_layer(self, net: nn.Module) -> None:
        """Raise ValueError unless the network has the layer, and ConfigError for the bank and other images."""
        if self.layer == layers.BANK and self.subject.foreign:
            raise ConfigError(
                "feature_layer is 'bank', but its rows are of the images of pre-training: leave out dataset="
            )
        layers.check(net, self.layer, self.task().example())

    def tell_unreadable(self, tensors: dict[str, Tensor]) -> None:
        """Warn of labeled images without features. Raises TooManyBadImages above `dataset.max_bad` of a split."""
        for name, positions in self.splits.items():
            labeled = positions[self.source.labels[positions] >= 0]
            bad = BadImages(max_bad=self.source.max_bad, total=len(labeled))
            for position in labeled[~torch.isin(labeled, tensors[f"{name}_positions"])].tolist():
                try:
                    self.source.read(position)
                except BadImage as error:
                    bad.add(error.path, error.reason)
            bad.check()
            if bad.count:
                first, reason = next(iter(bad.reasons.items()))
                self.screen.warn(
                    f"{bad.count} of {bad.total} images of {name} cannot be read and are left out: {first} ({reason})"
                    + (", ..." if bad.count > 1 else "")
                )

    def extracted(self, name: str, net: nn.Module | None) -> dict[str, Tensor]:
        """The features, computed."""
        seen: dict[str, int] = {}

        def encode(images: Tensor) -> Tensor:
            return pixels(images) if net is None else layers.read(net, self.layer, images)

        def progress(split: str, done: int, total: int) -> None:
            seen[split] = done
            self.screen.advance(sum(seen.values()), split)

        self.screen.start(f"features, {SUBJECTS[name]}", total=sum(len(part) for part in self.splits.values()))
        found = collect(
            encode,
            self.source,
            self.splits,
            prepare=(lambda images: images) if net is None else self.subject.prepare,
            batch_size=self.config.batch_size,
            device=self.device,
            precision="fp16"
            if net is None
            else self.subject.precision,  # a level of 8 bits is 16 steps of fp16 or more
            workers=self.config.workers,
            progress=progress,
        )
        self.screen.stop()
        return {key: value for key, value in vars(found).items() if isinstance(value, Tensor)}

    def key(self, name: str) -> list[Any]:
        """All that the features of one kind depend on."""
        subject, source, views = self.subject, self.source, self.subject.views
        positions = hashlib.sha256(b"".join(part.numpy().tobytes() for part in self.splits.values())).hexdigest()[:16]
        images = [source.version, source.image_size, positions]
        if name == "pixels":
            return [__version__, name, images]
        left_out = (*PLACES, *(WEIGHTS if name == "random" else ()))
        facts = {key: value for key, value in subject.provenance.items() if key not in left_out}
        seen_as = [views.color_space, views.normalize, list(subject.mean), list(subject.std)]
        how = [self.layer, subject.precision, self.config.batch_size]
        return [__version__, name, facts, self.config.backbone, how, images, seen_as]

    def baseline(self, node: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the protocol of `node` finds of `random` or `pixels`: the same for all checkpoints of a run, so kept."""
        if not self.config.cache:
            return measure()
        key = [torch.__version__, self.device.type, node, self.key(name)]
        path = (
            self.subject.home / "features" / f"{name}_{node['_target_'].rpartition('.')[2].lower()}_{short(key)}.json"
        )
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = measure()
            self.write(path, json.dumps(found).encode())
        return found

    def write(self, path: Path, content: bytes) -> None:
        """Write one file of the results. Raises TrainingFailed where that is not possible."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace(path, content)
        except OSError as error:
            raise TrainingFailed(f"{path} cannot be written: {error.strerror or error}") from error


class Starts(Mapping[str, Start]):
    """The starts of an evaluation by name; networks are built and features extracted when they are asked for.

    keep: hold networks and features in memory, for protocols that use them several times.
    """

    def __init__(self, evaluation: Evaluation, names: Sequence[str], nets: dict[str, nn.Module], *, keep: bool) -> None:
        self.evaluation, self.names, self.nets, self.keep = evaluation, names, nets, keep
        self.kept: dict[str, Start] = {}

    def __getitem__(self, name: str) -> Start:
        if name not in self.names:
            raise KeyError(name)
        if name in self.kept:
            return self.kept[name]
        net = None if name == "pixels" else self.nets.get(name) or self.evaluation.subject.net(name)
        start = Start(net=net, layer=self.evaluation.layer, features=self.evaluation.features(name, net))
        if self.keep:
            self.kept[name] = start
        return start

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def short(key: object) -> str:
    """Hex digits for the name of a file."""
    return hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:12]


def check_home(home: Path) -> None:
    """Raise ConfigError unless results can be written to `home`, before hours are spent on them."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with atomic.beside(home / "probe") as probe:
            probe.touch()
    except OSError as error:
        raise ConfigError(
            f"results go to {home}, which cannot be written ({error.strerror}): "
            "change its rights, or copy the run to where you may write"
        ) from error
