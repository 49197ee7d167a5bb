from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import Case, golden_cases
from one_run import finish, make_run
from sslcli.engine.optim import parameter_groups
from sslcli.errors import TrainingFailed
from sslcli.methods.simsiam import SimSiam, simsiam_loss
from sslcli.nn.batch_norm import SyncBatchNorm
from sslcli.report.metrics import read
from tiny import TinyNet, make_batch


def tiny_simsiam(**changes: object) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(TinyNet(), **({"dim": 4, "hidden": 16, "predictor_hidden": 6} | changes))  # type: ignore[arg-type]


@golden_cases("simsiam_loss")
def test_loss_and_gradients_equal_the_official_code(case: Case) -> None:
    p1, p2 = (case.inputs[name].requires_grad_() for name in ("p1", "p2"))
    loss = simsiam_loss([p1, p2], [case.inputs["z1"], case.inputs["z2"]])
    loss.backward()
    case.check(loss, "loss")
    case.check(p1.grad, "grad_p1")
    case.check(p2.grad, "grad_p2")


@golden_cases("fastsiam")
def test_loss_of_more_views_equals_that_of_fastsiam(case: Case) -> None:
    p = case.inputs["p"].requires_grad_()
    loss = simsiam_loss([*p], [*case.inputs["z"]])
    loss.backward()
    case.check(loss, "loss")
    case.check(p.grad, "grad_p")


def test_with_two_views_fastsiam_is_simsiam_bit_for_bit() -> None:
    p1, p2, z1, z2 = torch.randn(4, 5, 3)
    simsiam = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) * 0.5
    assert torch.equal(simsiam_loss([p1, p2], [z1, z2]), simsiam)


@pytest.mark.parametrize("views", [2, 3])
def test_gradient_flows_through_the_predictions_only(views: int) -> None:
    method, batch = tiny_simsiam(num_views=views), make_batch(views=views)
    got = {}

    def record(module: nn.Module, _: object, z: torch.Tensor) -> None:
        z.register_hook(lambda grad: got.setdefault(len(got), grad))

    method.projector.register_forward_hook(record)
    method(batch)["loss"].backward()
    method.zero_grad()
    z = [method.projection(view) for view in batch.views]
    leaves = [rows.detach().requires_grad_() for rows in z]
    targets = [rows.detach().requires_grad_() for rows in z]
    simsiam_loss([method.predictor(rows) for rows in leaves], [*targets]).backward()
    expected = [leaf.grad for leaf in leaves]
    assert all(target.grad.abs().sum() > 0 for target in targets)  # what the stop-gradient keeps out
    for grad in got.values():
        assert any(torch.allclose(grad, one, atol=1e-6) for one in expected)
    assert len(got) == views


def test_heads_are_those_of_the_official_code() -> None:
    method = tiny_simsiam(hidden=None)
    layers = [type(part) for part in method.projector]
    assert layers == [nn.Linear, SyncBatchNorm, nn.ReLU] * 2 + [nn.Linear, SyncBatchNorm]
    linear = [part for part in method.projector if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features, part.bias) for part in linear] == [
        (8, 8, None), (8, 8, None), (8, 4, None),
    ]  # fmt: skip
    assert [part.affine for part in method.projector if isinstance(part, SyncBatchNorm)] == [True, True, False]
    first, norm, _, last = method.predictor
    assert (first.out_features, first.bias, norm.affine, last.out_features) == (6, None, True, 4)
    assert last.bias is not None
    assert len(tiny_simsiam(layers=2).projector) == 5


def test_the_predictor_has_a_constant_learning_rate() -> None:
    method = tiny_simsiam()
    predictor = {id(parameter) for parameter in method.predictor.parameters()}
    for constant, options in ((True, {"predictor": {"constant_lr": True}}), (False, {})):
        method.constant_predictor_lr = constant
        assert method.group_options() == options
        for group in parameter_groups(method, weight_decay=0.1, decay_norm_and_bias=True):
            own = {id(parameter) for parameter in group["params"]}
            assert group.get("constant_lr", False) == (constant and own <= predictor)


def health(run_dir: Path, name: str) -> list[float]:
    return [line[f"health/{name}"] for line in read(run_dir / "metrics.jsonl") if f"health/{name}" in line]


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read(run_dir / "metrics.jsonl") if "train/loss" in line]


SHAPES = [
    "method=simsiam",
    "method.dim=64",
    "method.hidden=64",
    "method.layers=2",
    "method.predictor_hidden=16",
    "dataset.image_size=16",
    "dataset.limit=384",
    "train.batch_size=128",
    "train.max_steps=200",
    "train.save_every_epochs=0",
    "optimizer.lr=1",
    "monitor.on_collapse=stop",
]


@pytest.mark.parametrize("ablation", ["predictor", "stop_gradient"])
def test_without_predictor_or_stop_gradient_the_embeddings_collapse_and_the_guard_says_so(
    tmp_path: Path, ablation: str
) -> None:
    """The embeddings collapse to one direction, and the loss goes to -1.

    The official ablation has a standard deviation of 0 there. It cannot here: BatchNorm without affine parameters gives
    each dimension a mean of 0 over the batch, so at least one of N images has the opposite direction. The standard
    deviation of the unit vectors is then at least 2 sqrt(1/N (1 - 1/N)) / sqrt(d), which is 0.18 / sqrt(d) for N = 128.
    """
    with pytest.raises(TrainingFailed, match=r"collapsed at step (100|150|200)"):
        finish(make_run(tmp_path, *SHAPES, f"method.{ablation}=false"))
    assert min(health(tmp_path, "rankme")) < 2
    assert min(health(tmp_path, "std")) < 0.6 / 64**0.5
    assert min(losses(tmp_path)) < -0.875


@pytest.mark.parametrize("views", [2, 4])
def test_with_both_the_embeddings_stay_spread_and_the_guard_is_silent(tmp_path: Path, views: int) -> None:
    finish(make_run(tmp_path, *SHAPES, f"method.num_views={views}", f"views.views.0.count={views}"))
    assert min(health(tmp_path, "std")) > 0.8 / 64**0.5
    assert min(health(tmp_path, "rankme")) > 5
    assert min(losses(tmp_path)) > -0.875


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match="num_views is 1"):
        tiny_simsiam(num_views=1)
    with pytest.raises(ValueError, match="layers"):
        tiny_simsiam(layers=0)
    with pytest.raises(ValueError, match="hidden is 0"):
        tiny_simsiam(hidden=0)
