"""The network and the images of one evaluation.

`Evaluation` also determines the names and paths of the result files. It caches features and results of baselines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sslcli import __version__
from sslcli.config.run_config import EvalConfig
from sslcli.data.bad_images import BadImage, BadImages
from sslcli.data.sources.base import Source
from sslcli.distributed import collectives, processes, shared_work, watchdog
from sslcli.errors import ConfigError, TrainingFailed, is_disk_failure
from sslcli.evaluation import layers
from sslcli.evaluation.feature_cache import cached
from sslcli.evaluation.features import FeatureSet, from_bank, pixels
from sslcli.evaluation.online import collect
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.variants import join_parts
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.report.console import SUBJECTS, Screen
from sslcli.report.evaluation_tables import Score
from sslcli.runs.result_name import dataset_name
from sslcli.runs.subject import Subject
from sslcli.system import atomic
from sslcli.system.stored import read_json, read_or_set_aside

PATH_KEYS = ("run", "weights", "checkpoint")  # paths in the provenance; features do not depend on these paths
T = TypeVar("T")
# Keys of the provenance that do not affect an untrained network
WEIGHT_KEYS = ("checkpoint_sha256", "step", "weights_prefix", "weights_taken", "weights_dropped", "weights_notes")


@dataclass
class Evaluation:
    """One evaluation: its settings, network, images and result files.

    Attributes:
        config: the settings.
        device: the device of all networks.
        screen: the progress display.
        subject: the network and its provenance.
        source: the labeled images.
        splits: for each split, the indices of its images in `source`.
        layer: the layer whose features are evaluated.
        evaluated_part: the part of the method that is evaluated, see `Method.evaluated_part`.
        default_layer: the layer that is evaluated by default. Names of results do not contain it.
        variant: suffix of the result's name. It identifies protocol settings that change the measured quantity.
    """

    config: EvalConfig
    device: torch.device
    screen: Screen
    subject: Subject
    source: Source
    splits: dict[str, Tensor]
    layer: str = layers.BACKBONE
    default_layer: str = layers.BACKBONE
    evaluated_part: str = Method.evaluated_part
    variant: str = ""

    def quantity(self, protocol: str) -> str:
        """Return the name of the measured quantity, such as "knn".

        The name consists of `protocol`, `self.variant` (the settings of the protocol that change the quantity) and the
        name of the feature layer. The default layer is not part of the name.
        """
        return join_parts(protocol, self.variant, self.layer if self.layer != self.default_layer else "")

    @property
    def conditions(self) -> str:
        """Suffix of the names of result files. It states which checkpoint was evaluated, and on which dataset.

        An example is "step-100_cifar10-1a2b3c". It means the checkpoint of step 100, and version 1a2b3c of the dataset
        cifar10. If the last checkpoint or a weight file was evaluated, the suffix contains no step. If the network was
        pre-trained on the evaluated dataset, the suffix contains no dataset. If it contains neither a step nor a
        dataset, it is "".
        """
        of_run, step = self.config.run is not None, self.config.checkpoint
        checkpoint = f"step-{step}" if of_run and step != "last" else ""
        images = dataset_name(self.source, image_size=self.subject.image_size) if self.subject.has_other_images else ""
        return join_parts(checkpoint, images)

    def result_path(self, protocol: str) -> Path:
        """Return the path of the result file of a protocol, without file extension.

        Each combination of measured quantity (see `quantity`), checkpoint and dataset has its own path.
        """
        return self.subject.results_dir / join_parts(self.quantity(protocol), self.conditions)

    def task(self, **callbacks: Any) -> Task:
        """Return the `Task` of the protocol: the images, their preprocessing, the progress display, and `callbacks`.

        `callbacks` are values for the fields `fine_tuned` and `kept`, which are functions that return earlier results.
        """
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
        """Return the features of all splits. If the cache contains these features, they are not computed again.

        Args:
            name: "trained" or "random" for the features of a network, "pixels" for the pixels as features.
            net: the network, or None if `name` is "pixels".
        """
        if net is not None:
            self.check_layer(net)

        def compute() -> dict[str, Tensor]:
            return self.extract(name, net)

        # Pixels of images in memory are not cached, since reading a large cache file is slower than computing pixels.
        is_in_memory = net is None and self.source.images is not None
        with evaluating(net) if net is not None else nullcontext():
            if is_in_memory or not self.config.cache:
                tensors = compute()
            else:
                key = json.dumps(self.key(name))
                self.check_same(key)
                path = self.subject.results_dir / "features" / f"{name}_{short_digest(key)}.pt"
                tensors = cached(path, key, compute, warn=self.screen.warn)
        if name == "trained":
            shared_work.agreed(lambda: self.warn_unreadable(tensors) if collectives.is_main() else None)
        found = FeatureSet(**tensors, num_classes=len(self.source.classes), classes=tuple(self.source.classes))
        if name != "trained" or self.layer != layers.BANK:
            return found
        assert isinstance(net, Method)
        rows = net.stored()
        assert rows is not None  # check_layer has raised an error if there is no bank
        return from_bank(found, rows, self.source.splits["train"])

    def check_same(self, key: str) -> None:
        """Raise ConfigError on all processes unless all of them have the same images and weights, in `key`."""
        digests = collectives.gather_objects(short_digest(key))
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is not None:
            raise ConfigError(
                f"process {other} has other images or weights than process 0: give all processes the same files, and "
                "do not change the files during the evaluation"
            )

    def check_layer(self, net: nn.Module) -> None:
        """Check the feature layer.

        Raises ValueError if the network does not have the layer. The layer can also be "bank": the memory bank, in
        which the method stores one feature vector per image of pre-training. In this case, raises ConfigError if the
        images of the evaluation are not the images of pre-training.
        """
        if self.layer == layers.BANK and self.subject.has_other_images:
            raise ConfigError(
                "feature_layer is 'bank', but its rows are features of the images of pre-training: remove dataset=..."
            )
        layers.check(net, self.layer, self.task().example())

    def warn_unreadable(self, tensors: dict[str, Tensor]) -> None:
        """Warn about labeled images that cannot be read. Raise TooManyBadImages if there are too many of them.

        There are too many if the unreadable fraction of a split exceeds `dataset.max_bad`. `tensors` is the result of
        `extract`. An image that cannot be read has no features in `tensors`.
        """
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
                    f"{bad.count} of {bad.total} images of {name} cannot be read and are skipped: {first} ({reason})"
                    + (", ..." if bad.count > 1 else "")
                )

    def extract(self, name: str, net: nn.Module | None) -> dict[str, Tensor]:
        """Compute the features of all splits. Return a dictionary whose keys are names of fields of `FeatureSet`.

        See `features` for the arguments.
        """
        completed: dict[str, int] = {}

        def encode(images: Tensor) -> Tensor:
            return pixels(images) if net is None else layers.read(net, self.layer, images)

        def progress(split: str, done: int, total: int) -> None:
            completed[split] = done
            self.screen.advance(sum(completed.values()), split)

        self.screen.start(f"features, {SUBJECTS[name]}", total=sum(len(part) for part in self.splits.values()))
        found = collect(
            encode,
            self.source,
            self.splits,
            prepare=(lambda images: images) if net is None else self.subject.prepare,
            batch_size=self.config.batch_size,
            device=self.device,
            # fp16 is precise enough for pixels, because it has at least 16 values per 8-bit level.
            precision="fp16" if net is None else self.subject.precision,
            workers=self.config.workers,
            progress=progress,
        )
        self.screen.stop()
        return {key: value for key, value in vars(found).items() if isinstance(value, Tensor)}

    def key(self, name: str) -> list[Any]:
        """Return the key under which the features of a network are cached. `name` is "trained", "random" or "pixels".

        The key contains everything on which these features depend.
        """
        subject, source, views = self.subject, self.source, self.subject.views
        positions = hashlib.sha256(b"".join(part.numpy().tobytes() for part in self.splits.values())).hexdigest()[:16]
        images = [source.version, source.image_size, positions]
        if name == "pixels":
            return [__version__, name, images]
        excluded = (*PATH_KEYS, *(WEIGHT_KEYS if name == "random" else ()))
        provenance = {key: value for key, value in subject.provenance.items() if key not in excluded}
        preprocessing = [views.color_space, views.normalize, list(subject.mean), list(subject.std)]
        computation = [self.layer, subject.precision, self.config.batch_size]
        return [__version__, name, provenance, self.config.backbone, computation, images, preprocessing]

    def baseline(self, node: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the results of a baseline, from the cache or from `measure()`.

        Results of baselines are cached, because they are the same for all checkpoints of a run.

        node: the settings of the protocol.
        name: "random" (an untrained network) or "pixels" (pixels as features).
        measure: function that measures the baseline.
        """
        if not self.config.cache:
            return measure()
        key = [torch.__version__, self.device.type, node, self.key(name)]
        path = (
            self.subject.results_dir
            / "features"
            / f"{name}_{node['_target_'].rpartition('.')[2].lower()}_{short_digest(key)}.json"
        )

        def load() -> Score | None:
            return read_or_set_aside(
                partial(read_json, path, Score, remedy="remove it"),
                warn=self.screen.warn,
                consequence="the baseline is measured again",
            )

        is_main = collectives.is_main()
        stored = collectives.gather_objects(shared_work.agreed(load if is_main else lambda: None))[0]
        if stored is not None:
            return dict(stored)
        found = measure()
        shared_work.agreed(lambda: self.write(path, json.dumps(found).encode()) if is_main else None)
        return found

    def write(self, path: Path, content: bytes) -> None:
        """Write one result file. Raises TrainingFailed if the file cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace(path, content)
        except OSError as error:
            raise TrainingFailed(f"{path} cannot be written: {error.strerror or error}") from error


class Starts(Mapping[str, Start]):
    """The trained network and the baselines, each as a `Start` (a network and its features), by name.

    The network of an item is built, and its features are extracted, when the item is accessed. All processes extract
    the features together.

    Args:
        evaluation: the evaluation.
        names: keys of the mapping: "trained", and the names of the baselines.
        trained: the trained network.
        keep: if True, keep networks and features in memory, for protocols that use them several times.
        on_main: True if only rank 0 accesses the items, within `call_on_main`. False if all processes access the same
            items in the same order.
    """

    def __init__(
        self, evaluation: Evaluation, names: Sequence[str], trained: nn.Module, *, keep: bool, on_main: bool = True
    ) -> None:
        self.evaluation, self.names, self.trained, self.keep, self.on_main = evaluation, names, trained, keep, on_main
        self.kept: dict[str, Start] = {}

    def __getitem__(self, name: str) -> Start:
        if name not in self.names:
            raise KeyError(name)
        if name in self.kept:
            return self.kept[name]
        with collectives.all_processes():
            if self.on_main:
                collectives.broadcast_objects([name])
            start = self.start(name)
        if self.keep:
            self.kept[name] = start
        return start

    def start(self, name: str) -> Start:
        """Build a network, and extract its features. All processes must call the function."""
        net: nn.Module | None = None  # the baseline "pixels" has no network
        if name != "pixels":
            net = self.trained if name == "trained" else shared_work.agreed(lambda: self.evaluation.subject.net(name))
        return Start(net=net, layer=self.evaluation.layer, features=self.evaluation.features(name, net))

    def call_on_main(self, compute: Callable[[], T]) -> T | None:
        """Return `compute()` on rank 0, and None on all other processes.

        Rank 0 acts like a run with one process within `compute`. The other processes wait, and help to extract the
        features of an item when `compute` accesses it.
        """

        def main() -> T:
            with collectives.single_process(), watchdog.busy():
                try:
                    result = compute()
                except Exception:  # not a signal, after which this process must not wait for the others
                    release_others()
                    raise
                release_others()
                return result

        def release_others() -> None:
            with collectives.all_processes():
                collectives.broadcast_objects([None])

        def help_main() -> None:
            name = [""]
            while True:
                collectives.broadcast_objects(name)
                if name[0] is None:
                    return
                # An error is raised on all processes, and rank 0 handles it. It may have any type, for example that of
                # user code or of a full GPU. If this process ended then, rank 0 would wait for it.
                try:
                    self.start(name[0])
                except Exception as error:
                    if processes.lost_contact(error):
                        raise

        return shared_work.agreed(main if collectives.is_main() else help_main)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def short_digest(key: object) -> str:
    """Return 12 hex digits of a digest of `key`, for file names."""
    return hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:12]


def check_results_dir(results_dir: Path) -> None:
    """Check that files can be written to `results_dir`.

    Raises TrainingFailed if the disk is full, and ConfigError if files cannot be written for another reason. Temporary
    files of killed evaluations are removed. This function is called before the evaluation starts.
    """
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with atomic.beside(results_dir / "probe") as probe:
            probe.write_bytes(b"0")
        for folder in results_dir.glob("*/"):
            atomic.remove_abandoned(folder)
    except OSError as error:
        if is_disk_failure(error):
            raise TrainingFailed(
                f"{error.filename or results_dir} cannot be written ({error.strerror}): free space or repair the disk"
            ) from error
        raise ConfigError(
            f"results go to {results_dir}, which cannot be written ({error.strerror}): "
            "change its permissions, or copy the run to a directory that you can write to"
        ) from error
