"""Random numbers that a method draws for the images of a step.

torch's global generator is another on every process, so a run of two processes would differ from a run of one. Here
the numbers of an image are a function of (seed, draw, its place in the global batch) alone, and a checkpoint holds the
count of draws. Shapes: N images a process, W processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslcli.distributed import rank

_SHARED = -1  # the place whose numbers all processes draw
_MASK = (1 << 64) - 1


class Noise(nn.Module):
    """A source of random numbers that is part of a method's state. Its seed comes from torch's global generator.

    Every call of a method below is one draw; make the same calls in the same order on all processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed = int(torch.randint(2**31, ()))
        self.draws = 0

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        """Standard normal numbers (N, ...) float32, each row of the global batch with its own."""
        return self._rows(shape, device, lambda row, generator: row.normal_(generator=generator))

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Numbers (N, ...) float32 in [0, 1), each row of the global batch with its own."""
        return self._rows(shape, device, lambda row, generator: row.uniform_(generator=generator))

    def integers(self, high: int, *shape: int, device: torch.device) -> Tensor:
        """Whole numbers (N, ...) int64 in [0, high), each row of the global batch with its own."""
        return self._rows(shape, device, lambda row, generator: row.random_(high, generator=generator), torch.int64)

    def shared(self) -> torch.Generator:
        """A generator on the CPU for what is drawn once for the whole global batch, the same on all processes."""
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
    """A seed for a generator; the mixing of splitmix64, since generators on the CPU use the low 32 bits alone."""
    value = 0
    for part in (seed, draw, place):
        value = (value + part + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value >> 1  # what manual_seed takes
