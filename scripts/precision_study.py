"""Train for the same epochs in float32 and in bfloat16, with several seeds, and compare what k-NN reaches.

    python scripts/precision_study.py --dir runs/precision_study
    python scripts/precision_study.py --seeds 0,1,2,3,4 dataset=cifar10 method=moco_v2

Further arguments are handed on to ssl-train. Where the processor does not multiply bfloat16, this script computes the
products as one that does: factors rounded to bfloat16, sums in float32, the result rounded. (torch's own way there is
hundreds of times slower.)
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

FORMATS = ("fp32", "bf16")
PRODUCTS = (F.conv2d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm)


class RoundedProducts(TorchFunctionMode):
    """Under autocast, products of bfloat16 numbers in float32, where each of them is exact."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            rounded = [one.bfloat16().float() if isinstance(one, Tensor) else one for one in args]
            return func(*rounded, **(kwargs or {})).bfloat16()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/precision_study"), help="of the runs (%(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of the runs (%(default)s)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a run, in a process of its own
    parser.add_argument("overrides", nargs="*", help="handed on to ssl-train")
    options = parser.parse_args(arguments)
    if options.one:
        return train(options.overrides)
    reached: dict[str, list[float]] = {format: [] for format in FORMATS}
    for seed in options.seeds.split(","):
        for format in FORMATS:
            run_dir = options.dir / f"{format}-seed{seed}"
            line = [sys.executable, __file__, "--one", f"seed={seed}", f"train.precision={format}"]
            code = subprocess.run([*line, f"run_dir={run_dir}", *options.overrides]).returncode
            if code:
                return code
            accuracy = newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
            if accuracy is None:
                parser.error(f"{run_dir} measured no k-NN: leave monitor.knn_every above 0, and hold images out")
            reached[format].append(100 * accuracy)
    print("\n".join(table(reached)))
    return 0


def train(overrides: Sequence[str]) -> int:
    """ssl-train in this process; its exit code."""
    from sslcli.cli.train import main as command

    sys.argv = ["ssl-train", *overrides]
    native = precision.resolve("auto", torch.device("cpu")) == "bf16"
    try:
        if "train.precision=bf16" in overrides and not native and not torch.cuda.is_available():
            with RoundedProducts():
                command()
        else:
            command()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def table(reached: dict[str, list[float]]) -> list[str]:
    """Markdown: k-NN top-1 of each format in per cent, with mean and standard deviation over the seeds."""
    rows = ["| format | k-NN top-1, % | mean | standard deviation |", "|---|---|---|---|"]
    for format, values in reached.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        each = ", ".join(f"{value:.1f}" for value in values)
        rows.append(f"| {format} | {each} | {statistics.mean(values):.1f} | {spread:.1f} |")
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
