from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from command_line import composed
from default_settings import TRAIN
from sslcli.config.settings import (
    EvalSettings,
    MonitorSettings,
    RunSettings,
    SweepSettings,
)
from sslcli.errors import ConfigError, nearest

MONITOR = MonitorSettings(
    knn_every_epochs=1,
    knn_k=200,
    knn_temperature=0.07,
    knn_images=None,
    health_every_steps=50,
    on_collapse="warn",
    pictures=8,
)
RUN = RunSettings(seed=0, name=None, run_dir=None, resume="auto", device="auto", dry_run=False, trust=[])
SWEEP = SweepSettings(metric="monitor/knn_top1", direction="auto", jobs=None, retry_failed=False)
EVAL = EvalSettings(
    run=None,
    weights=None,
    checkpoint="last",
    feature_layer="backbone",
    device="auto",
    precision="auto",
    batch_size=512,
    workers=None,
    baselines=True,
    cache=True,
    trust=[],
)


@pytest.mark.parametrize(
    ("settings", "key", "good", "bad"),
    [
        (TRAIN, "epochs", [1, 1000], [0, -3]),
        (TRAIN, "max_steps", [None, 1], [0]),
        (TRAIN, "max_time", [None, 5, "90s", "1.5h"], ["soon", "", -5, "5w"]),
        (TRAIN, "batch_size", [1, 7, 4096], [0]),
        (TRAIN, "accumulate", [1, 2, 256], [0, 3, 512]),
        (TRAIN, "precision", ["auto", "fp32", "bf16", "fp16"], ["fp8", ""]),
        (TRAIN, "clip_grad", [None, 0.1], [0, -1, float("nan"), float("inf")]),
        (TRAIN, "log_every_steps", [1], [0]),
        (TRAIN, "save_every_epochs", [0, 5], [-1]),
        (TRAIN, "save_every_steps", [None, 1], [0]),
        (TRAIN, "keep", [1], [0]),
        (TRAIN, "lr_scaling", ["linear", "sqrt", "none"], ["quadratic"]),
        (TRAIN, "schedule", ["cosine", "step", "constant"], ["linear"]),
        (TRAIN, "warmup_epochs", [0, 0.5], [-1, float("inf")]),
        (TRAIN, "final_lr", [0, 1], [-0.1, 1.1]),
        (TRAIN, "clip_grad_by", ["all", "tensor", "module"], ["parameter", ""]),
        (TRAIN, "warmup_from", [0, 1], [-0.1, 1.1]),
        (TRAIN, "schedule_length", [1, 1.25], [0.9, float("inf")]),
        (TRAIN, "final_weight_decay", [None, 0, 0.4], [-0.1]),
        (TRAIN, "freeze_backbone_epochs", [0, 0.5, 10], [-0.1, float("inf")]),
        (TRAIN, "milestones", [[], [0.5]], [[0], [1], [0.5, 2]]),
        (MONITOR, "knn_every_epochs", [0, 1], [-1]),
        (MONITOR, "knn_k", [1], [0]),
        (MONITOR, "knn_temperature", [0.01], [0, -1]),
        (MONITOR, "knn_images", [None, 1], [0]),
        (MONITOR, "health_every_steps", [0, 1], [-1]),
        (MONITOR, "on_collapse", ["ignore", "warn", "stop"], ["explode"]),
        (MONITOR, "pictures", [0, 1], [-1]),
        (RUN, "seed", [0, 2**32 - 1], [-1, 2**32]),
        (RUN, "resume", ["auto", "never", "must"], ["yes"]),
        (RUN, "init", [None, "a.pt", "run:a", "timm:a"], ["", "run:", "timm:"]),
        (RUN, "init_prefix", [None], ["a"]),
        (RUN, "teacher", [None, "a.pt"], ["", "run:"]),
        (RUN, "teacher_prefix", [None], ["a"]),
        (RUN, "device", ["auto", "cpu", "cuda", "cuda:3", "mps"], ["gpu", "cuda:", "cpu:0", "", "CPU"]),
        (SWEEP, "metric", ["train/loss", "health/rankme"], ["train/agreement", "knn", "monitor/", "loss", "a/b"]),
        (SWEEP, "direction", ["auto", "max", "min"], ["up"]),
        (SWEEP, "jobs", [None, 1], [0]),
        (EVAL, "checkpoint", ["last", 0, 500], ["best", -1]),
        (EVAL, "device", ["auto", "cuda:1"], ["gpu"]),
        (EVAL, "precision", ["auto", "bf16"], ["half"]),
        (EVAL, "batch_size", [1], [0]),
        (EVAL, "workers", [None, 0], [-1]),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_the_name_of_its_key(
    settings: Any, key: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert getattr(replace(settings, **{key: value}), key) == value
    for value in bad:
        with pytest.raises(ConfigError, match=rf"\b{key} is "):
            replace(settings, **{key: value})


def test_the_nearest_name_does_not_mind_the_case() -> None:
    assert nearest("MOCO", ["byol", "moco"]) == " Did you mean 'moco'?"
    assert nearest("sgd", ["AdamW", "SGD"]) == " Did you mean 'SGD'?"
    assert nearest("zzz", ["byol", "moco"]) == ""
    assert nearest(5, []) == ""


METHODS = ["autoencoder", "byol", "cpc_v2", "dcgan", "infomin", "memory_bank", "moco", "moco_v2", "simclr", "vae"]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        *((name, METHODS, "") for name in ("dino", "mae", "dae", "detcon", "nnclr", "jigsaw", "simsiam", "swav")),
        ("mocov2", METHODS, "moco_v2"),
        ("simcl", METHODS, "simclr"),
        ("boyl", METHODS, "byol"),
        ("yol", METHODS, "byol"),
        ("dc_gan", METHODS, "dcgan"),
        ("encoder", METHODS, "autoencoder"),
        ("mnist", ["list", "stl10"], ""),
        ("svm", ["semi", "knn"], ""),
        ("lamb", ["lars", "sgd"], ""),
        ("run", ["seed", "run_dir"], "run_dir"),
        ("lrr", ["lr", "momentum"], "lr"),
        ("lin", ["knn", "linear"], "linear"),
        ("retry", ["metric", "retry_failed"], "retry_failed"),
    ],
)
def test_only_a_name_that_may_be_meant_is_suggested(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known) == (f" Did you mean {expected!r}?" if expected else "")


@pytest.mark.parametrize(
    ("metric", "direction", "lowest"),
    [
        ("monitor/knn_top1", "auto", False),
        ("train/loss", "auto", True),
        ("train/loss", "max", False),
        ("train/agreement", "min", True),
    ],
)
def test_which_way_a_metric_is_good_is_known_or_told(metric: str, direction: str, lowest: bool) -> None:
    assert replace(SWEEP, metric=metric, direction=direction).is_minimized is lowest


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"sharding": "fsdp", "compile": True}, "set train.compile=false"),
        ({"activation_checkpointing": True, "compile": True}, "set train.compile=false"),
        ({"sharding": "fsdp", "cached_gradients": True}, "set one of them"),
        ({"sharding": "fsdb"}, "one of: none, fsdp"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        replace(TRAIN, **values)


def test_an_automatic_compilation_gives_way_to_sharding() -> None:
    for other in ({"sharding": "fsdp"}, {"activation_checkpointing": True}):
        assert replace(TRAIN, **other).compile == "auto"


@pytest.mark.parametrize("key", ["compile", "deterministic"])
@pytest.mark.parametrize("value", ["auto", "true", "false"])
def test_kernels_are_automatic_or_a_choice(key: str, value: str) -> None:
    found = composed("train", f"train.{key}={value}")["train"][key]
    assert found == {"auto": "auto", "true": True, "false": False}[value]


@pytest.mark.parametrize("key", ["compile", "deterministic"])
@pytest.mark.parametrize("value", ["Auto", "yes", "1", "null", "[true]"])
def test_other_kernels_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.{key} is .* but it must be 'auto' or true or false"):
        composed("train", f"train.{key}={value}")
