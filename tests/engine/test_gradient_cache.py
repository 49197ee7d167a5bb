"""The cached gradient of two halves equals that of the whole batch, bit-identical where rounding is the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from command_line import SMALL, installed
from processes import Pair
from sslcli.distributed.collectives import rank, world_size
from sslcli.engine import precision
from sslcli.engine.gradient_cache import all_reduce, average_gradients, backward
from sslcli.errors import EXIT_CONFIG, ConfigError
from sslcli.methods.base import Batch, Method
from sslcli.methods.byol import BYOL
from sslcli.methods.cmc import CMC
from sslcli.methods.mixture import UnMix
from sslcli.methods.moco_v3 import MoCoV3
from sslcli.methods.simclr import SimCLR
from sslcli.methods.simclr_v2 import SimCLRv2
from sslcli.runs.assemble import check_cached_gradients
from tiny import TinyNet, make_batch, vit

CPU = torch.device("cpu")
Build = Callable[[], Method]


class Dropping(TinyNet):
    """Draws random numbers in its forward."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.25, self.training)


def simclr() -> Method:
    return SimCLR(TinyNet(norm=False), dim=4, norm=False)


def simclr_v2() -> Method:
    return SimCLRv2(TinyNet(norm=False), dim=4, norm=False, queue_size=32)


def moco_v3() -> Method:
    method = MoCoV3(TinyNet(norm=False), dim=4, hidden=8)
    for name in ("projector", "predictor", "momentum_projector"):
        part = getattr(method, name)
        setattr(method, name, nn.Sequential(*(nn.Identity() if "Norm" in type(m).__name__ else m for m in part)))
    return method


def cmc() -> Method:
    net = TinyNet(norm=False)
    return CMC(net, num_images=64, channels=3, dim=4, loss="batch")


METHODS: list[Build] = [simclr, simclr_v2, moco_v3, cmc]


def built(build: Build) -> Method:
    torch.manual_seed(1)
    return build().double()


def divided(batch: Batch, parts: int) -> list[Batch]:
    size = len(batch.index) // parts
    return [
        Batch([view[rows] for view in batch.views], batch.index[rows], batch.label[rows])
        for rows in (slice(start, start + size) for start in range(0, len(batch.index), size))
    ]


def in_parts(method: Method, batches: list[Batch]) -> dict[str, Tensor]:
    scaler = precision.grad_scaler(CPU, "fp32")
    return backward(method, batches, device=CPU, dtype_name="fp32", scaler=scaler)


def gradients(method: Method) -> dict[str, Tensor]:
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def batch_for(method: Method) -> Batch:
    return make_batch(16, views=method.num_views, dtype=torch.float64)


@pytest.mark.parametrize("build", METHODS)
@pytest.mark.parametrize("parts", [1, 4])
def test_gradient_and_scalars_are_those_of_the_whole_batch(build: Build, parts: int) -> None:
    whole = built(build)
    parted = copy.deepcopy(whole)
    batch = batch_for(whole)
    expected = whole(batch)
    expected["loss"].backward()
    found = in_parts(parted, divided(batch, parts))
    torch.testing.assert_close(
        found, {name: value.detach() for name, value in expected.items()}, rtol=1e-12, atol=1e-12
    )
    assert gradients(whole).keys() == gradients(parted).keys()
    torch.testing.assert_close(gradients(parted), gradients(whole), rtol=1e-9, atol=1e-12)
    for method in (whole, parted):
        method.after_step(0.0)
    torch.testing.assert_close(parted.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-12)


def test_the_mean_over_micro_batches_is_another_gradient() -> None:
    """Otherwise the test above would hold for train.accumulate as well."""
    whole = built(simclr)
    parted = copy.deepcopy(whole)
    batch = batch_for(whole)
    whole(batch)["loss"].backward()
    for part in divided(batch, 4):
        (parted(part)["loss"] / 4).backward()
    differs = [not torch.allclose(one, gradients(whole)[name], rtol=1e-2) for name, one in gradients(parted).items()]
    assert any(differs)


def test_batch_norm_counts_each_micro_batch_once() -> None:
    torch.manual_seed(1)
    parted = SimCLR(TinyNet(), dim=4).double()
    once = copy.deepcopy(parted)
    parts = divided(batch_for(parted), 4)
    in_parts(parted, parts)
    for part in parts:
        once.embed(part)
    buffers = dict(once.named_buffers())
    assert any("running_mean" in name for name in buffers)
    for name, value in parted.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=0, atol=0)


