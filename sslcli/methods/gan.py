"""What the adversarial methods share: the losses of both players, R1, and one backward that gives each its gradient.

Goodfellow et al. 2014  https://arxiv.org/abs/1406.2661
Mescheder et al. 2018 (R1)  https://arxiv.org/abs/1801.04406   Karras et al. 2020 (lazy)  https://arxiv.org/abs/1912.04958
conf/method/bigan.yaml  conf/method/dcgan.yaml

Shapes: N images a process, C channels, S their side in pixels, K logits an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.decoder import Decoder, FirstLook
from sslcli.distributed import all_gather, all_reduce_mean
from sslcli.methods.base import Method
from sslcli.nn import full_precision
from sslcli.noise import Noise

LOSSES = ("logistic", "hinge")
PICTURE_SEED = 0  # of the codes in pictures, so that those of two epochs can be compared
SAMPLE_ROWS = 4
SQUARES = 4  # a side, over which the distance between images looks at means


def discriminator_loss(real: Tensor, fake: Tensor, *, kind: str) -> Tensor:
    """What the discriminator pays for its logits (N, K): the sum over K of both halves, the mean over images.

    logistic is -log sigmoid(real) - log(1 - sigmoid(fake)) (Goodfellow et al., eq. 1), 2 K log 2 for logits of 0;
    hinge is relu(1 - real) + relu(1 + fake) (Miyato et al. 2018, arXiv:1802.05957, eq. 16).
    """
    real, fake = full_precision(real), full_precision(fake)
    if kind == "hinge":
        return (F.relu(1 - real) + F.relu(1 + fake)).sum(1).mean()
    return (F.softplus(-real) + F.softplus(fake)).sum(1).mean()


def deceiver_loss(fake: Tensor, *, kind: str) -> Tensor:
    """What a player pays whose pairs should pass for real, by their logits (N, K): the sum over K, the mean over N.

    logistic is -log sigmoid(fake), which does not saturate where the discriminator wins (Goodfellow et al., section 3);
    hinge is -fake (Miyato et al., eq. 17). Negated logits make it the loss of an encoder whose pairs should pass for
    generated ones.
    """
    fake = full_precision(fake)
    return -fake.sum(1).mean() if kind == "hinge" else F.softplus(-fake).sum(1).mean()


def aside(module: nn.Module, *inputs: Tensor, learn: bool = False) -> Any:
    """`module(*inputs)` on copies of its buffers: running statistics and singular vectors stay as they are.

    Unless `learn`, its parameters are constants: a gradient goes through it to the inputs alone.
    """
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if not learn:
        state |= {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, state, inputs)


def gradient_penalty(discriminate: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """R1: half the squared length of the gradient of the logits at real images (N, C, S, S), the mean over images."""
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):
        logits = full_precision(discriminate(images))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean() / 2


@torch.no_grad()
def distance(drawn: Tensor, images: Tensor) -> Tensor:
    """Energy distance between drawn and real images (N, C, S, S) of all processes, 0 for equal distributions.

    2 E|x - y| - E|x - x'| - E|y - y'| over different pairs (Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018),
    of the means over 4 x 4 squares of an image and per root of their number, so on the scale of the values of an image.
    Without bias, hence now and then below 0. Each process compares its own images with all.
    """
    x, y = (F.adaptive_avg_pool2d(full_precision(part), SQUARES).flatten(1) for part in (images, drawn))
    all_x, all_y = all_gather(x), all_gather(y)

    def lengths(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # exact: a row is 0 from itself

    pairs = max(len(x) * (len(all_x) - 1), 1)
    within = (lengths(x, all_x).sum() + lengths(y, all_y).sum()) / pairs
    return all_reduce_mean((2 * lengths(x, all_y).mean() - within) / math.sqrt(x.shape[1]))


class Game(Method):
    """A generator, and a discriminator that subclasses bring; the loss is the sum of what both players pay.

    Each player's loss sees the other's parameters as constants, so one backward of the sum gives each its own
    gradient. Images lie in [0, 1] (views.normalize=false), drawn ones too; the first step refuses others.

    Args:
        image_size: side S of the images in pixels.
        channels: C of the images.
        dim: size of the code the generator draws from.
        width: channels of the generator's smallest map.
        loss: logistic or hinge.
        r1: weight of R1, at least 0; 0 leaves it out.
        r1_every: steps between two penalties, each counted so many times.
        discriminator_lr: learning rate of the discriminator over that of the others, positive.

    Raises ValueError for values outside these.
    """

    num_views = 1
    by_block = False
    discriminator_parts: tuple[str, ...]  # names of the attributes that the discriminator is made of

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int,
        dim: int,
        width: int,
        loss: str,
        r1: float,
        r1_every: int,
        discriminator_lr: float,
    ) -> None:
        super().__init__(backbone)
        check_values(loss=loss, r1=r1, r1_every=r1_every, discriminator_lr=discriminator_lr)
        self.generator = nn.Sequential(Decoder(dim, image_size=image_size, channels=channels, width=width), nn.Tanh())
        self.noise = Noise()
        self.first_look, self.dim = FirstLook((channels, image_size, image_size)), dim
        self.loss, self.r1, self.r1_every, self.discriminator_lr = loss, r1, r1_every, discriminator_lr
        self.steps = 0

    def check_views(self, views: list[Tensor]) -> None:
        self.first_look(views[0])

    def codes(self, images: Tensor) -> Tensor:
        """One code from the prior for each of the images, (N, dim), as random as the step."""
        return self.noise.normal(len(images), self.dim, device=images.device).to(images.dtype)

    def penalty(self, discriminate: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
        """What R1 adds to the discriminator's loss in this step, by its name; nothing where it is left out."""
        if not self.r1:
            return {}
        if self.steps % self.r1_every:
            return {"r1": images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))}
        return {"r1": self.r1 * self.r1_every * gradient_penalty(discriminate, images)}

    def after_step(self, progress: float) -> None:
        self.steps += 1

    def param_groups(self) -> list[dict[str, Any]]:
        """Two groups a player: decayed parameters, and biases and norms, which are not."""
        others = [name for name, _ in self.named_children() if name not in self.discriminator_parts]
        return [
            *groups_of((self.get_submodule(name) for name in self.discriminator_parts), self.discriminator_lr),
            *groups_of((self.get_submodule(name) for name in others), 1.0),
        ]

    def samples(self, generator: nn.Module, images: Tensor) -> list[Tensor]:
        """Rows of drawn images, each (n, C, S, S) as the `images` are, of the same codes whenever asked."""
        numbers = torch.Generator().manual_seed(PICTURE_SEED)
        codes = torch.randn(SAMPLE_ROWS * len(images), self.dim, generator=numbers)
        return list(pixels(generator(codes.to(images))).chunk(SAMPLE_ROWS))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def pixels(drawn: Tensor) -> Tensor:
    """From the generator's [-1, 1] to the [0, 1] of images."""
    return (drawn + 1) / 2


def groups_of(parts: Iterable[nn.Module], lr_scale: float) -> list[dict[str, Any]]:
    """The trainable parameters of a player in groups for an optimizer, without empty ones."""
    trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr_scale": lr_scale, "adapt": True},
        {"params": plain, "lr_scale": lr_scale, "adapt": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_values(*, loss: str, r1: float, r1_every: int, discriminator_lr: float) -> None:
    """Raise ValueError unless there is such a loss and every number lies in its range."""
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, but it must be one of {', '.join(LOSSES)}")
    if not 0 <= r1 < math.inf:
        raise ValueError(f"r1 is {r1}, but the weight of a penalty must be at least 0 (0 leaves it out)")
    if not isinstance(r1_every, int) or r1_every < 1:
        raise ValueError(f"r1_every is {r1_every!r}, but it must be an integer of at least 1")
    if not 0 < discriminator_lr < math.inf:
        raise ValueError(
            f"discriminator_lr is {discriminator_lr}, but it multiplies the learning rate of the discriminator, "
            "so it must be positive (1 is that of the generator)"
        )
