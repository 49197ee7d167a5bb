from __future__ import annotations

import pytest
import torch
from torch import nn

from sslcli.nn.conditional_gan import ConditionalDiscriminator, ConditionalGenerator


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("image_size", [16, 28, 32, 64, 100])
def test_images_of_any_side_are_generated_and_scored(image_size: int) -> None:
    generator = ConditionalGenerator(5, image_size=image_size, channels=1, width=16)
    images = generator(randn(4, 5))
    assert images.shape == (4, 1, image_size, image_size)
    net = ConditionalDiscriminator(5, image_size=image_size, channels=1, width=2)
    assert net(images, randn(4, 5)).shape == (4, 1)


def test_at_64_pixels_the_networks_have_the_shapes_of_the_official_code() -> None:
    with torch.device("meta"):
        generator = ConditionalGenerator(200, image_size=64, width=512)
        discriminator = ConditionalDiscriminator(200, image_size=64, width=64)
    found = {name: tuple(parameter.shape) for name, parameter in generator.named_parameters()}
    # deconvnet_64 with size 64: 4 x 4 maps of 512 channels, BatchNorm by value, then 256, 128 and 64 channels.
    assert found["spread.weight"] == (512 * 4 * 4, 200)
    assert found["start.0.weight"] == (512 * 4 * 4,)
    assert [found[f"layers.{n}.convolution.weight"] for n in range(3)] == [
        (512, 256, 5, 5),
        (256, 128, 5, 5),
        (128, 64, 5, 5),
    ]
    assert [found[f"layers.{n}.of_code.weight"] for n in range(3)] == [(256, 200), (128, 200), (64, 200)]
    assert found["to_image.weight"] == (64, 3, 5, 5)
    found = {name: tuple(parameter.shape) for name, parameter in discriminator.named_parameters()}
    # convnet_64 with size 64: no code and no BatchNorm at the first convolution, and 4 x 4 maps at the end.
    assert found["first.0.weight"] == (64, 3, 5, 5)
    assert [found[f"layers.{n}.convolution.weight"][:2] for n in range(3)] == [(128, 64), (256, 128), (512, 256)]
    assert [found[f"layers.{n}.of_code.weight"] for n in range(3)] == [(128, 200), (256, 200), (512, 200)]
    assert found["to_logit.weight"] == (1, 512 * 4 * 4)
    biased = {name.rpartition(".")[0] for name in found if name.endswith("bias")}
    assert biased == {f"layers.{n}.normalize" for n in range(3)}


def test_weights_start_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    generator = ConditionalGenerator(50, image_size=32, width=64)
    discriminator = ConditionalDiscriminator(50, image_size=32, width=16)
    for name, weight in [*generator.named_parameters(), *discriminator.named_parameters()]:
        if "of_code" in name:
            assert float(weight.detach().std()) == pytest.approx(0.5, rel=0.1), name
        elif name == "to_logit.weight":
            assert not weight.any()
        elif weight.ndim > 1:
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert set(weight.tolist()) == {float(name.endswith("weight"))}, name
    assert not discriminator(randn(4, 3, 32, 32), randn(4, 50)).any()


def test_the_code_enters_at_every_convolution_but_the_first_of_the_discriminator() -> None:
    net = ConditionalDiscriminator(5, image_size=32, width=4)
    nn.init.normal_(net.to_logit.weight)
    images, codes = randn(6, 3, 32, 32), randn(6, 5).requires_grad_()
    assert len(net.layers) == 2
    for kept in range(2):
        with torch.no_grad():
            for number, layer in enumerate(net.layers):
                layer.of_code.weight.copy_(randn(*layer.of_code.weight.shape) if number == kept else 0)
        (gradient,) = torch.autograd.grad(net(images, codes).square().sum(), codes)
        assert gradient.any(), kept


def test_the_code_enters_at_every_convolution_but_the_last_of_the_generator() -> None:
    net = ConditionalGenerator(5, image_size=32, width=16)
    codes = randn(6, 5).requires_grad_()
    weights = [net.spread.weight, *(layer.of_code.weight for layer in net.layers)]
    assert len(weights) == 3
    for kept in range(3):
        with torch.no_grad():
            for number, weight in enumerate(weights):
                weight.copy_(randn(*weight.shape) if number == kept else 0)
        (gradient,) = torch.autograd.grad(net(codes).square().sum(), codes)
        assert gradient.any(), kept


def test_real_and_generated_pairs_are_normalized_separately() -> None:
    net = ConditionalDiscriminator(5, image_size=16, width=4)
    nn.init.normal_(net.to_logit.weight)
    images, codes = torch.rand(8, 3, 16, 16), randn(8, 5)
    both = net(images, codes)
    with torch.no_grad():
        changed = images.clone()
        changed[4:] = changed[4:] / 3
        assert torch.equal(net(changed, codes)[:4], both[:4])
        changed[0] = 1
        assert not torch.equal(net(changed, codes)[1:4], both[1:4])
    torch.testing.assert_close(both[:4], net.logits(2 * images[:4] - 1, codes[:4]))


def test_gradients_reach_every_parameter() -> None:
    generator, net = (
        ConditionalGenerator(5, image_size=32, width=8),
        ConditionalDiscriminator(5, image_size=32, width=4),
    )
    nn.init.normal_(net.to_logit.weight)
    codes = randn(8, 5)
    net(torch.tanh(generator(codes)), codes).square().sum().backward()
    for module in (generator, net):
        assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_impossible_values_are_refused() -> None:
    for kind in (ConditionalGenerator, ConditionalDiscriminator):
        with pytest.raises(ValueError, match=r"image_size is 15, .*at least 16 pixels"):
            kind(5, image_size=15)
        with pytest.raises(ValueError, match="dim is 0"):
            kind(0, image_size=32)
    with pytest.raises(ValueError, match=r"width is 6, .*multiple of 4"):
        ConditionalGenerator(5, image_size=32, width=6)
