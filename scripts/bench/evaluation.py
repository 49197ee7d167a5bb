"""Benchmark of evaluation: k-NN of 10,000 against 50,000 images, and a linear evaluation relative to a forward pass."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from measure import Result, run_benchmark, timed
from pictures import file_paths, image_folder
from torch import Tensor

BANK, QUERIES, DIM, CLASSES = 50_000, 10_000, 512, 10
BATCH = 512  # batch size of the forward pass, as in ssl-eval
CPU = torch.device("cpu")


def clusters(count: int) -> tuple[Tensor, Tensor]:
    """Return `count` random features (count, DIM), clustered by class, and their labels (count,)."""
    labels = torch.arange(count) % CLASSES
    centers = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    return centers[labels] + 2 * torch.randn(count, DIM), labels


def sslcli_knn() -> Result:
    """Time sslcli's weighted k-NN."""
    from sslcli.evaluation.knn import knn

    (bank, bank_labels), (queries, query_labels) = clusters(BANK), clusters(QUERIES)
    return timed(
        lambda: knn(bank, bank_labels, queries, query_labels, k=200, temperature=0.1, num_classes=CLASSES),
        images=QUERIES,
        warmup=1,
    )


def lightly_knn() -> Result:
    """Time lightly's weighted k-NN."""
    from lightly.utils.benchmarking import knn_predict

    (bank, bank_labels), (queries, _) = clusters(BANK), clusters(QUERIES)
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries, dim=1)
    return timed(
        lambda: [knn_predict(rows, bank.T, bank_labels, CLASSES, 200, 0.1) for rows in torch.split(queries, 512)],
        images=QUERIES,
        warmup=1,
    )


def linear(*, baselines: bool) -> Result:
    """Time `ssl-eval` from JPEG files to the report, without imports, relative to a forward pass of the same images.

    `multiple` is the ratio of wall-clock times. `cpu_multiple` is that of CPU times; it depends little on other load.
    """
    from sslcli.backbones.resnet import ResNet
    from sslcli.engine import precision
    from sslcli.runs.build import accelerate
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    dtype = precision.resolve("auto", CPU)
    root = image_folder((32, 32), int(os.environ.get("EVAL_IMAGES", "6000")))
    count = len(file_paths(root))
    torch.manual_seed(0)
    net = accelerate(ResNet("resnet18", image_size=32)).eval()
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)

    def forward(number: int) -> None:
        with torch.inference_mode(), precision.autocast(CPU, dtype):
            for done in range(0, number, BATCH):
                part = images[: number - done].float() / 255
                net(part.contiguous(memory_format=torch.channels_last))

    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "net.pt"
        torch.save(net.state_dict(), weights)
        line = [f"weights={weights}", "backbone=resnet18", "backbone.image_size=32", f"precision={dtype}"]
        line += ["dataset=folder", f"dataset.root={root}", "dataset.image_size=32", f"dataset.val_fraction={1 / 6}"]
        forward(BATCH)
        before = elapsed(lambda: forward(count // 2))  # half of the forward pass before ssl-eval, half after it
        evaluation = elapsed(lambda: ssl_eval(*line, f"baselines={str(baselines).lower()}"))
        after = elapsed(lambda: forward(count - count // 2))
    wall, cpu = (time / (first + second) for time, first, second in zip(evaluation, before, after, strict=True))
    return {"images_per_s": count / evaluation[0], "multiple": wall, "cpu_multiple": cpu}


def ssl_eval(*arguments: str) -> None:
    """Run the console script in this process. Raise RuntimeError if its exit code is not 0."""
    from sslcli.cli.eval import main

    sys.argv = ["ssl-eval", *arguments]
    try:
        with redirect_stdout(sys.stderr):
            main()
    except SystemExit as error:
        if error.code:
            raise RuntimeError(f"ssl-eval exited with code {error.code}") from error


def elapsed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock time and CPU time of a function in seconds, including child processes that have ended."""
    before = time.perf_counter(), cpu_time()
    function()
    return time.perf_counter() - before[0], cpu_time() - before[1]


def cpu_time() -> float:
    """Return the CPU time of this process and its child processes that have ended, in seconds."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    run_benchmark(
        {
            "knn/sslcli": sslcli_knn,
            "knn/lightly": lightly_knn,
            "linear/sslcli": partial(linear, baselines=False),
            "linear_baselines/sslcli": partial(linear, baselines=True),
        }
    )
