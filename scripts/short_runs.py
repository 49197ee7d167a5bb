"""Train methods for the same few minutes on CIFAR-10's training images as class folders, and measure their features.

    python scripts/short_runs.py IMAGES OUT [METHOD ...]
    python scripts/short_runs.py --table OUT

IMAGES holds one folder a class (50,000 images; a tenth is held out by hash). A run gets as many steps as fit into
`--minutes` on two cores. The processor time of a step is measured first, data workers included, so the schedule comes
to its end in time and other work on the machine does not shorten a run. Results: OUT/METHOD/eval/*.json. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CORES = 2
PROTOCOLS = ("knn", "linear", "semi")
TIMED = (20, 80)  # steps of the two runs whose difference is the cost of a step

# What differs from the recipes for hundreds of epochs: heads as small as the net, a rate for a short run.
OVERRIDES: dict[str, list[str]] = {
    "simclr": ["experiment=cifar10_simclr"],
    "byol": ["experiment=cifar10_byol"],
    "moco": ["experiment=cifar10_moco", "method.bn_group=32"],
    "moco_v2": ["experiment=cifar10_moco_v2"],
    "moco_v3": [
        "method=moco_v3",
        "views=byol_cifar",
        "method.temperature=0.2",
        "method.hidden=1024",
        "train.warmup_epochs=0",
    ],
    "cpc": ["method=cpc", "backbone=small_layernorm", "train.batch_size=64"],
    "cpc_v2": ["method=cpc_v2", "backbone=small_layernorm", "train.batch_size=64"],
    "deep_infomax": [
        "method=deep_infomax",
        "train.batch_size=64",
        "optimizer.lr=1.0e-3",  # the code's 1e-4 is for 1000 epochs
        "train.schedule=cosine",
    ],
    "bigan": [
        "method=bigan",
        "train.batch_size=64",  # a game needs steps more than images
        "train.lr_scaling=none",
        "train.warmup_epochs=0",
        "views.views.0.crop_scale=[0.8,1.0]",  # of the recipe: crops are drawn as well
    ],
    "dcgan": [
        "method=dcgan",
        "optimizer.lr=2.0e-4",
        "train.batch_size=64",
        "train.lr_scaling=none",
        "train.warmup_epochs=0",
        "views.views.0.crop_scale=null",  # of the recipe: whole images
    ],
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="OUT", help="print what was measured, train nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="of two cores, for each run (%(default)s)")
    parser.add_argument("--threads", type=int, default=CORES, help="of a run; 1 on a machine that does other work")
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("methods", nargs="*")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.table))
        return 0
    if not options.images or not options.out:
        parser.error("IMAGES and OUT are needed, or --table OUT")
    for method in options.methods or sorted(path.stem for path in (root() / "conf" / "method").glob("*.yaml")):
        short_run(method, options.images, options.out, seconds=60 * options.minutes * CORES, threads=options.threads)
    print(table(options.out))
    return 0


def root() -> Path:
    """The checkout this script lies in."""
    return Path(__file__).resolve().parents[1]


def short_run(method: str, images: Path, out: Path, *, seconds: float, threads: int) -> None:
    """Train one method for so many seconds of one core, then measure it."""
    line = train_line(method, images, threads)
    run_dir = out / method
    if not (run_dir / "done").exists():
        noted = out / f"{method}.steps"
        if not noted.exists():
            few, many = (cost([*line, f"train.max_steps={steps}"], out / f"{method}.{steps}") for steps in TIMED)
            noted.write_text(str(int(seconds * (TIMED[1] - TIMED[0]) / (many - few))))
        subprocess.run([*line, f"train.max_steps={noted.read_text()}", f"run_dir={run_dir}"], check=True)
    for protocol in PROTOCOLS:
        if not (run_dir / "eval" / f"{protocol}.json").exists():
            subprocess.run([command("ssl-eval"), f"run={run_dir}", f"protocol={protocol}"], check=True)


def command(name: str) -> str:
    """The console script beside this Python."""
    return str(Path(sys.executable).with_name(name))


def train_line(method: str, images: Path, threads: int) -> list[str]:
    """The command that trains `method`, but for its length and its directory."""
    return [
        command("ssl-train"),
        "backbone=small",
        "dataset=folder",
        f"dataset.root={images}",
        "dataset.image_size=32",
        "dataset.mean=[0.4914,0.4822,0.4465]",
        "dataset.std=[0.247,0.243,0.262]",
        "dataset.workers=1",
        "train.batch_size=256",
        "monitor.knn_every=10",
        f"launcher.threads={threads}",
        *OVERRIDES.get(method, [f"method={method}"]),
    ]


def cost(line: list[str], run_dir: Path) -> float:
    """Seconds of processor time that a run takes, its start and its data workers included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*line, f"run_dir={run_dir}", "monitor.knn_every=0", "monitor.pictures=0", "resume=never"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def table(out: Path) -> str:
    """One row a method: images seen, then for each protocol the trained net and its random initialization."""
    heads = [head for protocol in PROTOCOLS for head in (protocol, "random")]
    rows = ["| method | images seen | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    return "\n".join(rows + [row(done.parent) for done in sorted(out.glob("*/done")) if not done.parent.suffix])


def row(run: Path) -> str:
    """The row of one run."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    batch = yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"]
    cells = [f"`{run.name}`", f"{last['step'] * batch:,}"]
    for protocol in PROTOCOLS:
        path = run / "eval" / f"{protocol}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        cells += [cell(found), cell(found.get("baselines", {}).get("random", {}))]
    return "| " + " | ".join(cells) + " |"


def cell(result: dict[str, Any]) -> str:
    """Top-1 in per cent with its interval, or a dash."""
    if "top1" not in result:
        return "-"
    low, high = (100 * value for value in result["interval"])
    return f"{100 * result['top1']:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