def test_stochastic_depth_drops_the_same_branches_in_both_passes() -> None:
    torch.manual_seed(1)
    method = SimCLR(vit(drop_path=0.5), dim=4, norm=False).double()
    twin = copy.deepcopy(method)
    parts = divided(batch_for(method), 4)
    rows = zip(*(twin.embed(part) for part in parts), strict=True)
    expected = twin.compare(tuple(torch.cat(column) for column in rows))
    expected["loss"].backward()
    found = in_parts(method, parts)
    torch.testing.assert_close(found["loss"], expected["loss"].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(method), gradients(twin), rtol=1e-9, atol=1e-12)
    assert method.backbone.noise.draws == twin.backbone.noise.draws == 8  # one per forward pass of a view


def test_random_numbers_of_the_first_pass_come_again_in_the_second() -> None:
    torch.manual_seed(1)
    method = SimCLR(Dropping(norm=False), dim=4, norm=False).double()
    twin = copy.deepcopy(method)
    parts = divided(batch_for(method), 4)
    torch.manual_seed(5)
    in_parts(method, parts)
    follows = torch.rand(3)
    torch.manual_seed(5)
    rows = [twin.embed(part) for part in parts]
    twin.compare(tuple(torch.cat(column) for column in zip(*rows, strict=True)))["loss"].backward()
    torch.testing.assert_close(gradients(method), gradients(twin), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(follows, torch.rand(3), rtol=0, atol=0)


def share_of_two(name: str) -> dict[str, Tensor]:
    method = built(next(build for build in METHODS if build.__name__ == name))
    parts = divided(batch_for(method), 4)
    in_parts(method, parts[rank() :: world_size()])
    return gradients(method)


@pytest.mark.parametrize("build", METHODS)
def test_two_processes_have_the_gradient_of_one(build: Build, pair: Pair) -> None:
    whole = built(build)
    whole(batch_for(whole))["loss"].backward()
    for found in pair.run(share_of_two, build.__name__):
        torch.testing.assert_close(found, gradients(whole), rtol=1e-9, atol=1e-12)


def test_a_single_process_averages_nothing() -> None:
    method = built(simclr)
    method(batch_for(method))["loss"].backward()
    before = {name: value.clone() for name, value in gradients(method).items()}
    average_gradients(method)
    torch.testing.assert_close(gradients(method), before, rtol=0, atol=0)


def reduced(bucket_bytes: int) -> tuple[list[Tensor], int]:
    """Sums over processes of gradients of several shapes, dtypes and memory layouts, and the number of collectives."""
    generator = torch.Generator().manual_seed(rank())
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 2), (5,), (2, 3, 2, 2), (), (4,))]
    gradients[2] = gradients[2].contiguous(memory_format=torch.channels_last)
    gradients[3] = gradients[3].double()
    with torch.profiler.profile() as profile:
        all_reduce(gradients, bucket_bytes=bucket_bytes)
    calls = sum(event.count for event in profile.key_averages() if event.key == "c10d::allreduce_")
    return gradients, calls


def test_buckets_give_the_sums_of_single_gradients_with_fewer_collectives(pair: Pair) -> None:
    (single, calls), (whole, fewer) = pair.run(reduced, 1)[0], pair.run(reduced, 1000)[0]
    assert all(torch.equal(one, other) for one, other in zip(single, whole, strict=True))
    assert whole[2].is_contiguous(memory_format=torch.channels_last)
    assert (calls, fewer) == (5, 3)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (lambda: BYOL(TinyNet(), dim=4, hidden=8), "BYOL.*train.accumulate alone"),
        (lambda: CMC(TinyNet(norm=False), num_images=8, channels=3, dim=4, loss="softmax", negatives=4), "CMC"),
        (lambda: SimCLR(TinyNet(), dim=4, mixture=UnMix()), "mixture=null"),
    ],
)
def test_what_cannot_be_divided_is_refused(method: Build, expected: str) -> None:
    check_cached_gradients(method(), False)
    with pytest.raises(ConfigError, match=expected):
        check_cached_gradients(method(), True)


def test_the_command_contrasts_all_micro_batches(tmp_path: Path) -> None:
    run = ["ssl-train", *SMALL, "train.accumulate=4", "monitor.knn_every_epochs=0"]
    said = installed(tmp_path, *run, "train.cached_gradients=true", "run_dir=cached")
    assert re.search(r"negatives per query +62\n", said)
    assert "in-batch negatives" not in said
    said = installed(tmp_path, *run, "method=byol", "train.cached_gradients=true", "run_dir=byol", code=EXIT_CONFIG)
    assert "train.cached_gradients is true" in said
