"""Random numbers for the images of a step. The numbers do not depend on the number of processes.

torch's global generator has a different state on each process. If methods used it, their results would depend on the
number of processes. In this module, the random numbers of an image depend only on the seed, the number of draws so far,
and the index of the image in the global batch. The checkpoint contains the seed and the number of draws.

Shapes: N images per process, W processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import rank

_SHARED = -1  # replaces the index of the image if all processes draw identical numbers
_MASK = (1 << 64) - 1


class Noise(nn.Module):
    """Random number generator that is part of a method's state.

    Its seed is drawn from torch's global generator when the method is built. At this time, the global generator has the
    same state on all processes.

    Each call of `normal`, `uniform`, `integers` or `shared` is one draw. All processes must make the same calls in the
    same order. The results of `normal`, `uniform` and `integers` have one row for each of the N images of this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed = int(torch.randint(2**31, ()))
        self.draws = 0

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        """Draw standard normal numbers with `shape` (N, ...), float32, for the N images of this process.

        The numbers are different for each image of the global batch.
        """
        return self._rows(shape, device, lambda row, generator: row.normal_(generator=generator))

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Draw uniform numbers in [0, 1) with `shape` (N, ...), float32, for the N images of this process.

        The numbers are different for each image of the global batch.
        """
        return self._rows(shape, device, lambda row, generator: row.uniform_(generator=generator))

    def integers(self, high: int, *shape: int, device: torch.device) -> Tensor:
        """Draw uniform integers in [0, high) with `shape` (N, ...), int64, for the N images of this process.

        The numbers are drawn independently for each image of the global batch.
        """
        return self._rows(shape, device, lambda row, generator: row.random_(high, generator=generator), torch.int64)

    def shared(self) -> torch.Generator:
        """Return a CPU generator with the same seed on all processes, e.g. to draw one number for the global batch."""
        self.draws += 1
        return torch.Generator().manual_seed(_seed(self.seed, self.draws, _SHARED))

    def _rows(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        fill: Callable[[Tensor, torch.Generator], Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        self.draws += 1
        rows = torch.empty(shape, device=device, dtype=dtype)
        generator = torch.Generator(device)
        first = rank() * len(rows)
        for place, row in enumerate(rows, start=first):
            fill(row, generator.manual_seed(_seed(self.seed, self.draws, place)))
        return rows

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.draws])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.draws = state.tolist()


def _seed(seed: int, draw: int, place: int) -> int:
    """Return a seed for a torch generator: the splitmix64 hash of `seed`, `draw` and `place`.

    `seed` is the seed of the run's generator, `draw` is the number of draws so far, and `place` is the index of an
    image in the global batch. torch's CPU generators use only the low 32 bits of a seed. The hash mixes all arguments
    into these bits.
    """
    value = 0
    for part in (seed, draw, place):
        value = (value + part + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value >> 1  # 63 bits, the range of manual_seed
