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
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import rank, world_size
from sslcli.distributed.devices import copy_to

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

    Each call of `normal`, `uniform`, `integers`, `permutation` or `shared` is one draw. All processes must make the
    same calls in the same order. The results of the first four have one row for each of the N images of this process.
    They are equal on all devices, except for the rounding of `normal`.

    Attributes:
        count: scalar int64 tensor, the number of draws of `normal`, `uniform` and `integers`. It is on the device, so
            that a compiled step need not be compiled again when the number changes.
        shared_count: scalar int64 tensor on the CPU, the number of draws of `permutation` and `shared`.
    """

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seed = int(torch.randint(2**31, ()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.shared_count = torch.zeros((), dtype=torch.int64, device="cpu")

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
        return self._draw("normal", shape, device)

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Draw uniform numbers in [0, 1) with `shape` (N, ...), float32, for the N images of this process.

        The numbers are multiples of 2^-24. They are different for each image of the global batch.
        """
        return self._draw("uniform", shape, device)

    def integers(self, high: int, *shape: int, device: torch.device) -> Tensor:
        """Draw uniform integers in [0, high) with `shape` (N, ...), int64, for the N images of this process.

        `high` is at most 2^31. The numbers are drawn independently for each image of the global batch.
        """
        assert 0 < high <= 1 << 31
        return self._draw("integers", shape, device, high)

    def permutation(self, num_images: int, *, device: torch.device) -> Tensor:
        """Draw a permutation of the N * W images of the global batch, and return the entries of this process, (N,).

        N is `num_images`. The entries are int64 numbers in [0, N * W).
        """
        self.shared_count += 1
        draw = _permuted_uncompiled if torch.compiler.is_compiling() else _permuted
        first = rank() * num_images
        return draw(self.shared_count, self.seed, num_images * world_size(), first, first + num_images, device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def shared(self) -> torch.Generator:
        """Return a CPU generator with the same seed on all processes, e.g. to draw one number for the global batch.

        torch.compile does not compile this function, and starts a new graph after it.
        """
        self.shared_count += 1
        return _shared_generator(self.seed, int(self.shared_count))

    def position(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of draws so far, for `set_position`. The host does not wait for the device."""
        return self.count.clone(), self.shared_count.clone()

    def set_position(self, position: tuple[Tensor, Tensor]) -> None:
        """Repeat the random numbers that followed when `position` returned this value."""
        self.count.copy_(position[0])
        self.shared_count.copy_(position[1])

    def _draw(self, kind: str, shape: tuple[int, ...], device: torch.device, high: int = 0) -> Tensor:
        """Return the numbers of the next draw, see `_drawn`."""
        self.count += 1
        draw = _drawn_uncompiled if torch.compiler.is_compiling() else _drawn
        return draw(self.count, self.seed, kind, high, rank() * shape[0], shape, device)

    def get_extra_state(self) -> Tensor:
        # Versions up to 0.2 counted all draws together, and their checkpoints must have the same shape. Therefore one
        # number contains both counts. In a state of these versions, its upper half is 0.
        return torch.tensor([self.seed, self.draws + (int(self.shared_count) + 1 << 32)])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, counts = state.tolist()
        self.draws = counts % (1 << 32)
        self.shared_count.fill_((counts >> 32) - 1 if counts >> 32 else self.draws)


def _drawn(
    count: Tensor, seed: int, kind: str, high: int, first: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Hash the indices of all numbers of one draw, and convert them to numbers with `shape` (N, ...).

    N * W is at most 2^31, and E, the product of the other numbers of `shape`, is at most 2^32.

    Args:
        count: number of this draw, see `Noise.count`.
        seed: seed of the generator.
        kind: "normal", "uniform" or "integers".
        high: upper limit of the integers.
        first: index of the first image of this process in the global batch.
        shape: shape of the result.
        device: device of the result.
    """
    key = count * _signed(_DRAW) + _signed(_hash(seed))
    image = torch.arange(first, first + shape[0], device=device) << 32
    number = torch.arange(math.prod(shape[1:]), device=device)
    block = max(1, CPU_BLOCK // max(1, len(number))) if device.type == "cpu" else max(1, shape[0])
    results = []
    for images in torch.split(image[:, None], block):
        # Without the second key, two draws whose keys differ by a small multiple of _GOLDEN would have many equal
        # numbers.
        x = (images + number).mul_(_signed(_GOLDEN)).add_(key)
        x = _shifted(x, 30).mul_(_signed(_MULTIPLY_1)).add_(key)
        bits = _shifted(x, 27).mul_(_signed(_MULTIPLY_2))
        results.append(_integers(bits, high) if kind == "integers" else _CONVERSIONS[kind](bits))
    return (torch.cat(results) if len(results) > 1 else results[0]).view(shape)


# Compiled code must not contain the operations of a draw: it would repeat them in the backward pass, after `count` has
# changed. The results of an operator that torch.compile does not know are stored for the backward pass.
@torch.library.custom_op("sslcli::drawn", mutates_args=())
def _drawn_uncompiled(
    count: Tensor, seed: int, kind: str, high: int, first: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    return _drawn(count, seed, kind, high, first, shape, device)


@_drawn_uncompiled.register_fake
def _(count: Tensor, seed: int, kind: str, high: int, first: int, shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int64 if kind == "integers" else torch.float32, device=device)


def _permuted(count: Tensor, seed: int, total: int, first: int, end: int, device: torch.device) -> Tensor:
    """Return the entries from `first` to `end` of the permutation of range(`total`) that is draw number `count`."""
    order = torch.randperm(total, generator=_shared_generator(seed, int(count)))
    return copy_to(device, order[first:end].clone())  # the result of an operator must own its memory


@torch.library.custom_op("sslcli::permuted", mutates_args=())
def _permuted_uncompiled(count: Tensor, seed: int, total: int, first: int, end: int, device: torch.device) -> Tensor:
    return _permuted(count, seed, total, first, end, device)


@_permuted_uncompiled.register_fake
def _(count: Tensor, seed: int, total: int, first: int, end: int, device: torch.device) -> Tensor:
    return torch.empty(end - first, dtype=torch.int64, device=device)


def _shared_generator(seed: int, count: int) -> torch.Generator:
    """Return the CPU generator of a draw with the same numbers on all processes."""
    return torch.Generator().manual_seed(_hash(seed, count, _SHARED) >> 1)  # manual_seed: 63 bits


def _integers(bits: Tensor, high: int) -> Tensor:
    """Convert hashes to uniform integers in [0, `high`)."""
    return ((bits >> 32) & 0xFFFFFFFF).mul_(high) >> 32


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


_CONVERSIONS = {"uniform": _uniform, "normal": _normal}


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
