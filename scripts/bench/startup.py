"""How long a user waits: `--help`, and the imports with the first training step, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import Result, answer, command

LIGHTLY = """
from training import lightly, timed
import training
training.timed = lambda step, **_: step()
lightly("simclr", best=False)
"""

STABLE_PRETRAINING = """
from stable_pretraining_sides import fitted
fitted("simclr", best=False, seconds=0.0, warmup=0)
"""


def seconds(line: list[str]) -> Result:
    before = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)
    return {"s": time.perf_counter() - before}


def first_step() -> Result:
    """`ssl-train` to the end of one step: imports, network, run directory, checkpoint; of few images, as a peer has."""
    with tempfile.TemporaryDirectory() as run_dir:
        return seconds(
            [
                command("ssl-train"),
                "backbone=resnet18",
                "dataset.train_images=512",
                "dataset.test_images=64",
                "train.batch_size=128",
                "train.max_steps=1",
                "monitor.knn_every=0",
                "monitor.health_every=0",
                "monitor.pictures=0",
                f"run_dir={run_dir}",
            ]
        )


if __name__ == "__main__":
    answer(
        {
            "help/sslcli": partial(seconds, [command("ssl-train"), "--help"]),
            "help/lightly": partial(seconds, [command("lightly-ssl-train"), "--help"]),
            "help/stable-pretraining": partial(seconds, [command("spt"), "--help"]),
            "first_step/sslcli": first_step,
            "first_step/lightly": partial(seconds, [sys.executable, "-c", LIGHTLY]),
            "first_step/stable-pretraining": partial(seconds, [sys.executable, "-c", STABLE_PRETRAINING]),
        }
    )
