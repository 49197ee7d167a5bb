"""Types and valid ranges of the settings that are not arguments of a class with a `_target_`.

The yaml files contain the default values, and the classes of this module validate the values. A test checks that
`conf/train.yaml` and `TrainSettings` have the same keys. This module does not import torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from sslcli.config.checks import check_checkpoint, check_choice, check_device, check_range, check_source, seconds
from sslcli.errors import ConfigError, nearest

LARGEST_SEED = 2**32 - 1
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCALINGS = ("linear", "sqrt", "none")
SHARDINGS = ("none", "fsdp")
EXTENSIONS = ("rescale", "constant", "decay", "restart")
SCHEDULES = ("cosine", "step", "constant")
CLIPPINGS = ("all", "tensor", "module")
COLLAPSE_ACTIONS = ("ignore", "warn", "stop")
KNN_SPLITS = ("val", "test")
TEST_METRIC = "monitor/test_"  # start of the names of scalars that are measured on test images
EXPORTS = ("backbone", "method")
EMBEDDED_SPLITS = ("all", "train", "val", "test")
EXPORT_FORMATS = ("torch", "safetensors", "torchvision", "timm", "onnx", "hf")
RESUME = ("auto", "never", "must")
DIRECTIONS = ("auto", "max", "min")
# Scalars in the metrics.jsonl of a run -> "max" if the highest value is best, "min" if the lowest value is best.
KNOWN_METRICS = {
    "monitor/knn_top1": "max",
    "monitor/knn_top5": "max",
    "health/rankme": "max",
    "health/effective_rank": "max",
    "train/loss": "min",
    "train/images_per_s": "max",
    "train/data_wait": "min",
}
# Keys that affect the execution of a run but not its results. A section stands for all of its keys.
NEUTRAL = (
    "about",
    "sweep",
    "resume",
    "run_dir",
    "name",
    "dry_run",
    "find_batch_size",
    "trust",
    "launcher",
    "device",
    "dataset.workers",
    "dataset.resident",
    "dataset.cache",
    "dataset.keep_decoded",
    "dataset.keep_gb",
    "dataset.keep_dir",
    "dataset.verify",
    "train.max_time",
    "train.keep",
    "train.save_every_epochs",
    "train.save_every_steps",
    "train.sharding",
    "train.activation_checkpointing",
)


# Keys with "auto" in the yaml files since version 0.3. Older runs stored the default of the settings class, so the two
# values count as equal when settings are compared. A run that stored the default resumes with it.
AUTO_KEYS = ("train.compile", "train.deterministic")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings with the keys `train.*`, such as `train.epochs`. Raises ConfigError for a value out of range."""

    epochs: int
    max_steps: int | None  # overrides `epochs`
    max_time: str | float | None  # time limit; at its end, the run saves a checkpoint and stops with exit code 75
    batch_size: int  # images per optimizer step, over all processes and micro-batches
    accumulate: int  # micro-batches per optimizer step
    cached_gradients: bool  # compute one loss over all micro-batches; in-batch negatives then come from all of them
    precision: str
    compile: Literal["auto"] | bool = False  # the defaults of this and of `deterministic` are for older runs
    sharding: str  # fsdp: shard parameters, gradients and optimizer state over the processes
    activation_checkpointing: bool  # recompute the blocks of the backbone in the backward pass
    deterministic: Literal["auto"] | bool = True
    clip_grad: float | None  # maximum norm of the gradient
    log_every_steps: int
    save_every_epochs: int
    save_every_steps: int | None
    keep: int  # number of newest checkpoints to keep
    lr_scaling: str
    schedule: str
    warmup_epochs: float
    final_lr: float  # final learning rate of the cosine schedule, as a fraction of the peak learning rate
    milestones: list[float]  # for schedule=step: steps at which the rate drops, as fractions of the run
    decay_norm_and_bias: bool
    # Learning rate of a run that is extended to more epochs. The default is for config.yaml files of version 0.2.
    extend: str = "rescale"
    # Defaults of keys that were added after version 0.2
    warmup_from: float = 0.0  # learning rate at the first step of the warmup, as a fraction of the peak learning rate
    schedule_length: float = 1.0  # length of the cosine schedules, as a multiple of the length of the run
    clip_grad_by: str = "all"  # the norm that clip_grad limits: of the whole gradient, of each tensor or of each module
    final_weight_decay: float | None = None  # weight decay at the end of its cosine schedule; None = constant
    freeze_backbone_epochs: float = 0.0  # epochs at the start, at most a quarter of the run, with a frozen backbone

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every_steps", "keep"):
            check_range(f"train.{name}", getattr(self, name), least=1)
        for name in ("max_steps", "save_every_steps"):
            check_range(f"train.{name}", getattr(self, name), least=1)
        check_range("train.save_every_epochs", self.save_every_epochs, least=0)
        check_range("train.warmup_epochs", self.warmup_epochs, least=0)
        check_range("train.clip_grad", self.clip_grad, above=0)
        check_range("train.final_lr", self.final_lr, least=0)
        check_range("train.warmup_from", self.warmup_from, least=0, most=1)
        check_range("train.schedule_length", self.schedule_length, least=1)
        check_range("train.final_weight_decay", self.final_weight_decay, least=0)
        check_range("train.freeze_backbone_epochs", self.freeze_backbone_epochs, least=0)
        check_choice("train.clip_grad_by", self.clip_grad_by, CLIPPINGS)
        check_choice("train.precision", self.precision, PRECISIONS)
        check_choice("train.sharding", self.sharding, SHARDINGS)
        check_choice("train.lr_scaling", self.lr_scaling, SCALINGS)
        check_choice("train.schedule", self.schedule, SCHEDULES)
        check_choice("train.extend", self.extend, EXTENSIONS)
        seconds("train.max_time", self.max_time)
        if self.final_lr > 1:
            raise ConfigError(
                f"train.final_lr is {self.final_lr}, but it is a fraction of the peak rate: choose at most 1"
            )
        if any(not 0 < at < 1 for at in self.milestones):
            raise ConfigError(f"train.milestones is {self.milestones}, but each must lie strictly between 0 and 1")
        if self.sharding == "fsdp" and self.cached_gradients:
            raise ConfigError(
                "train.sharding is 'fsdp' and train.cached_gradients is true, but cached gradients call parts of the "
                "method, whose parameters FSDP gathers only during the forward of the whole method: set one of them"
            )
        if self.compile is True and (self.sharding == "fsdp" or self.activation_checkpointing):
            raise ConfigError(
                f"train.compile is true, train.sharding is {self.sharding!r} and train.activation_checkpointing is "
                f"{str(self.activation_checkpointing).lower()}, but a compiled backbone cannot be wrapped block by "
                "block: set train.compile=false, or turn off the others"
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.batch_size is {self.batch_size} and train.accumulate is {self.accumulate}, but the batch "
                "must split into equal micro-batches: choose a divisor of the batch size"
            )


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """Settings with the keys `monitor.*`, such as `monitor.knn_k`. Raises ConfigError for a value out of range."""

    knn_every_epochs: int  # epochs between k-NN evaluations; 0 = never, not even at the end
    knn_k: int
    knn_temperature: float
    knn_split: str = "val"  # the split whose images are the queries of k-NN. The default is for older configurations
    knn_images: int | None  # maximum number of training images among which neighbors are searched; None = all
    knn_queries: int | None = None  # maximum number of images that k-NN classifies; None = all
    health_every_steps: int  # steps between checks of the embeddings for collapse; 0 = never
    on_collapse: str
    pictures: int  # images in the picture of the augmented views; 0 = none

    def __post_init__(self) -> None:
        for name in ("knn_every_epochs", "health_every_steps", "pictures"):
            check_range(f"monitor.{name}", getattr(self, name), least=0)
        check_range("monitor.knn_k", self.knn_k, least=1)
        check_range("monitor.knn_images", self.knn_images, least=1)
        check_range("monitor.knn_queries", self.knn_queries, least=1)
        check_range("monitor.knn_temperature", self.knn_temperature, above=0)
        check_choice("monitor.on_collapse", self.on_collapse, COLLAPSE_ACTIONS)
        check_choice("monitor.knn_split", self.knn_split, KNN_SPLITS)


