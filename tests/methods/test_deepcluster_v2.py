from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from one_run import finish, make_run
from processes import Pair
from sslcli.methods.base import Batch
from sslcli.methods.deepcluster_v2 import UNSEEN, DeepClusterV2, cluster_prediction
from sslcli.nn.kmeans import nearest
from sslcli.report.metrics import read
from synchronizations import CUDA, counted, move_to_device
from tiny import Rows, TinyNet, make_batch, mine, multi_crop_batch


@golden_cases("deepclusterv2_loss")
def test_losses_gradients_and_memory_bank_equal_the_official_code(case: Case) -> None:
    params, x = case.params, case.inputs
    method = DeepClusterV2(
        Rows(params["D"]),
        num_images=params["dataset"],
        dim=params["D"],
        num_prototypes=params["prototypes"],
        num_views=params["views"],
        temperature=params["temperature"],
    ).to(case.dtype)
    method.projector = nn.Identity()  # type: ignore[assignment]
    method.clusters.copy_(x["assignments"])
    names = [f"prototypes{head}" for head in range(len(params["prototypes"]))]
    for name in names:
        setattr(method, name, x[name].requires_grad_())
    found: dict[str, list[Tensor]] = {name: [] for name in ("loss", "grad_emb", *(f"grad_{name}" for name in names))}
    for index, z in zip(x["index"], x["emb"].requires_grad_(), strict=True):
        found["loss"].append(method(Batch([*z], index, torch.zeros_like(index)))["loss"])
        method.after_step(0.0)
        scores = [z @ prototypes.T for prototypes in method.prototypes]  # the gradients are those of unit embeddings
        loss = cluster_prediction(scores, method.clusters[:, index], temperature=params["temperature"])
        gradients = torch.autograd.grad(loss, [z, *method.prototypes])
        for name, gradient in zip(("emb", *names), gradients, strict=True):
            found[f"grad_{name}"].append(gradient)
    for name, values in found.items():
        case.check(values, name)
    case.check(method.bank[:, case.outputs["bank_index"]], "bank")
    assert method.seen.nonzero().squeeze(1).tolist() == sorted(set(case.outputs["bank_index"].tolist()))


def tiny_deepcluster(**changes: Any) -> DeepClusterV2:
    torch.manual_seed(0)
    defaults = {"num_images": 24, "dim": 4, "hidden": 16, "num_prototypes": [5, 4, 3], "num_views": 4}
    return DeepClusterV2(TinyNet(norm=changes.pop("norm", True)), **(defaults | changes))


def train(method: DeepClusterV2, batch: Batch, epoch: float = 0.0) -> Tensor:
    method.before_step(0.0, epoch)
    loss = method(batch)["loss"]
    method.after_step(0.0)
    return loss.detach()  # type: ignore[no-any-return]


def test_equal_scores_give_the_mean_logarithm_of_the_numbers_of_prototypes() -> None:
    scores = [torch.zeros(3, 6, count) for count in (10, 100)]
    clusters = torch.stack([torch.arange(6), 10 * torch.arange(6)])
    loss = cluster_prediction(scores, clusters, temperature=0.1)
    assert float(loss) == pytest.approx((math.log(10) + math.log(100)) / 2)


def test_images_without_a_cluster_do_not_change_the_loss() -> None:
    torch.manual_seed(0)
    scores, clusters = torch.randn(2, 6, 5), torch.tensor([[0, 1, UNSEEN, 2, UNSEEN, 4]])
    seen = [0, 1, 3, 5]
    loss = cluster_prediction([scores], clusters, temperature=0.5)
    torch.testing.assert_close(loss, cluster_prediction([scores[:, seen]], clusters[:, seen], temperature=0.5))
    assert cluster_prediction([scores], torch.full((1, 6), UNSEEN), temperature=0.5) == 0


def test_the_first_epoch_fills_the_bank_and_the_next_ones_predict_its_clusters() -> None:
    method, batch = tiny_deepcluster(), multi_crop_batch(8)
    assert train(method, batch) == 0
    stored = torch.stack(method.embeddings)
    torch.testing.assert_close(method.bank[:, batch.index], stored)
    assert method.seen.sum() == 8
    assert not method.clusters[:, batch.index].ge(0).any()

    assert train(method, batch, epoch=1.0) > 0
    for head, prototypes in enumerate(method.prototypes):
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(len(prototypes)))
        assert torch.equal(method.clusters[head, batch.index], nearest(stored[head % 2], prototypes))
    absent = torch.ones(24, dtype=torch.bool).index_fill(0, batch.index, False)
    assert (method.clusters[:, absent] == UNSEEN).all()

    before = [rows.clone() for rows in method.prototypes]
    train(method, batch, epoch=1.5)
    assert all(torch.equal(rows, old) for rows, old in zip(method.prototypes, before, strict=True))
    train(method, batch, epoch=2.0)
    assert not any(torch.equal(rows, old) for rows, old in zip(method.prototypes, before, strict=True))


