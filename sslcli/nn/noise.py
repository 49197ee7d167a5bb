"""Random numbers for the images of a step. The numbers do not depend on the number of processes.

torch's global generator has a different state on each process. If methods used it, their results would depend on the
number of processes. In this module, a random number is a hash of the seed, the number of draws so far, the index of the
image in the global batch, and the index of the number within the image. No generator with a state is used, so the
numbers of all images are computed together, on the device and without waiting for it. The checkpoint contains the seed
and the number of draws.

The hash is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), with a
key of the draw that is added before each of its two rounds. It is not cryptographic.

Shapes: N images per process, W processes, E numbers per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import rank

_SHARED = -1  # replaces the index of the image if all processes draw identical numbers
_MASK = (1 << 64) - 1
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
_DRAW = 0xD1342543DE82EF95  # odd, so that all draws have different keys
CPU_BLOCK = 1 << 15  # numbers that are computed together on the CPU; their int64 hashes fit the CPU caches
_BITS = 24  # of a uniform number; float32 has no more


class Noise(nn.Module):
    """Random number generator that is part of a method's state.

    Its seed is drawn from torch's global generator when the method is built. At this time, the global generator has the
    same state on all processes.

    Each call of `normal`, `uniform`, `integers` or `shared` is one draw. All processes must make the same calls in the
    same order. The results of `normal`, `uniform` and `integers` have one row for each of the N images of this process.
    They are equal on all devices, except for the rounding of `normal`.

    Attributes:
        count: scalar int64 tensor, the number of draws of `normal`, `uniform` and `integers`. It is on the device, so
            that a compiled step need not be compiled again when the number changes.
        shared_draws: number of draws of `shared`.
    """

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seed = int(torch.randint(2**31, ()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.shared_draws = 0

    @property
    def draws(self) -> int:
        """Number of draws of `normal`, `uniform` and `integers`. Reading it waits for the device."""
        return int(self.count)

    @draws.setter
    def draws(self, value: int) -> None:
        self.count.fill_(value)

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        """Draw standard normal numbers with `shape` (N, ...), float32, for the N images of this process.

        The numbers are different for each image of the global batch. Their absolute values are at most 5.8.
        """
        return self._draw(_normal, shape, device)

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Draw uniform numbers in [0, 1) with `shape` (N, ...), float32, for the N images of this process.

        The numbers are multiples of 2^-24. They are different for each image of the global batch.
        """
        return self._draw(_uniform, shape, device)

    def integers(self, high: int, *shape: int, device: torch.device) -> Tensor:
        """Draw uniform integers in [0, high) with `shape` (N, ...), int64, for the N images of this process.

        `high` is at most 2^31. The numbers are drawn independently for each image of the global batch.
        """
        assert 0 < high <= 1 << 31
        return self._draw(lambda bits: ((bits >> 32) & 0xFFFFFFFF).mul_(high) >> 32, shape, device)

    def shared(self) -> torch.Generator:
        """Return a CPU generator with the same seed on all processes, e.g. to draw one number for the global batch."""
        self.shared_draws += 1
        return torch.Generator().manual_seed(_hash(self.seed, self.shared_draws, _SHARED) >> 1)  # manual_seed: 63 bits

    def position(self) -> tuple[Tensor, int]:
        """Return the numbers of draws so far, for `set_position`. The host does not wait for the device."""
        return self.count.clone(), self.shared_draws

    def set_position(self, position: tuple[Tensor, int]) -> None:
        """Repeat the random numbers that followed when `position` returned this value."""
        self.count.copy_(position[0])
        self.shared_draws = position[1]

    def _draw(self, convert: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Hash the indices of all numbers of one draw, and return the results of `convert` with `shape` (N, ...).

        `convert` gets int64 hashes, of which the 40 highest bits are random, and returns a tensor of the same shape.
        N * W is at most 2^31, and E, the product of the other numbers of `shape`, is at most 2^32.
        """
        self.count += 1
        key = self.count * _signed(_DRAW) + _signed(_hash(self.seed))
        first, num_images = rank() * shape[0], shape[0]
        # Without the shift, torch.compile would multiply the indices by constants symbolically, and overflow.
        image = torch.arange(first, first + num_images, device=device) << 32
        number = torch.arange(math.prod(shape[1:]), device=device)
        block = max(1, CPU_BLOCK // max(1, len(number))) if device.type == "cpu" else max(1, num_images)
        results = []
        for images in torch.split(image[:, None], block):
            # Without the second key, two draws whose keys differ by a small multiple of _GOLDEN would have many equal
            # numbers.
            x = (images + number).mul_(_signed(_GOLDEN)).add_(key)
            x = _shifted(x, 30).mul_(_signed(_MULTIPLY_1)).add_(key)
            results.append(convert(_shifted(x, 27).mul_(_signed(_MULTIPLY_2))))
        return (torch.cat(results) if len(results) > 1 else results[0]).view(shape)

    def get_extra_state(self) -> Tensor:
        # Versions up to 0.2 counted all draws together, and their checkpoints must have the same shape. Therefore one
        # number contains both counts. In a state of these versions, its upper half is 0.
        return torch.tensor([self.seed, self.draws + (self.shared_draws + 1 << 32)])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, counts = state.tolist()
        self.draws = counts % (1 << 32)
        self.shared_draws = (counts >> 32) - 1 if counts >> 32 else self.draws


def _uniform(bits: Tensor) -> Tensor:
    """Convert hashes to uniform numbers in [0, 1)."""
    return _fraction(bits >> (64 - _BITS))


def _normal(bits: Tensor) -> Tensor:
    """Convert hashes to standard normal numbers with the Box-Muller transform.

    The highest bits determine the radius. The lowest bits determine the angle, after the last step of splitmix64, which
    changes only them.
    """
    radius = _fraction(bits >> (64 - _BITS), -1.0).log1p_().mul_(-2).sqrt_()
    return radius.mul_(_fraction((bits >> 31) ^ bits, 2 * math.pi).cos_())


def _fraction(bits: Tensor, high: float = 1.0) -> Tensor:
    """Return float32 numbers from 0 up to, but not including, `high`, from the lowest `_BITS` bits of each number."""
    return (bits & ((1 << _BITS) - 1)).mul(high / (1 << _BITS)).float()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return x ^ (x >> bits) for a logical shift. On int64, >> copies the sign bit; the mask removes these copies."""
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def _signed(value: int) -> int:
    """Return the integer in [-2^63, 2^63) that has the same 64 bits as `value` in [0, 2^64)."""
    return value - (1 << 64) if value >> 63 else value


def _hash(*parts: int) -> int:
    """Return the splitmix64 hash of integers, in [0, 2^64)."""
    value = 0
    for part in parts:
        value = (value + part + _GOLDEN) & _MASK
        value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK
        value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK
        value ^= value >> 31
    return value
