"""Training loop: ends of a run, steps, and reports of collapse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from command_line import SMALL, installed
from method_runs import teacher_overrides
from one_run import finish, make_run
from sslcli.data.loader import Loader
from sslcli.engine import loop
from sslcli.engine.loop import optimize
from sslcli.engine.run import Run
from sslcli.errors import EXIT_FAILED, TrainingFailed
from sslcli.methods.moco import MoCo
from sslcli.report.metrics import read
from tiny import TinyNet, make_batch

HEALTHY = [
    "moco",
    "moco_v2",
    "moco_v3",
    "simclr",
    "byol",
    "nnclr",
    "ressl",
    "barlow_twins",
    "vicreg",
    "dino",
    "ibot",
    "dinov2",
    "lejepa",
    "densecl",
    "distill",
]


def test_a_loss_that_is_not_finite_ends_the_run_naming_step_and_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, "train.max_steps=9", "train.save_every_steps=2", "train.log_every_steps=3")
    forward = run.method.forward
    calls = []

    def broken(batch):  # type: ignore[no-untyped-def]
        calls.append(1)
        scalars = forward(batch)
        return scalars | {"loss": scalars["loss"] * float("nan")} if len(calls) == 5 else scalars

    run.method.forward = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingFailed, match=r"not finite since step 5 .*step-00000004\.pt"):
        finish(run)
    assert not (tmp_path / "checkpoints" / "step-00000006.pt").exists()


def test_a_diverging_run_ends_with_exit_code_3_and_one_message(tmp_path: Path) -> None:
    said = installed(
        tmp_path, "ssl-train", *SMALL, "optimizer.lr=1e30", "train.max_steps=8", "run_dir=r", code=EXIT_FAILED
    )
    assert "not finite" in said
    assert "optimizer.lr" in said


@pytest.mark.parametrize(
    "more",
    [["monitor.knn_every_epochs=1"], ["monitor.health_every_steps=1", "monitor.knn_every_epochs=0"]],
    ids=["k-NN", "health"],
)
def test_a_run_that_diverges_between_two_lines_of_metrics_measures_nothing_of_it(
    more: list[str], tmp_path: Path
) -> None:
    """k-NN runs at the end of an epoch that is not a multiple of `train.log_every_steps`, before the next step."""
    lines = ["dataset.limit=500", "train.batch_size=64", "train.epochs=2", "optimizer.lr=1e20", "backbone.width=8"]
    said = installed(tmp_path, "ssl-train", *lines, "launcher.threads=1", "run_dir=r", *more, code=EXIT_FAILED)
    assert "not finite" in said
    assert "Usual remedies: a lower optimizer.lr" in said


def test_a_run_that_diverges_with_finite_numbers_ends_with_a_warning(tmp_path: Path) -> None:
    lines = ["dataset.limit=500", "train.batch_size=64", "train.epochs=4", "optimizer.lr=1000", "backbone.width=8"]
    said = installed(tmp_path, "ssl-train", *lines, "launcher.threads=1", "run_dir=r")
    assert said.count("warning: the run has diverged: after step") == 1
    assert "done: " in said


def test_accumulated_gradients_are_those_of_the_big_batch_and_all_keys_are_queued(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = MoCo(TinyNet(norm=False), dim=4, queue_size=24)
    parted = copy.deepcopy(whole)
    batch = make_batch(16)
    quarters = [make_batch(16) for _ in range(4)]
    for number, quarter in enumerate(quarters):
        rows = slice(4 * number, 4 * number + 4)
        quarter.views[:] = [view[rows] for view in batch.views]
    run = make_run(tmp_path, "train.max_steps=1", "train.precision=fp32")
    for method, batches in ((whole, [batch]), (parted, quarters)):
        run.method, run.optimizer = method, torch.optim.SGD(method.parameters(), lr=0.5)
        optimize(run, method, batches)
        method.after_step(0.0)
    run.stop.close()
    for one, other in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.queue, parted.queue)
    assert int(parted.queue_head) == 16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_a_finite_loss(tmp_path: Path, precision: str) -> None:
    finish(make_run(tmp_path, "train.max_steps=3", "train.log_every_steps=1", f"train.precision={precision}"))
    losses = [line["train/loss"] for line in read(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert len(losses) == 3
    assert all(loss is not None and loss > 0 for loss in losses)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, "train.max_steps=1", "train.clip_grad=1e-3", "optimizer.momentum=0", "optimizer.weight_decay=0"
    )
    before = [parameter.clone() for parameter in run.method.parameters()]
    run.optimizer.param_groups[0]["lr"] = run.optimizer.param_groups[1]["lr"] = 1.0
    (batches,) = Loader.steps(run.loader, 0, 1)
    optimize(run, run.method, batches)
    run.stop.close()
    moved = [after - old for after, old in zip(run.method.parameters(), before, strict=True)]
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(step) for step in moved]))
    assert 0.9e-3 < length <= 1.001e-3


def test_byol_without_predictor_and_momentum_is_caught_within_200_steps(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, "method=byol", "method.hidden=64", "method.dim=32", "method.predictor=false", "method.momentum=0.0",
        "views=simclr_cifar", "dataset.image_size=16", "train.max_steps=200", "optimizer.lr=0.4",
        "monitor.on_collapse=stop",
    )  # fmt: skip
    with pytest.raises(TrainingFailed, match=r"collapsed at step (100|150|200).*predictor"):
        finish(run)


def test_vicreg_without_variance_is_caught_within_200_steps(tmp_path: Path) -> None:
    def vicreg(run_dir: Path, weight: float) -> Run:
        return make_run(
            run_dir, "method=vicreg", "method.hidden=64", "method.dim=64", f"method.variance={weight}",
            "method.covariance=4", "dataset.image_size=16", "train.max_steps=200", "optimizer.lr=0.8",
            "monitor.on_collapse=stop",
        )  # fmt: skip

    finish(vicreg(tmp_path / "with", 25.0))
    with pytest.raises(TrainingFailed, match=r"collapsed at step (100|150|200)"):
        finish(vicreg(tmp_path / "without", 0.0))


def test_lejepa_without_sigreg_is_caught_within_300_steps(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, "method=lejepa", "method.hidden=64", "method.weight=0", "optimizer.lr=0.02", "dataset.image_size=16",
        "train.max_steps=300", "monitor.on_collapse=stop",
    )  # fmt: skip
    with pytest.raises(TrainingFailed, match="collapsed at step"):
        finish(run)


@pytest.mark.parametrize("method", HEALTHY)
def test_a_healthy_run_is_not_flagged(tmp_path: Path, method: str) -> None:
    smaller = {"byol": ["method.hidden=64"], "moco_v3": ["method.hidden=64"], "moco": ["method.queue_size=256"]}
    smaller |= {name: ["method.hidden=64", "method.dim=64"] for name in ("barlow_twins", "vicreg", "nnclr")}
    smaller["dino"] = ["method.hidden=64", "method.num_prototypes=256"]
    vit = ["method.hidden=64", "method.num_views=2", "views=simclr_cifar"]
    vit += ["backbone.width=16", "backbone.depth=1", "backbone.num_heads=2"]
    smaller |= {name: [*vit, "method.num_prototypes=128"] for name in ("ibot", "dinov2")}
    smaller["densecl"] = ["method.queue_size=256"]
    smaller["lejepa"] = ["method.hidden=64"]
    smaller["ressl"] = ["method.hidden=64", "method.queue_size=256"]
    run = make_run(
        tmp_path, f"method={method}", "dataset.image_size=16", "train.max_steps=150", "train.save_every_epochs=0",
        "monitor.on_collapse=stop", *teacher_overrides(method),
        *smaller.get(method, smaller["moco"] if "moco_v2" in method else []),
    )  # fmt: skip
    finish(run)
    measured = [line for line in read(tmp_path / "metrics.jsonl") if "health/std" in line]
    assert [line["step"] for line in measured] == [1, 50, 100, 150]


@pytest.mark.parametrize(("device", "ids", "hooks"), [("cpu", None, 1), ("cuda:1", [1], 0)])
def test_gradients_of_a_gpu_are_averaged_by_nccl(
    device: str, ids: list[int] | None, hooks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    class Parallel:
        def __init__(self, method: object, *, device_ids: object, **options: object) -> None:
            calls.append(device_ids)

        def register_comm_hook(self, state: object, hook: object) -> None:
            calls.append(hook)

    monkeypatch.setattr(loop, "DistributedDataParallel", Parallel)
    monkeypatch.setattr("sslcli.distributed.collectives.world_size", lambda: 2)
    loop.parallel(MoCo(TinyNet(), queue_size=8), torch.device(device))
    assert (calls[0], len(calls) - 1) == (ids, hooks)
