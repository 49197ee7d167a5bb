"""Evaluation: k-NN of 10,000 images against 50,000, and a linear evaluation as a multiple of one forward pass."""

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
from measure import Result, answer, timed
from pictures import file_paths, folder
from torch import Tensor

BANK, QUERIES, DIM, CLASSES = 50_000, 10_000, 512, 10
BATCH = 512  # images in a forward pass, as in ssl-eval
CPU = torch.device("cpu")


def clusters(count: int) -> tuple[Tensor, Tensor]:
    """Features around one center a class; what is measured is time."""
    labels = torch.arange(count) % CLASSES
    centers = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    return centers[labels] + 2 * torch.randn(count, DIM), labels


def ours_knn() -> Result:
    from sslcli.evaluation.knn import knn

    (bank, classes), (queries, truth) = clusters(BANK), clusters(QUERIES)
    return timed(
        lambda: knn(bank, classes, queries, truth, k=200, temperature=0.1, num_classes=CLASSES),
        images=QUERIES,
        warmup=1,
    )


def lightly_knn() -> Result:
    from lightly.utils.benchmarking import knn_predict

    (bank, classes), (queries, _) = clusters(BANK), clusters(QUERIES)
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries, dim=1)
    return timed(
        lambda: [knn_predict(rows, bank.T, classes, CLASSES, 200, 0.1) for rows in torch.split(queries, 512)],
        images=QUERIES,
        warmup=1,
    )


def linear(*, baselines: bool) -> Result:
    """`ssl-eval` from JPEG files to the report, imports aside, over a bare forward pass of the same images.

    `multiple` is of seconds, `cpu_multiple` of processor time, which other work on the machine hardly changes.
    """
    from sslcli.backbones.resnet import ResNet
    from sslcli.engine import precision
    from sslcli.runs.build import made_fast
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    format = precision.resolve("auto", CPU)
    root = folder((32, 32), int(os.environ.get("EVAL_IMAGES", "6000")))
    count = len(file_paths(root))
    torch.manual_seed(0)
    net = made_fast(ResNet("resnet18", image_size=32)).eval()
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)

    def forward(number: int) -> None:
        with torch.inference_mode(), precision.autocast(CPU, format):
            for done in range(0, number, BATCH):
                part = images[: number - done].float() / 255
                net(part.contiguous(memory_format=torch.channels_last))

    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "net.pt"
        torch.save(net.state_dict(), weights)
        line = [f"weights={weights}", "backbone=resnet18", "backbone.image_size=32", f"precision={format}"]
        line += ["dataset=folder", f"dataset.root={root}", "dataset.image_size=32", f"dataset.val_fraction={1 / 6}"]
        forward(BATCH)
        before = spent(lambda: forward(count // 2))
        whole = spent(lambda: ssl_eval(*line, f"baselines={str(baselines).lower()}"))
        after = spent(lambda: forward(count - count // 2))
    wall, cpu = (one / (first + second) for one, first, second in zip(whole, before, after, strict=True))
    return {"images_per_s": count / whole[0], "multiple": wall, "cpu_multiple": cpu}


def ssl_eval(*arguments: str) -> None:
    """The console script, in this process."""
    from sslcli.cli.eval import main

    sys.argv = ["ssl-eval", *arguments]
    try:
        with redirect_stdout(sys.stderr):
            main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"ssl-eval ended with code {ended.code}") from ended


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of processor time with all processes that ended."""
    before = time.perf_counter(), processor()
    work()
    return time.perf_counter() - before[0], processor() - before[1]


def processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    answer(
        {
            "knn/sslcli": ours_knn,
            "knn/lightly": lightly_knn,
            "linear/sslcli": partial(linear, baselines=False),
            "linear_baselines/sslcli": partial(linear, baselines=True),
        }
    )
