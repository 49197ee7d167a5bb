"""Comparison of float32 and bfloat16 by k-NN accuracy after the same number of epochs, over several seeds.

    python scripts/precision_study.py --dir runs/precision_study
    python scripts/precision_study.py --seeds 0,1,2,3,4 dataset=cifar10 method=moco_v2

Further arguments are passed to ssl-train. If the processor does not support bfloat16 natively, the script simulates its
products: factors are rounded to bfloat16, sums are computed in float32, and the result is rounded. (torch's emulation
is hundreds of times slower.)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sslcli.engine import precision
from sslcli.report.metrics import newest

DTYPES = ("fp32", "bf16")
PRODUCTS = (F.conv2d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm)


class RoundedProducts(TorchFunctionMode):
    """Mode that computes the products of autocast in float32, from factors rounded to bfloat16.

    A product of two bfloat16 numbers is exact in float32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            rounded = [value.bfloat16().float() if isinstance(value, Tensor) else value for value in args]
            return func(*rounded, **(kwargs or {})).bfloat16()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/precision_study"), help="directory of the runs (default: %(default)s)"
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the runs (default: %(default)s)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # train one run in this process
    parser.add_argument("overrides", nargs="*", help="passed to ssl-train")
    options = parser.parse_args(arguments)
    if options.one:
        return train(options.overrides)
    accuracies: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for seed in options.seeds.split(","):
        for dtype in DTYPES:
            run_dir = options.dir / f"{dtype}-seed{seed}"
            line = [sys.executable, __file__, "--one", f"seed={seed}", f"train.precision={dtype}"]
            code = subprocess.run([*line, f"run_dir={run_dir}", *options.overrides]).returncode
            if code:
                return code
            accuracy = newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
            if accuracy is None:
                parser.error(
                    f"{run_dir} has no k-NN accuracy: set monitor.knn_every_epochs above 0, and hold out images"
                )
            accuracies[dtype].append(100 * accuracy)
    print("\n".join(table(accuracies)))
    return 0


def train(overrides: Sequence[str]) -> int:
    """Run ssl-train in this process and return its exit code."""
    from sslcli.cli.train import main as command

    sys.argv = ["ssl-train", *overrides]
    native = precision.resolve("auto", torch.device("cpu")) == "bf16"
    try:
        if "train.precision=bf16" in overrides and not native and not torch.cuda.is_available():
            with RoundedProducts():
                command()
        else:
            command()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def table(accuracies: dict[str, list[float]]) -> list[str]:
    """Return the lines of a Markdown table: k-NN top-1 in percent by dtype, mean and standard deviation over seeds."""
    rows = ["| precision | k-NN top-1, % | mean | standard deviation |", "|---|---|---|---|"]
    for dtype, values in accuracies.items():
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        cell = ", ".join(f"{value:.1f}" for value in values)
        rows.append(f"| {dtype} | {cell} | {statistics.mean(values):.1f} | {deviation:.1f} |")
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
