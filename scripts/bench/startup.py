"""Benchmark of startup: `--help`, and imports plus the first training step, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import Result, command, run_benchmark

LIGHTLY = """
import training
training.timed = lambda step, **_: step()
training.lightly_step("simclr", best=False)
"""

STABLE_PRETRAINING = """
from stable_pretraining_sides import fit
fit("simclr", best=False, seconds=0.0, warmup=0)
"""


def duration(line: list[str]) -> Result:
    """Run a command and return its wall-clock time in seconds under the key `s`."""
    before = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)
    return {"s": time.perf_counter() - before}


def first_step() -> Result:
    """Time `ssl-train` with one step on few images: imports, network, run directory, step, checkpoint."""
    with tempfile.TemporaryDirectory() as run_dir:
        return duration(
            [
                command("ssl-train"),
                "backbone=resnet18",
                "dataset.train_images=512",
                "dataset.test_images=64",
                "train.batch_size=128",
                "train.max_steps=1",
                "monitor.knn_every_epochs=0",
                "monitor.health_every_steps=0",
                "monitor.pictures=0",
                f"run_dir={run_dir}",
            ]
        )


if __name__ == "__main__":
    run_benchmark(
        {
            "help/sslcli": partial(duration, [command("ssl-train"), "--help"]),
            "help/lightly": partial(duration, [command("lightly-ssl-train"), "--help"]),
            "help/stable-pretraining": partial(duration, [command("spt"), "--help"]),
            "first_step/sslcli": first_step,
            "first_step/lightly": partial(duration, [sys.executable, "-c", LIGHTLY]),
            "first_step/stable-pretraining": partial(duration, [sys.executable, "-c", STABLE_PRETRAINING]),
        }
    )
