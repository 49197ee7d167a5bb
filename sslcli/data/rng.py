"""Stateless random numbers: pure functions of integer keys.

A random number is a 64-bit hash of integer keys: the seed, the epoch and repetition, the position of the image, the
view and the operation. No random generator with a state is used. Therefore the numbers do not depend on the number of
workers or processes, the split into batches, the device, or interruptions of the run. The numbers of a whole batch are
drawn with a few tensor operations.

The hash is the finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), chained over the keys. It is not cryptographic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLY_2 = 0x94D049BB133111EB - (1 << 64)


def _avalanche(x: Tensor) -> Tensor:
    """Bijection of int64 in which each input bit flips about half of the output bits."""
    # The hash is defined with logical shifts. On int64, >> copies the sign bit. The masks remove these copies.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MULTIPLY_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MULTIPLY_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mix(*keys: int | Tensor) -> Tensor:
    """Hash keys to one int64 tensor. The result depends on the order and the number of the keys.

    Args:
        keys: one or more keys, each an integer in [-2**63, 2**63) or an integer tensor. Tensors are broadcast together.

    Returns:
        int64 tensor of the broadcast shape (0-d if all keys are ints), on the device of the tensors. If two calls
        differ only in the last key, their results always differ.

    Raises:
        ValueError: there is no key, or a key is not an integer in the range.
    """
    if not keys:
        raise ValueError("mix() got no keys: pass at least one integer, such as the seed")
    state: Tensor | int = 0
    for key in keys:
        if isinstance(key, Tensor):
            if key.is_floating_point() or key.is_complex():
                raise ValueError(f"mix() got a key of dtype {key.dtype}, but keys must be integers")
            key = key.long()
        elif isinstance(key, int) and -(1 << 63) <= key < 1 << 63:
            key = torch.tensor(key, dtype=torch.int64)
        else:
            raise ValueError(f"mix() got the key {key!r}, but keys must be integers in [-2**63, 2**63)")
        state = _avalanche((state + _GOLDEN) ^ key)
    assert isinstance(state, Tensor)
    return state


def uniform(key: Tensor, stream: int | Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw independent uniform numbers, one per key.

    Args:
        key: int64 of any shape, usually from `mix`.
        stream: number of the draw for this key. Use a different number for each purpose. A tensor is broadcast with
            `key`. One call with many streams takes little more time than a call with one stream.
        low, high: the range of the numbers, low <= high.

    Returns:
        float32 of the broadcast shape, in [low, high) on a grid of 2**24 values. If low == high, all values are `low`.

    Raises:
        ValueError: low > high.
    """
    if not low <= high:
        raise ValueError(f"uniform() got low={low} and high={high}, but low must not exceed high")
    fraction = ((mix(key, stream) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    if low == 0.0 and high == 1.0:
        return fraction
    values = fraction * (high - low) + low
    # Rounding may give `high`, which is not in the interval.
    top = torch.nextafter(torch.tensor(high, dtype=torch.float32), torch.tensor(low, dtype=torch.float32))
    return values.clamp(min=low, max=float(top))


def permutation(n: int, *keys: int) -> Tensor:
    """Return a random permutation of range(n) that is a pure function of the keys.

    Args:
        n: length of the permutation, at least 0.
        keys: at least one integer, such as the seed and the epoch.

    Returns:
        (n,) int64, on the CPU.

    Raises:
        ValueError: n < 0, or there are no keys.
    """
    if n < 0:
        raise ValueError(f"permutation() got n={n}, but n must be at least 0")
    # All hashes are different (see mix), so the sort has no ties.
    return torch.argsort(mix(mix(*keys), torch.arange(n, dtype=torch.int64)))
