from __future__ import annotations

import pickle
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sslcli.data.sources.base import BadImage
from sslcli.errors import ConfigError
from sslcli.evaluation.features import FeatureSet, computed, computed_on, extract, from_bank, pixels
from sslcli.nn.modes import evaluating


class Net(nn.Module):
    """A network with BatchNorm and dropout, whose output differs outside of evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).mean(dim=(2, 3))


def source(n: int = 23, size: int = 8) -> SimpleNamespace:
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(images=images, image_size=size, workers=0)


def halve(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def run(net: Net, positions: Tensor, **keywords) -> Tensor:
    settings = {"prepare": halve, "batch_size": 5, "device": "cpu", "precision": "fp32"} | keywords
    with evaluating(net):
        features, readable = extract(net.features, source(), positions, **settings)
    assert readable.all()
    return features


def test_features_are_those_of_the_net_in_eval_mode_in_the_order_of_positions():
    net = Net()
    positions = torch.tensor([7, 3, 3, 22, 0, 11, 5])
    want = net.eval().features(halve(source().images[positions].float() / 255)).detach()
    got = run(net, positions)
    assert (got.dtype, got.device.type, got.requires_grad) == (torch.float32, "cpu", False)
    torch.testing.assert_close(got, want)


def test_batch_size_does_not_change_features():
    net = Net()
    torch.testing.assert_close(run(net, torch.arange(23), batch_size=4), run(net, torch.arange(23), batch_size=64))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_reduced_precision_is_used_and_loses_nothing_of_what_the_net_gave(precision, dtype):
    net = Net()
    exact, rough = run(net, torch.arange(9)), run(net, torch.arange(9), precision=precision)
    assert rough.dtype == dtype
    assert not torch.equal(exact, rough.float())
    torch.testing.assert_close(exact, rough.float(), rtol=0.1, atol=0.05)
    images = halve(source().images[:5].float() / 255)
    with torch.autocast("cpu", dtype):
        assert torch.equal(net.eval().features(images).detach().float(), rough[:5].float())


def test_features_can_be_trained_on():
    layer = nn.Linear(8, 2)
    layer(run(Net(), torch.arange(6))).sum().backward()
    assert layer.weight.grad is not None


def test_no_random_state_parameter_buffer_or_mode_changes():
    net = Net().train()
    net.body[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    states = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        # one that draws all the same, as a net with its own noise might
        noisy, _ = extract(
            lambda x: net.features(x) + torch.rand(1),
            source(),
            torch.arange(23),
            prepare=halve,
            batch_size=4,
            device="cpu",
            precision="bf16",
        )
    assert len(noisy) == 23
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), pickle.dumps(np.random.get_state()))
    assert [module.training for module in net.modules()] == modes
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_modes_come_back_after_an_error():
    net = Net().train()
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert all(module.training for module in net.modules())


def test_images_that_cannot_be_read_are_told_in_order():
    def read(position: int) -> Image.Image:
        if position % 3 == 0:
            raise BadImage(f"{position}.png", "cut short")
        return Image.new("RGB", (9, 9), (position, 0, 0))

    files = SimpleNamespace(
        images=None, channels=3, image_size=8, workers=0, read=read, blank=lambda size: Image.new("RGB", (size, size))
    )
    features, readable = extract(
        lambda images: images.mean(dim=(2, 3)),
        files,
        torch.tensor([4, 3, 5, 0]),
        prepare=lambda images: images * 255,
        batch_size=3,
        device="cpu",
        precision="fp32",
    )
    assert readable.tolist() == [True, False, True, False]
    torch.testing.assert_close(features[readable][:, 0], torch.tensor([4.0, 5.0]))


def test_progress_counts_the_images_done():
    seen = []
    run(Net(), torch.arange(12), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_encode_sees_normalized_channels_last_floats():
    def encode(images: Tensor) -> Tensor:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32
        assert images.min() < -1
        return images.flatten(1)

    got, _ = extract(encode, source(), torch.arange(3), prepare=halve, batch_size=2, device="cpu", precision="fp32")
    torch.testing.assert_close(got, halve(source().images[:3].float() / 255).flatten(1))


def test_an_empty_split_an_empty_batch_and_unpooled_maps_are_refused():
    with pytest.raises(ValueError, match="split is empty"):
        run(Net(), torch.arange(0))
    with pytest.raises(ValueError, match="batch_size=0"):
        run(Net(), torch.arange(3), batch_size=0)
    with pytest.raises(ValueError, match="pool feature maps first"):
        extract(lambda x: x, source(), torch.arange(3), prepare=halve, batch_size=2, device="cpu", precision="fp32")


def test_pixels_of_small_images_are_the_images_and_of_large_ones_their_means():
    small = torch.rand(2, 3, 32, 20)
    assert torch.equal(pixels(small), small.flatten(1))
    large = torch.rand(2, 3, 64, 32)
    want = large.view(2, 3, 32, 2, 16, 2).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(pixels(large), want)
    assert pixels(torch.rand(1, 3, 224, 224)).shape == (1, 3 * 32 * 32)


def valid() -> dict:
    return {
        "train": torch.randn(6, 3),
        "train_labels": torch.arange(6) % 2,
        "val": torch.randn(4, 3),
        "val_labels": torch.arange(4) % 2,
        "num_classes": 2,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": None}, "features or labels but not both"),
        ({"val": None, "val_labels": None}, "val or a test split"),
        ({"val": torch.randn(4, 5)}, r"val features have shape \(4, 5\)"),
        ({"val_labels": torch.zeros(3, dtype=torch.int64)}, "one for each of the 4"),
        ({"train_labels": torch.zeros(6)}, "must be int64"),
        ({"train_labels": torch.full((6,), -1)}, "unlabeled"),
        ({"train_labels": torch.full((6,), 2)}, r"must be in \[0, 2\)"),
        ({"train": torch.full((6, 3), float("nan"))}, "6 of 6 images are NaN"),
    ],
)
def test_feature_sets_that_no_probe_can_use_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FeatureSet(**valid() | change)


def test_the_reported_split_is_test_and_else_val():
    features = FeatureSet(**valid())
    assert features.reported()[0] == "val"
    both = FeatureSet(**valid(), test=torch.randn(2, 3), test_labels=torch.zeros(2, dtype=torch.int64))
    name, x, y = both.reported()
    assert name == "test"
    assert x is both.test
    assert y is both.test_labels


def test_a_feature_set_moves_with_all_it_holds():
    features = FeatureSet(**valid(), classes=("a", "b"))
    moved = features.to("cpu")
    assert moved.classes == ("a", "b")
    assert vars(moved).keys() == vars(features).keys()
    assert torch.equal(moved.val, features.val)


def test_rows_of_a_bank_take_the_place_of_the_features_of_their_images():
    split = torch.tensor([7, 2, 9, 4])  # positions in the source of rows 0 to 3
    rows = torch.arange(1.0, 9.0).view(4, 2)
    rows[3] = 0  # never seen
    labels = torch.tensor([0, 1, 0])
    features = FeatureSet(
        train=torch.zeros(3, 2),
        train_labels=labels,
        train_positions=torch.tensor([2, 4, 7]),
        val=torch.ones(1, 2),
        val_labels=labels[:1],
        num_classes=2,
    )
    found = from_bank(features, rows, split)
    assert found.train.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert (found.train_labels.tolist(), found.train_positions.tolist()) == ([0, 0], [2, 7])
    assert found.val is features.val
    with_others = replace(
        features,
        train=torch.zeros(4, 2),
        train_labels=torch.tensor([0, 1, 1, 0]),
        train_positions=torch.tensor([2, 3, 99, 7]),
    )
    found = from_bank(with_others, rows, split)  # 3 and 99 are not in the split
    assert found.train.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert (found.train_labels.tolist(), found.train_positions.tolist()) == ([0, 0], [2, 7])
    with pytest.raises(ValueError, match="bank has 3 rows, but the training split 4 images"):
        from_bank(features, rows[:3], split)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    ],
)
def test_the_cpu_computes_a_protocol_if_the_gpu_lacks_memory(error):
    on_cpu, on_gpu = SimpleNamespace(), SimpleNamespace()
    on_cpu.to = lambda device: on_gpu

    def protocol(features):
        if features is on_gpu:
            raise error
        return {"top1": 0.5}

    assert computed(protocol, on_cpu, torch.device("cuda")) == {"top1": 0.5}
    on_gpu, error = on_cpu, RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        computed(protocol, on_cpu, torch.device("cuda"))


def test_tensors_are_on_the_device_unless_it_lacks_memory():
    def kinds(*tensors):
        return [tensor.device.type for tensor in tensors]

    def crowded(*tensors):
        if tensors[0].device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return kinds(*tensors)

    both = torch.ones(2), torch.ones(3)
    assert computed_on(torch.device("meta"), kinds, *both) == ["meta", "meta"]
    assert computed_on(torch.device("meta"), crowded, *both) == ["cpu", "cpu"]
    assert computed_on(torch.device("mps"), kinds, *both) == ["cpu", "cpu"]
    with pytest.raises(RuntimeError, match="another error"):
        computed_on(torch.device("meta"), lambda *_: (_ for _ in ()).throw(RuntimeError("another error")), *both)


def test_features_that_do_not_fit_into_memory_are_refused_before_they_are_computed(monkeypatch) -> None:
    monkeypatch.setattr("sslcli.evaluation.features.available_memory", lambda: 23 * 8 * 4 - 1)
    assert run(Net(), torch.arange(22)).shape == (22, 8)
    with pytest.raises(ConfigError, match=r"features of 23 images with 8 values each take 0.0 GiB, but .*crop_scale"):
        run(Net(), torch.arange(23))
