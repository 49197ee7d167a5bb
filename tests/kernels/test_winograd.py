"""Winograd convolutions equal those of torch in values, gradients and second gradients; and where they are used."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from platforms import needs_avx2
from sslcli.backbones.resnet import ResNet
from sslcli.kernels import winograd, winograd_passes, winograd_transforms
from sslcli.kernels.winograd import Convolution, WinogradConv2d, use_winograd
from sslcli.runs.build import accelerate

SHAPES = [  # images, channels in and out, height, width
    (3, 4, 5, 8, 8),
    (2, 3, 3, 4, 12),
    (2, 5, 4, 7, 7),
    (1, 2, 6, 9, 14),
    (4, 3, 2, 3, 5),
    (2, 2, 2, 1, 2),
]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = True) -> tuple[Tensor, Tensor]:
    """Images and a weight."""
    n, channels, out_channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(n, channels, height, width, dtype=dtype, generator=generator),
        torch.randn(out_channels, channels, 3, 3, dtype=dtype, generator=generator) / channels**0.5,
    )
    if last:
        tensors = (tensors[0].to(memory_format=torch.channels_last), tensors[1].to(memory_format=torch.channels_last))
    return tensors[0].requires_grad_(), tensors[1].requires_grad_()


def with_gradients(convolve: object, images: Tensor, weight: Tensor) -> list[Tensor]:
    out = convolve(images, weight)  # type: ignore[operator]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, (images, weight), direction)]


def plain(images: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(images, weight, padding=1)


LINES = [  # the same, with channels that fill cache lines, as the compiled passes need
    (3, 64, 32, 8, 8),
    (2, 16, 48, 7, 10),
    (5, 32, 16, 33, 5),
    (1, 48, 112, 4, 4),
    (40, 16, 16, 9, 12),
    (9, 144, 128, 5, 8),
]


@pytest.fixture(params=[pytest.param("compiled", marks=needs_avx2), "operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute. sslcli has to be installed with a C compiler for its tests."""
    if request.param == "operations":
        monkeypatch.setattr(winograd_passes, "library", lambda: None)
    assert (winograd_passes.library() is not None) == (request.param == "compiled")
    return str(request.param)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_in_float64(shape: tuple[int, ...], last: bool) -> None:
    images, weight = drawn(shape, torch.float64, last=last)
    expected = with_gradients(plain, images, weight)
    for value, wanted in zip(with_gradients(Convolution.apply, images, weight), expected, strict=True):
        assert value.shape == wanted.shape
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [*LINES, (64, 64, 64, 8, 8), (70, 512, 512, 4, 4)], ids=str)
def test_a_float32_result_is_far_nearer_than_bfloat16(shape: tuple[int, ...], way: str) -> None:
    """The error is a few times that of a plain convolution; a format of 8 bits has 4e-3."""
    images, weight = drawn(shape, torch.float32)
    exact = with_gradients(plain, images.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    for value, wanted in zip(with_gradients(Convolution.apply, images, weight), exact, strict=True):
        assert (value.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_gradients_of_gradients() -> None:
    images, weight = drawn((2, 2, 3, 5, 4), torch.float64)
    assert torch.autograd.gradcheck(Convolution.apply, (images, weight))
    assert torch.autograd.gradgradcheck(Convolution.apply, (images, weight))


def test_the_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    images, weight = drawn((7, 4, 4, 8, 8), torch.float64)
    whole = with_gradients(Convolution.apply, images, weight)
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 1)
    assert len(winograd.chunks(images.permute(0, 2, 3, 1), torch.empty(0))) == 7
    for value, wanted in zip(with_gradients(Convolution.apply, images, weight), whole, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


@needs_avx2
@pytest.mark.parametrize("shape", [(3, 16, 5, 7), (2, 64, 32, 32), (30, 48, 4, 6), (1, 16, 1, 1)], ids=str)
def test_the_compiled_transforms_have_the_bits_of_the_operations(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = torch.randn(shape[0], *shape[2:], shape[1], generator=torch.Generator().manual_seed(0))
    results = torch.randn(36, math.prod(winograd_transforms.tiles(maps)), shape[1])

    def found() -> list[Tensor]:
        out = torch.full_like(maps, torch.nan)
        winograd_transforms.from_points(results, out)
        return [winograd_transforms.to_points(maps), winograd_transforms.gradient_points(maps), out]

    assert winograd_passes.library() is not None
    compiled = found()
    monkeypatch.setattr(winograd_passes, "library", lambda: None)
    for one, other in zip(compiled, found(), strict=True):
        assert torch.equal(one, other)


def test_any_number_of_threads() -> None:
    """Maps are the same bits; the sum over tiles, of which each thread has its own, is the same within rounding."""
    images, weight = drawn((9, 64, 32, 12, 8), torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 70):  # of which some have no tile
            torch.set_num_threads(threads)
            found.append(with_gradients(Convolution.apply, images, weight))
    finally:
        torch.set_num_threads(before)
    for maps, of_images, of_weight in found[1:]:
        assert torch.equal(maps, found[0][0])
        assert torch.equal(of_images, found[0][1])
        torch.testing.assert_close(of_weight, found[0][2], rtol=1e-4, atol=1e-4)


def test_twice_the_same_bits(way: str) -> None:
    images, weight = drawn((16, 64, 64, 8, 8), torch.float32)
    first, second = (with_gradients(Convolution.apply, images, weight) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_only_gradients_that_are_wanted() -> None:
    images, weight = drawn((2, 3, 3, 4, 4), torch.float64)
    out = Convolution.apply(images.detach(), weight)
    out.sum().backward()
    assert images.grad is None
    assert weight.grad is not None


def test_a_module_is_the_one_that_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Winograd path is used only where it is faster; names, parameters and results do not change."""
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=True)
    names = list(conv.state_dict())
    use_winograd(conv)
    assert isinstance(conv, WinogradConv2d)
    assert list(conv.state_dict()) == names
    taken: list[object] = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: taken.append(given) or convolve(*given))

    def calls(images: Tensor) -> int:
        taken.clear()
        with torch.no_grad():
            out = conv(images)
            plain = F.conv2d(images, conv.weight, conv.bias, padding=1)
        assert (out - plain).norm() < 1e-5 * plain.norm()
        return len(taken)

    images = torch.randn(16, 64, 8, 8)
    assert calls(images) == 1
    assert calls(images[:, :, :7, :7]) == 1  # 1.3 times as many numbers in whole tiles
    assert calls(images[:, :, :5, :5]) == 0  # 2.6 times
    assert calls(images[:2]) == 0  # 8 tiles
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(images) == 0


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 3, padding="same"),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ConvTranspose2d(64, 64, 3, padding=1),
    ],
    ids=str,
)
def test_other_convolutions_stay(conv: nn.Module) -> None:
    kind = type(conv)
    use_winograd(conv)
    assert type(conv) is kind


def test_what_the_commands_train_has_them() -> None:
    net = accelerate(ResNet("resnet18", image_size=32))
    assert sum(isinstance(module, WinogradConv2d) for module in net.modules()) == 13


def test_a_network_computes_what_it_did(way: str) -> None:
    """Features are four times as far from float64 as plain float32's, gradients a few times: a ReLU more turns over."""
    torch.manual_seed(0)
    net = ResNet("resnet18", image_size=32).train()
    images = torch.randn(16, 3, 32, 32)

    def found(dtype: torch.dtype) -> list[Tensor]:
        features = net.to(dtype)(images.to(dtype))
        gradients = torch.autograd.grad(features.square().mean(), list(net.parameters()))
        return [features.detach().double(), torch.cat([gradient.flatten() for gradient in gradients]).double()]

    exact = found(torch.float64)
    use_winograd(net)
    fast = found(torch.float32)
    assert (fast[0] - exact[0]).norm() < 2e-5 * exact[0].norm()
    assert (fast[1] - exact[1]).norm() < 3e-2 * exact[1].norm()
