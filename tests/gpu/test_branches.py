"""Branches of the code for GPUs and their process group, which other tests reach only with a simulated GPU."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from command_line import SMALL, composed, installed
from small_runs import differences, metrics, newest
from sslcli.backbones.wrap import as_backbone
from sslcli.config.run_config import RunConfig
from sslcli.distributed import collectives, devices, processes
from sslcli.engine import checkpoint, compilation, loop, precision
from sslcli.errors import ConfigError
from sslcli.evaluation.features import FeatureSet, computed
from sslcli.methods.simclr import SimCLR
from sslcli.nn.batch_norm import _FusedSyncNormalize, _SyncNormalize
from sslcli.nn.noise import Noise
from sslcli.runs import slurm_job
from sslcli.sweeps.slots import cuda_devices
from tiny import TinyNet, make_batch

pytestmark = pytest.mark.gpu


def test_the_chosen_device_is_prepared(device: torch.device) -> None:
    assert devices.pick_device(device.type) == device
    deterministic = devices.uses_deterministic_kernels("auto", device)
    devices.prepare(device, deterministic=deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic
    assert deterministic is (device.type == "cpu")
    if device.type == "cuda":
        assert torch.cuda.current_device() == device.index
        assert cuda_devices("auto")


def test_the_choice_of_the_dtype_and_of_compilation_names_no_error(device: torch.device) -> None:
    found = precision.resolve("auto", device)
    assert found in ("bf16", "fp32")
    with precision.autocast(device, found):
        product = torch.ones(4, 4, device=device) @ torch.ones(4, 4, device=device)
    assert product.dtype == precision.DTYPES[found]
    assert compilation.missing_requirement(device) is None


def test_random_states_are_restored(device: torch.device) -> None:
    state = checkpoint.rng_state(device)
    expected = torch.rand(5), torch.rand(5, device=device)
    checkpoint.set_rng_state(state, device)
    for value in expected:
        assert torch.equal(torch.rand(5, device=value.device), value)


def test_random_numbers_of_methods_equal_those_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    noise = Noise()
    state = noise.get_extra_state()
    drawn = []
    for place in (torch.device("cpu"), device):
        noise.set_extra_state(state)
        noise.to(place)
        drawn.append([noise.uniform(64, 33, device=place), noise.normal(64, 33, device=place)])
        drawn[-1].append(noise.integers(1000, 64, 33, device=place))
    (uniform, normal, integers), found = drawn
    assert torch.equal(found[0].cpu(), uniform)
    assert torch.equal(found[2].cpu(), integers)
    torch.testing.assert_close(found[1].cpu(), normal)


def test_a_module_on_the_device_becomes_a_backbone(device: torch.device) -> None:
    net = TinyNet().to(device)
    state = checkpoint.rng_state(device)
    del TinyNet.num_features
    try:
        assert as_backbone(net, image_size=8).num_features == 8
    finally:
        TinyNet.num_features = 8
    assert differences(checkpoint.rng_state(device), state) == []


@pytest.mark.cuda
def test_protocols_compute_on_the_cpu_if_the_gpu_has_too_little_memory(device: torch.device) -> None:
    rows, labels = torch.eye(4), torch.arange(4)
    features = FeatureSet(train=rows, train_labels=labels, val=rows, val_labels=labels, num_classes=4)
    used: list[str] = []

    def protocol(features: FeatureSet) -> dict[str, float]:
        used.append(features.train.device.type)
        if features.train.is_cuda:
            torch.empty(2 * torch.cuda.mem_get_info(device)[1], dtype=torch.uint8, device=device)
        return {"top1": 0.5}

    assert computed(protocol, features, device) == {"top1": 0.5}
    assert used == ["cuda", "cpu"]


@pytest.fixture
def _group_of_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process group of a run with one process: NCCL on a GPU, gloo on the CPU."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with processes.process_group(device, limit=60, end=pytest.fail):
        yield
    assert not dist.is_initialized()


@pytest.mark.usefixtures("_group_of_one")
def test_the_group_communicates_on_the_device_and_on_the_cpu(device: torch.device) -> None:
    assert ("nccl" in dist.get_backend(dist.group.WORLD)) is (device.type == "cuda")
    for place in (device, torch.device("cpu")):
        value = torch.arange(3.0, device=place)
        dist.all_reduce(value)
        assert value.tolist() == [0.0, 1.0, 2.0]
    objects: list[object] = [None]
    dist.all_gather_object(objects, "configuration")
    assert objects == ["configuration"]


@pytest.mark.usefixtures("_group_of_one")
def test_the_parallel_method_has_the_gradients_of_the_method(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    method, batch = SimCLR(TinyNet()).to(device), make_batch().to(device)
    method(batch)["loss"].backward()
    expected = [parameter.grad.clone() for parameter in method.parameters() if parameter.grad is not None]
    method.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(collectives, "world_size", lambda: 2)
        model = loop.parallel(method, device)
    assert model is not method
    model(batch)["loss"].backward()
    found = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_synchronized_batch_norm_of_one_process_is_batch_norm(
    memory_format: torch.memory_format, device: torch.device
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.rand(8), torch.randn(8)
    images = torch.randn(16, 8, 5, 5)

    def outputs(normalize: object, place: torch.device) -> list[Tensor]:
        inputs = [value.to(place).requires_grad_() for value in (images.to(memory_format=memory_format), weight, bias)]
        out = normalize(*inputs)  # type: ignore[operator]
        (out * torch.linspace(-1, 1, out.numel(), device=place).view(out.shape)).sum().backward()
        gradients = [value.grad.cpu() for value in inputs if value.grad is not None]
        assert len(gradients) == 3
        return [out.detach().cpu(), *gradients]

    def fused(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        state = torch.zeros(8, device=images.device), torch.ones(8, device=images.device)
        return _FusedSyncNormalize.apply(images, weight, bias, *state, 0.1, 1e-5)  # type: ignore[no-any-return]

    def plain(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _SyncNormalize.apply(images, weight, bias, 1e-5)[0]  # type: ignore[no-any-return]

    def reference(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(images, None, None, weight, bias, training=True)

    expected = outputs(reference, torch.device("cpu"))
    for normalize in (plain, fused) if device.type == "cuda" else (plain,):
        torch.testing.assert_close(outputs(normalize, device), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu(in_make_test=False)
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.cuda(gpus=2))])
def test_launched_processes_train_as_one_process(number: int, device: torch.device, tmp_path: Path) -> None:
    line = [*SMALL, f"device={device.type}", "train.deterministic=true", "train.precision=fp32"]
    installed(tmp_path, "ssl-train", *line, "run_dir=alone")
    installed(tmp_path, "ssl-train", *line, "run_dir=group", "launcher=multi", f"launcher.processes={number}")
    if number == 1:
        assert differences(newest(tmp_path / "group"), newest(tmp_path / "alone")) == []
    losses = [[line["train/loss"] for line in metrics(tmp_path / name)] for name in ("group", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.cuda
@pytest.mark.gpu(in_make_test=False)
def test_each_gpu_has_a_process(tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    line = [*SMALL, f"train.batch_size={32 * gpus}", "launcher=multi", "dataset.limit=2000", "run_dir=run"]
    assert re.search(rf"processes +{gpus}\n", installed(tmp_path, "ssl-train", *line))


@pytest.mark.cuda
def test_a_job_with_too_few_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = torch.cuda.device_count()
    line = ["launcher=slurm", f"launcher.gpus_per_node={gpus + 1}", f"run_dir={tmp_path}"]
    config = RunConfig.from_plain(composed("train", *line))
    monkeypatch.setattr(slurm_job, "stored_config", lambda path: config)
    with pytest.raises(ConfigError, match=f"torch sees {gpus} GPUs"):
        slurm_job.run_node(tmp_path, "localhost:0")


@pytest.mark.gpu(in_make_test=False)
def test_the_jobs_of_a_sweep_use_the_device(device: torch.device, tmp_path: Path) -> None:
    line = [*SMALL, "monitor.knn_k=10", "seed=0,1", "hydra.sweep.dir=sweep", f"device={device.type}"]
    installed(tmp_path, "ssl-train", "--multirun", *line)
    table = (tmp_path / "sweep" / "sweep.csv").read_text()
    assert table.count("finished") == 2, table
