"""Base class of adversarial methods: generator and discriminator losses, R1, and joint training by one backward pass.

Goodfellow et al. 2014  https://arxiv.org/abs/1406.2661
Mescheder et al. 2018 (R1)  https://arxiv.org/abs/1801.04406   Karras et al. 2020 (lazy)  https://arxiv.org/abs/1912.04958
conf/method/bigan.yaml  conf/method/dcgan.yaml

Shapes: N images per process, C channels, S image side in pixels, K logits per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, all_reduce_mean
from sslcli.methods.base import Method
from sslcli.nn.decoder import Decoder, FirstLook
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise

LOSSES = ("logistic", "hinge")
PRIORS = ("normal", "uniform")
PICTURE_SEED = 0  # seed of the codes of saved samples; it is fixed to make the samples of different epochs comparable
SAMPLE_ROWS = 4
SQUARES = 4  # regions per side: `distance` compares the means of SQUARES x SQUARES image regions


def discriminator_loss(real: Tensor, fake: Tensor, *, kind: str) -> Tensor:
    """Return the discriminator loss for logits (N, K) of real and generated inputs: summed over K, mean over N.

    N is the number of inputs, and K is the number of logits that the discriminator computes for each input.

    kind="logistic": -log sigmoid(real) - log(1 - sigmoid(fake)) (Goodfellow et al., eq. 1). If all logits are 0, the
    loss is 2 K log 2.
    kind="hinge": relu(1 - real) + relu(1 + fake) (Miyato et al. 2018, arXiv:1802.05957, eq. 16).
    """
    real, fake = full_precision(real), full_precision(fake)
    if kind == "hinge":
        return (F.relu(1 - real) + F.relu(1 + fake)).sum(1).mean()
    return (F.softplus(-real) + F.softplus(fake)).sum(1).mean()


def generator_loss(fake: Tensor, *, kind: str) -> Tensor:
    """Return the generator loss for the discriminator's logits (N, K) of generated inputs: summed over K, mean over N.

    N is the number of inputs, and K is the number of logits that the discriminator computes for each input.

    kind="logistic": -log sigmoid(fake), the non-saturating loss (Goodfellow et al., section 3).
    kind="hinge": -fake (Miyato et al., eq. 17).

    To compute the loss of an encoder (BiGAN), pass the negated logits of the pairs (image, encoder's code). The loss is
    low if the discriminator classifies these pairs as generated.
    """
    fake = full_precision(fake)
    return -fake.sum(1).mean() if kind == "hinge" else F.softplus(-fake).sum(1).mean()


def call_on_buffer_copies(module: nn.Module, *inputs: Tensor, learn: bool = False) -> Any:
    """Call `module(*inputs)` on copies of the module's buffers.

    The buffers of the module therefore do not change: the running statistics of BatchNorm, and the singular vectors of
    spectral normalization. If `learn` is False, the parameters are detached, and only the inputs receive a gradient.
    """
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if not learn:
        state |= {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, state, inputs)


def gradient_penalty(discriminate: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the R1 penalty: half the squared norm of d logits / d images, mean over images.

    `images` are (N, C, S, S), or any other inputs (N, ...) of the discriminator.
    """
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):
        logits = full_precision(discriminate(images))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean() / 2


@torch.no_grad()
def distance(drawn: Tensor, images: Tensor) -> Tensor:
    """Return the energy distance between generated and real images (N, C, S, S) of all processes.

    The distance is 2 E|x - y| - E|x - x'| - E|y - y'| over pairs of different images (Szekely and Rizzo 2013,
    doi:10.1016/j.jspi.2013.03.018). x and x' are generated images, y and y' are real images. All are average-pooled to
    4 x 4. The distance is divided by the square root of the number of values of x, so that it has the scale of pixel
    values. The estimate is unbiased: for equal distributions, its expectation is 0, and single estimates can be
    slightly negative. Each process compares its own images with the images of all processes.
    """
    x, y = (F.adaptive_avg_pool2d(full_precision(part), SQUARES).flatten(1) for part in (images, drawn))
    all_x, all_y = all_gather(x), all_gather(y)

    def lengths(a: Tensor, b: Tensor) -> Tensor:
        # In this mode, the distance of an image to itself is exactly 0.
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    pairs = max(len(x) * (len(all_x) - 1), 1)
    within = (lengths(x, all_x).sum() + lengths(y, all_y).sum()) / pairs
    return all_reduce_mean((2 * lengths(x, all_y).mean() - within) / math.sqrt(x.shape[1]))


def decoder_generator(dim: int, *, image_size: int, channels: int, width: int) -> nn.Module:
    """Build a generator (N, dim) -> (N, channels, image_size, image_size) with values in [-1, 1], see `Decoder`."""
    return nn.Sequential(Decoder(dim, image_size=image_size, channels=channels, width=width), nn.Tanh())


