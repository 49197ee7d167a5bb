"""Winograd's convolutions are those of torch: values, gradients, gradients of gradients, and where they are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli import winograd
from sslcli.backbones.resnet import ResNet
from sslcli.cli._build import made_fast
from sslcli.winograd import Convolution, WinogradConv2d, use_winograd

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
    made = (
        torch.randn(n, channels, height, width, dtype=dtype, generator=generator),
        torch.randn(out_channels, channels, 3, 3, dtype=dtype, generator=generator) / channels**0.5,
    )
    if last:
        made = (made[0].to(memory_format=torch.channels_last), made[1].to(memory_format=torch.channels_last))
    return made[0].requires_grad_(), made[1].requires_grad_()


def with_gradients(convolve: object, images: Tensor, weight: Tensor) -> list[Tensor]:
    out = convolve(images, weight)  # type: ignore[operator]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, (images, weight), direction)]


def plain(images: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(images, weight, padding=1)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_in_float64(shape: tuple[int, ...], last: bool) -> None:
    images, weight = drawn(shape, torch.float64, last=last)
    expected = with_gradients(plain, images, weight)
    for value, wanted in zip(with_gradients(Convolution.apply, images, weight), expected, strict=True):
        assert value.shape == wanted.shape
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)


def test_a_float32_result_is_far_nearer_than_bfloat16() -> None:
    """The error is a few times that of a plain convolution; a format of 8 bits has 4e-3."""
    images, weight = drawn((64, 64, 64, 8, 8), torch.float32)
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


def test_twice_the_same_bits() -> None:
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
    """Its path is taken where it pays, and nowhere else; names, parameters and results stay."""
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
    net = made_fast(ResNet("resnet18", image_size=32))
    assert sum(isinstance(module, WinogradConv2d) for module in net.modules()) == 13


def test_a_network_computes_what_it_did() -> None:
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