@dataclass(frozen=True, kw_only=True)
class LauncherSettings:
    """Settings with keys `launcher.*` that all launchers have. Raises ConfigError for a value out of range.

    `launcher=local` has only these keys.
    """

    kind: str
    timeout: str | float
    threads: int | None  # CPU threads per process; None: an equal part of the cores

    def __post_init__(self) -> None:
        check_range("launcher.threads", self.threads, least=1)
        check_range("launcher.timeout", self.timeout_seconds, above=0)

    @property
    def timeout_seconds(self) -> float:
        """Maximum time in seconds that a process waits for images or for another process."""
        found = seconds("launcher.timeout", self.timeout)
        if found is None:
            raise ConfigError("launcher.timeout is null, but it must be a duration such as 10m")
        return found


@dataclass(frozen=True, kw_only=True)
class MultiSettings(LauncherSettings):
    """Settings with the keys `launcher.*` of launcher=multi. Raises ConfigError for a value out of range."""

    processes: int | None  # None: one per GPU, or 2 without GPUs
    max_restarts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("launcher.processes", self.processes, least=1)
        check_range("launcher.max_restarts", self.max_restarts, least=0)


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Settings with the keys `sweep.*`, such as `sweep.metric`. Raises ConfigError for a value out of range.

    The settings have an effect only with `--multirun`.
    """

    metric: str  # name of the scalar in metrics.jsonl that ranks the jobs of the sweep
    direction: str
    jobs: int | None  # concurrent jobs on this machine; None: one per device
    retry_failed: bool

    def __post_init__(self) -> None:
        check_choice("sweep.direction", self.direction, DIRECTIONS)
        check_range("sweep.jobs", self.jobs, least=1)
        if not re.fullmatch(r"(train|monitor|health)/[\w.-]+", self.metric):
            hint = nearest(self.metric, KNOWN_METRICS)
            raise ConfigError(
                f"sweep.metric is {self.metric!r}, but it must be a scalar of metrics.jsonl: train/..., monitor/... or "
                f"health/...{hint and '.' + hint}"
            )
        if self.metric.startswith(TEST_METRIC):
            raise ConfigError(
                f"sweep.metric is {self.metric!r}, but the test images must not select a run: rank the jobs by "
                f"{self.metric.replace(TEST_METRIC, 'monitor/')}, with monitor.knn_split=val"
            )
        if self.direction == "auto" and self.metric not in KNOWN_METRICS:
            raise ConfigError(
                f"sweep.metric is {self.metric!r}, and it is unknown whether its maximum or minimum is best: set "
                f"sweep.direction to max or min.{nearest(self.metric, KNOWN_METRICS)}"
            )

    @property
    def is_minimized(self) -> bool:
        """True if the lowest value of `metric` is best, False if the highest value is best."""
        return (KNOWN_METRICS[self.metric] if self.direction == "auto" else self.direction) == "min"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings with the top-level keys of ssl-train, such as `seed`. Raises ConfigError for a value out of range."""

    seed: int
    name: str | None
    run_dir: str | None
    resume: str
    device: str  # auto, cpu, cuda, cuda:1, mps
    dry_run: bool
    find_batch_size: bool = False  # the default is for the config.yaml files of older versions
    init: str | None = None  # source of the backbone's initial weights: FILE, run:DIR or timm:NAME; None = random
    init_prefix: str | None = None  # start of the names of the weights to take from `init`; None = found automatically
    teacher: str | None = None  # source of the teacher of a method that distills: FILE, run:DIR or timm:NAME
    teacher_prefix: str | None = None  # as init_prefix, for `teacher`
    teacher_backbone: dict[str, Any] | None = None  # node of the teacher's backbone; None = the source states it
    trust: list[str]
    about: dict[str, Any] | None = None  # description of the method, for tables only

    def __post_init__(self) -> None:
        check_range("seed", self.seed, least=0, most=LARGEST_SEED)
        check_choice("resume", self.resume, RESUME)
        if self.find_batch_size and not self.dry_run:
            raise ConfigError(
                "find_batch_size is true, but dry_run is false: add dry_run=true to find the batch size without "
                "training, or remove find_batch_size to train"
            )
        check_device(self.device)
        check_source("init", self.init, self.init_prefix)
        check_source("teacher", self.teacher, self.teacher_prefix)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings with the top-level keys of all commands that compute features. Raises ConfigError for a wrong value."""

    run: str | None
    weights: str | None  # FILE, run:DIR or timm:NAME
    weights_prefix: str | None = None  # start of the keys of the weights to evaluate; None = search
    checkpoint: str | int  # last, or a step
    feature_layer: str  # layer whose output is evaluated: backbone, projection, bank, head1 ..., or a stage
    device: str
    precision: str
    batch_size: int
    workers: int | None
    trust: list[str]

    def __post_init__(self) -> None:
        check_checkpoint(self.checkpoint)
        check_device(self.device)
        check_choice("precision", self.precision, PRECISIONS)
        check_range("batch_size", self.batch_size, least=1)
        check_range("workers", self.workers, least=0)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(NetworkSettings):
    """Settings with the top-level keys of ssl-eval, such as `run`. Raises ConfigError for a value out of range."""

    baselines: bool
    cache: bool


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(NetworkSettings):
    """Settings with the top-level keys of ssl-embed, such as `out`. Raises ConfigError for a value out of range."""

    images: str | list[str] | None  # image files and folders; None: the dataset
    out: str | None  # .parquet or .npy
    split: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, EMBEDDED_SPLITS)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings with the keys of ssl-export, such as `out`. Raises ConfigError for a value out of range."""

    run: str | None
    checkpoint: str | int  # last, or a step
    what: str
    format: str
    out: str | None
    trust: list[str]

    def __post_init__(self) -> None:
        check_checkpoint(self.checkpoint)
        check_choice("what", self.what, EXPORTS)
        check_choice("format", self.format, EXPORT_FORMATS)