class Game(Method):
    """Base class of methods that train a generator against a discriminator. Subclasses define the discriminator.

    The generator and the discriminator are called the players. The loss of the method is the sum of the losses of both
    players. The loss of each player treats the parameters of the other player as constants. One backward pass of the
    sum therefore gives each player the gradient of its own loss. Real and generated images are in [0, 1]
    (views.normalize=false). The first step raises ConfigError if real images are outside this range.

    Args:
        generator: module that maps codes (N, dim) to images (N, C, S, S) with values in [-1, 1].
        image_size: image side S in pixels.
        channels: image channels C.
        dim: size of the generator's input code.
        prior: distribution of the values of a code: normal (mean 0, variance 1) or uniform (in [-1, 1]).
        loss: logistic or hinge.
        r1: weight of the R1 penalty, at least 0; 0 disables the penalty.
        r1_every: number of steps between two R1 penalties. Each penalty is multiplied by this number (lazy
            regularization).
        discriminator_lr: learning rate of the discriminator, as a positive multiple of the learning rate of all other
            parameters.

    Raises ValueError if an argument is out of range.
    """

    num_views = 1
    supports_block_wrapping = False
    discriminator_parts: tuple[str, ...]  # attribute names of the discriminator's modules

    def __init__(
        self,
        backbone: nn.Module,
        *,
        generator: nn.Module,
        image_size: int,
        channels: int,
        dim: int,
        prior: str,
        loss: str,
        r1: float,
        r1_every: int,
        discriminator_lr: float,
    ) -> None:
        super().__init__(backbone)
        check_values(prior=prior, loss=loss, r1=r1, r1_every=r1_every, discriminator_lr=discriminator_lr)
        self.generator = generator
        self.noise = Noise()
        self.first_look, self.dim, self.prior = FirstLook((channels, image_size, image_size)), dim, prior
        self.loss, self.r1, self.r1_every, self.discriminator_lr = loss, r1, r1_every, discriminator_lr
        self.differentiates_twice = r1 > 0
        self.steps = 0

    def check_views(self, views: list[Tensor]) -> None:
        self.first_look(views[0])

    def codes(self, images: Tensor) -> Tensor:
        """Draw one code per image from the prior. The codes (N, dim) use new random numbers in each call."""
        draw = self.noise.uniform if self.prior == "uniform" else self.noise.normal
        codes = draw(len(images), self.dim, device=images.device).to(images.dtype)
        return 2 * codes - 1 if self.prior == "uniform" else codes

    def penalty(self, discriminate: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
        """Return {"r1": weighted R1 penalty}, or {} if R1 is disabled.

        The penalty is computed only in every `r1_every`-th step. In all other steps, the value is 0.
        """
        if not self.r1:
            return {}
        if self.steps % self.r1_every:
            return {"r1": images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))}
        return {"r1": self.r1 * self.r1_every * gradient_penalty(discriminate, images)}

    def after_step(self, progress: float) -> None:
        self.steps += 1

    def param_groups(self) -> list[dict[str, Any]]:
        """Return two parameter groups for the discriminator, and two for all other networks.

        One group of each pair contains the biases and norm parameters. This group has no weight decay.
        """
        others = [name for name, _ in self.named_children() if name not in self.discriminator_parts]
        return [
            *groups_of((self.get_submodule(name) for name in self.discriminator_parts), self.discriminator_lr),
            *groups_of((self.get_submodule(name) for name in others), 1.0),
        ]

    def samples(self, generator: nn.Module, images: Tensor) -> list[Tensor]:
        """Return a list of `SAMPLE_ROWS` tensors of generated images, one for each row of a picture.

        Each tensor has the shape of `images`, (n, C, S, S). The codes are the same in each call.
        """
        numbers = torch.Generator().manual_seed(PICTURE_SEED)
        size = (SAMPLE_ROWS * len(images), self.dim)
        uniform = self.prior == "uniform"
        codes = 2 * torch.rand(size, generator=numbers) - 1 if uniform else torch.randn(size, generator=numbers)
        return list(pixels(generator(codes.to(images))).chunk(SAMPLE_ROWS))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def pixels(drawn: Tensor) -> Tensor:
    """Map the generator's output from [-1, 1] to pixel values in [0, 1]."""
    return (drawn + 1) / 2


def groups_of(parts: Iterable[nn.Module], lr_scale: float) -> list[dict[str, Any]]:
    """Return the trainable parameters of `parts` as two optimizer groups. Empty groups are left out.

    `parts` are the modules of one player: of the discriminator, or of the networks that it plays against. The second
    group contains the biases and norm parameters. `lr_scale` is the factor for the learning rate.
    """
    trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr_scale": lr_scale, "adapt": True},
        {"params": plain, "lr_scale": lr_scale, "adapt": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_values(*, prior: str, loss: str, r1: float, r1_every: int, discriminator_lr: float) -> None:
    """Raise ValueError if the prior or the loss is unknown or a number is out of range."""
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}, but it must be one of {', '.join(PRIORS)}")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, but it must be one of {', '.join(LOSSES)}")
    if not 0 <= r1 < math.inf:
        raise ValueError(f"r1 is {r1}, but the weight of a penalty must be at least 0 (0 disables it)")
    if not isinstance(r1_every, int) or r1_every < 1:
        raise ValueError(f"r1_every is {r1_every!r}, but it must be an integer of at least 1")
    if not 0 < discriminator_lr < math.inf:
        raise ValueError(
            f"discriminator_lr is {discriminator_lr}, but it multiplies the learning rate of the discriminator, "
            "so it must be positive (1 is that of the generator)"
        )
