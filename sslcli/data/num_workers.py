"""Number of data workers, and the memory that they need."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from sslcli.distributed.collectives import is_main
from sslcli.errors import ConfigError
from sslcli.system import cpu
from sslcli.system.launch_variables import local_world_size
from sslcli.system.memory import available_memory

CPU_WORKERS = 2
SMALL_SIDE, FEW_CORES = 64, 2  # pixels per side, cores per process; see default_workers
MOST_GPU_WORKERS = 32  # by default; every split forks its workers, and with 224 pixels each one needs 0.4 GB
MANY_WORKERS = 8  # more workers than this prefetch fewer batches each
CONSUMED_BATCHES = 3  # batches that training uses, receives, and requested last, besides the prefetched ones
WORKER_BYTES = 100_000_000  # memory of a worker besides its batches
SMALL_TENSORS = 1 << 17  # bytes for the tensors of a batch that are not images
MEMORY_FRACTION = 0.5  # of the available memory, for the workers of all processes


def default_workers(image_size: int) -> int:
    """Return the number of data workers to use if `dataset.workers` is null.

    - With a GPU, the number is the number of cores of this process minus one for the process itself, at least 1
      and at most 32.
    - Without a GPU, if images have at most 64 pixels per side and the process has at most 2 cores, the number is 0.
    - In all other cases without a GPU, the number is 2, because training also needs the cores.

    `BatchMemory.reduced_workers` lowers the number if the memory is too small. docs/performance.md has the
    measurements.
    """
    if torch.cuda.is_available():
        return min(max(1, cpu.cores_per_process() - 1), MOST_GPU_WORKERS)
    return 0 if image_size <= SMALL_SIDE and cpu.cores_per_process() <= FEW_CORES else CPU_WORKERS


def prefetch_factor(workers: int) -> int:
    """Return the number of batches that each of `workers` data workers prefetches."""
    return 4 if workers <= MANY_WORKERS else 2


@dataclass(frozen=True)
class BatchMemory:
    """Memory that the data workers of a process need.

    Attributes:
        num_images: number of images of a batch of one process.
        image_bytes: bytes of all views of an image.
        is_divided: True if each worker reads a part of every batch, False if each worker reads whole batches.
    """

    num_images: int
    image_bytes: int
    is_divided: bool = False

    def slot_bytes(self, workers: int) -> int:
        """Return the bytes of shared memory for the result of one request to a worker."""
        return SMALL_TENSORS + -(-self.num_images // (workers if self.is_divided else 1)) * self.image_bytes

    def num_slots(self, workers: int) -> int:
        """Return the number of results for which there is shared memory."""
        return workers * prefetch_factor(workers) + CONSUMED_BATCHES * (workers if self.is_divided else 1)

    def total(self, workers: int) -> int:
        """Return the bytes of memory that `workers` data workers per process need, over all processes of this node."""
        if workers == 0:
            return 0
        own = WORKER_BYTES + 2 * self.slot_bytes(workers)  # the images of a batch, alone and stacked
        return local_world_size() * (workers * own + self.num_slots(workers) * self.slot_bytes(workers))

    def check(self, workers: int) -> None:
        """Raise ConfigError if `workers` data workers per process need more than the available memory."""
        needed, free = self.total(workers), available_memory()
        if needed <= free:
            return
        fitting = max(number for number in range(workers) if self.total(number) <= free)
        fewer = "read in the main process" if fitting == 0 else "use fewer workers"
        raise ConfigError(
            f"dataset.workers is {workers}, which needs about {gigabytes(needed)} GB of memory for prefetched batches "
            f"and processes, but {gigabytes(free)} GB are available: {fewer} (dataset.workers={fitting}; ssl-eval: "
            f"workers={fitting}), lower the batch size, or give the container or job more memory"
        )

    def reduced_workers(self, workers: int) -> int:
        """Return the largest number of data workers, at most `workers`, that need a fraction of the available memory.

        If the number is less than `workers`, a warning of the main process explains why.
        """
        room = int(MEMORY_FRACTION * available_memory())
        fitting = max(number for number in range(workers + 1) if self.total(number) <= room)
        if fitting < workers and is_main():
            warnings.warn(
                f"{fitting} data workers per process instead of {workers} read the images, because {workers} would "
                f"need about {gigabytes(self.total(workers))} GB, more than half of the available memory "
                f"({gigabytes(room)} GB): lower the batch size, give the container or job more memory, or choose a "
                "number with dataset.workers",
                stacklevel=2,
            )
        return fitting


def gigabytes(count: int) -> str:
    """Return a number of bytes in GB as text."""
    return f"{count / 1e9:.1f}"