def test_prototypes_are_not_trained_and_the_first_epoch_is_frozen() -> None:
    method = tiny_deepcluster()
    assert not [name for name, _ in method.named_parameters() if "prototypes" in name]
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {*method.group_options()}
    assert all(options == {"frozen_epochs": 1} for options in method.group_options().values())


def test_clustering_again_after_loading_gives_the_same_clusters() -> None:
    method, batch = tiny_deepcluster(), multi_crop_batch(8)
    train(method, batch)
    other = tiny_deepcluster()
    other.noise.seed += 1
    other.load_state_dict(method.state_dict())
    losses = [train(each, batch, epoch=1.0) for each in (method, other)]
    assert losses[0] == losses[1]
    assert torch.equal(method.clusters, other.clusters)


def test_clustering_does_not_wait_for_the_device() -> None:
    method = tiny_deepcluster()
    with counted() as counter:
        move_to_device(method)
        method.seen.fill_(True)
        counter.found.clear()
        method.cluster()
    assert method.bank.device == CUDA
    # The random order of the images is drawn on the host, and copied once per head and epoch.
    assert [place.partition(" ")[0] for place in counter.found] == ["_to_copy"] * 3


def steps_of(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    method = tiny_deepcluster(norm=False, num_views=2, num_images=8).to(dtype)
    losses, total = [], {}
    for step in range(4):
        method.before_step(step / 4, step)
        loss = method(mine(make_batch(8, views=2, seed=step, dtype=dtype)))["loss"]
        gradients = torch.autograd.grad(loss, [*method.parameters()])
        names = [name for name, _ in method.named_parameters()]
        total = {n: total.get(n, 0) + g for n, g in zip(names, gradients, strict=True)}
        losses.append(loss.detach())
        method.after_step(step / 4)
    state = {name: value for name, value in method.named_buffers() if value.is_floating_point()}
    return losses, total, state | {"clusters": method.clusters}


def test_two_processes_are_one(pair: Pair) -> None:
    losses, total, state = steps_of(torch.float64)
    first, second = pair.run(steps_of, torch.float64)
    mean = torch.stack([torch.stack(part[0]) for part in (first, second)]).mean(0)
    torch.testing.assert_close(mean, torch.stack(losses), rtol=1e-10, atol=1e-10)
    for name, value in total.items():
        torch.testing.assert_close((first[1][name] + second[1][name]) / 2, value, rtol=1e-7, atol=1e-9)
    for name, value in state.items():
        torch.testing.assert_close(first[2][name], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(first[2][name], second[2][name])


def test_on_shapes_the_loss_falls_while_clusters_stay_in_use_and_the_guard_is_silent(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        "method=deepcluster_v2",
        "method.dim=32",
        "method.hidden=64",
        "method.num_prototypes=[50]",
        "method.num_views=2",
        "views=cifar_symmetric_weak",
        "views.views.0.crop_scale=[0.8,1]",
        "backbone.width=16",
        "dataset.image_size=16",
        "dataset.limit=512",
        "train.batch_size=128",
        "train.max_steps=200",
        "train.save_every_epochs=0",
        "monitor.on_collapse=stop",
        "optimizer=adamw",
        "optimizer.lr=2e-3",
    )
    finish(run)
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["train/loss"] for line in lines if "train/loss" in line][-1] < math.log(50) - 1
    clusters = run.method.get_buffer("clusters")
    assert len(clusters[clusters != UNSEEN].unique()) > 40
    assert min(line["health/std"] for line in lines if "health/std" in line) > 0.4 / 32**0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_views": 1}, "num_views is 1"),
        ({"num_prototypes": []}, r"num_prototypes is \[\]"),
        ({"num_prototypes": [4, 25]}, r"num_prototypes is \[4, 25\].*there are 24 training images"),
        ({"temperature": 0.0}, "temperature"),
        ({"kmeans_iterations": 0}, "kmeans_iterations"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_deepcluster(**changes)
