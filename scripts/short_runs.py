"""Short runs of all methods on the training images of CIFAR-10, with the same CPU time, and their evaluation.

    python scripts/short_runs.py [--protocols knn linear semi --] IMAGES OUT [METHOD ...]
    python scripts/short_runs.py --table OUT

IMAGES contains one folder per class (50,000 images; a tenth is held out by hash). A run has as many steps as fit into
`--minutes` on two cores. To compute this number, the script first measures the CPU time of a step, including data
workers. The learning rate schedule is therefore complete, and other load on the machine does not shorten a run. Results
are in OUT/METHOD/eval/*.json. If the script was stopped, the same command resumes it.
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
PILOT_STEPS = (20, 80)  # steps of the two runs whose difference gives the CPU time of a step

# A vision transformer that is about as fast as the backbone `small`.
VIT = ["backbone=vit_tiny", "backbone.width=128", "backbone.depth=4", "backbone.num_heads=4", "optimizer.lr=1.0e-3"]
# Of 8 instead of 4 pixels per patch, it processes four times as many images, which methods with a teacher need.
VIT8 = [*VIT, "backbone.patch_size=8", "train.batch_size=64", "train.lr_scaling=none"]
ADAMW = ["optimizer=adamw", "optimizer.lr=1.0e-3", "optimizer.weight_decay=1.0e-4"]
# Two views instead of six, and a head that takes less time than the network, although it is applied to all patches.
SMALL_HEAD = [
    "views=vicreg_cifar",
    "method.num_views=2",
    "method.num_prototypes=512",
    "method.hidden=256",
    "method.dim=128",
]

# Overrides of the recipes, which are for hundreds of epochs: smaller heads, and learning rates for short runs.
OVERRIDES: dict[str, list[str]] = {
    "simclr": ["experiment=cifar10_simclr"],
    "byol": ["experiment=cifar10_byol", "optimizer.lr=0.12", "optimizer.weight_decay=5.0e-4"],
    "moco": ["experiment=cifar10_moco", "method.bn_group=32"],
    "moco_v2": [
        "experiment=cifar10_moco_v2",
        "method.bn_group=32",
        "method.symmetric=false",  # more images for the same time
        "optimizer.lr=0.03",  # the rate of the recipe is too high for a small network
    ],
    "moco_v3": [
        "method=moco_v3",
        "views=byol_cifar",
        "method.temperature=0.2",
        "method.hidden=1024",
        "train.warmup_epochs=0",
    ],
    "vicreg": ["method=vicreg", "views=vicreg_cifar"],
    "barlow_twins": ["method=barlow_twins", "views=cifar_asymmetric"],
    "simsiam": [
        "method=simsiam",
        "views=simclr_cifar",
        "method.dim=512",
        "method.predictor_hidden=128",
        "optimizer.lr=0.06",
        "optimizer.weight_decay=5.0e-4",
    ],
    "nnclr": ["method=nnclr", "views=cifar_asymmetric", "method.queue_size=4096", *ADAMW],
    "ressl": ["method=ressl", "optimizer.lr=0.05"],
    "densecl": [
        "method=densecl",
        "views=simclr_cifar",
        "views.normalize=true",
        "method.momentum=0.99",
        "optimizer.lr=0.03",
    ],
    "lejepa": ["method=lejepa"],
    "swav": ["method=swav", "method.hidden=512", "method.num_prototypes=300", *ADAMW],
    "deepcluster_v2": [
        "method=deepcluster_v2",
        "method.hidden=512",
        "method.num_prototypes=[300,300,300]",
        *ADAMW,
    ],
    "dino": ["method=dino", "method.num_prototypes=1024", "method.momentum=0.99", "optimizer.lr=1.0e-3"],
    "mae": ["method=mae", *VIT, "method.decoder_dim=128", "method.decoder_depth=2", "method.decoder_heads=4"],
    "simmim": ["method=simmim", *VIT],
    "ijepa": [
        "method=ijepa",
        *VIT8,
        "method.predictor_dim=64",
        "method.predictor_heads=4",
        "optimizer.lr=5.0e-4",
    ],
    "ibot": [
        "method=ibot",
        *VIT8,
        *SMALL_HEAD,
        "method.momentum=0.99",
    ],
    "dinov2": [
        "method=dinov2",
        *VIT8,
        *SMALL_HEAD,
        "method.momentum=0.99",
        "method.teacher_temperature=0.04",  # 0.07 makes the targets of so few images nearly uniform
        "method.warmup_teacher_temperature_epochs=0",
        "train.final_weight_decay=null",
    ],
    "cpc": [
        "method=cpc",
        "backbone=small_layernorm",
        "train.batch_size=64",
        "train.lr_scaling=none",
        "method.grayscale=false",  # on gray images, a short run does not raise the k-NN accuracy
        "method.negatives=256",
        "method.augmentation.crop=0.0",
        "method.augmentation.grayscale=0.25",
        "method.augmentation.drop_colors=0.2",
    ],
    "cpc_v2": ["method=cpc_v2", "backbone=small_layernorm", "train.batch_size=64", "train.lr_scaling=none"],
    "deep_infomax": ["method=deep_infomax", "train.batch_size=64"],
    "bigan": [
        "method=bigan",
        "method.width=16",  # half the time per image of 32, and the same accuracy after 10,000 images
        "optimizer.lr=1.0e-3",  # the official 2e-4 is for hundreds of epochs
        "train.batch_size=64",  # GANs need many steps rather than many images
        "train.lr_scaling=none",
        "train.warmup_epochs=0",
        "views.views.0.crop_scale=[0.8,1.0]",  # as in the recipe: the generator learns to generate crops as well
    ],
    "dcgan": [
        "method=dcgan",
        "optimizer.lr=2.0e-4",
        "train.batch_size=64",
        "train.lr_scaling=none",
        "train.warmup_epochs=0",
        "views.views.0.crop_scale=null",  # as in the recipe: whole images
    ],
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="OUT", help="print the results in OUT without training")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="length of each run on two cores (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=CORES, help="threads of a run; use 1 under other load (default: %(default)s)"
    )
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="evaluations (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="use another OUT for each seed (default: %(default)s)")
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("methods", nargs="*")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.table))
        return 0
    if not options.images or not options.out:
        parser.error("IMAGES and OUT are required, or --table OUT")
    every = {path.stem for path in (root() / "conf" / "method").glob("*.yaml")} - {"distill"}  # which needs a teacher
    for method in options.methods or sorted(every):
        seconds = 60 * options.minutes * CORES
        line = train_line(method, options.images, threads=options.threads, seed=options.seed)
        train(line, options.out / method, seconds=seconds)
        evaluate(options.out / method, options.protocols, threads=options.threads)
    print(table(options.out))
    return 0


def root() -> Path:
    """Return the root of the checkout that contains this script."""
    return Path(__file__).resolve().parents[1]


def train(line: list[str], run_dir: Path, *, seconds: float) -> None:
    """Train one method with the command `line` for `seconds` of CPU time. A finished run is not trained again."""
    if (run_dir / "done").exists():
        return
    num_steps = run_dir.with_suffix(".steps")
    if not num_steps.exists():
        short, long = PILOT_STEPS
        before, after = (cpu_time([*line, f"train.max_steps={n}"], run_dir.with_suffix(f".{n}")) for n in PILOT_STEPS)
        num_steps.write_text(str(int(seconds * (long - short) / (after - before))))
    subprocess.run([*line, f"train.max_steps={num_steps.read_text().strip()}", f"run_dir={run_dir}"], check=True)


def evaluate(run_dir: Path, protocols: Sequence[str], *, threads: int) -> None:
    """Evaluate one run. Protocols that have a result are not run again."""
    for protocol in protocols:
        if not result_of(run_dir, protocol):
            baselines = "false" if baselines_of(run_dir, protocol) else "true"
            settings = [f"protocol={protocol}", f"baselines={baselines}", f"launcher.threads={threads}"]
            subprocess.run([command("ssl-eval"), f"run={run_dir}", *settings], check=True)


def command(name: str) -> str:
    """Return the path of a console script in the environment of this interpreter."""
    return str(Path(sys.executable).with_name(name))


def train_line(method: str, images: Path, *, threads: int, seed: int) -> list[str]:
    """Return the command that trains `method`, without the number of steps and the run directory."""
    return [
        command("ssl-train"),
        "backbone=small",
        "dataset=folder",
        f"dataset.root={images}",
        "dataset.image_size=32",
        "dataset.mean=[0.4914,0.4822,0.4465]",
        "dataset.std=[0.247,0.243,0.262]",
        "dataset.workers=1",
        "dataset.pretrain_on_val=false",  # all accuracies are measured on images that the network has never seen
        "train.batch_size=256",
        "monitor.knn_every_epochs=10",
        f"launcher.threads={threads}",
        f"seed={seed}",
        *OVERRIDES.get(method, [f"method={method}"]),
    ]


def cpu_time(line: list[str], run_dir: Path) -> float:
    """Run a command and return its CPU time in seconds, including startup and data workers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*line, f"run_dir={run_dir}", "monitor.knn_every_epochs=0", "monitor.pictures=0", "resume=never"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def table(out: Path) -> str:
    """Return a Markdown table: images seen, and for each protocol the trained and the randomly initialized network."""
    heads = [head for protocol in PROTOCOLS for head in (protocol, "random")]
    rows = ["| method | images seen | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    return "\n".join(rows + [row(done.parent) for done in sorted(out.glob("*/done")) if not done.parent.suffix])


def row(run: Path) -> str:
    """Return the row of one run."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    batch = yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"]
    cells = [f"`{run.name}`", f"{last['step'] * batch:,}"]
    for protocol in PROTOCOLS:
        result = result_of(run, protocol)
        cells += [cell(result), cell(baselines_of(run, protocol).get("random", {}))]
    return "| " + " | ".join(cells) + " |"


def result_of(run: Path, protocol: str) -> dict[str, Any]:
    """Return the content of the first result file of a protocol, or {} if there is none.

    The name of the file may contain settings, such as the fraction of labels of `semi`.
    """
    for path in sorted((run / "eval").glob(f"{protocol}*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if result.get("protocol") == protocol:
            return result
    return {}


def baselines_of(run: Path, protocol: str) -> dict[str, Any]:
    """Return the baselines of a protocol, from `run` or from a run beside it whose untrained network is the same."""
    network = untrained_network(run)
    for path in (run, *sorted(run.parent.iterdir())):
        baselines: dict[str, Any] = result_of(path, protocol).get("baselines", {})
        if baselines and untrained_network(path) == network:
            return baselines
    return {}


def untrained_network(run: Path) -> list[Any]:
    """Return the settings that determine the features of the network before training."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    return [
        config["backbone"],
        config["dataset"],
        config["seed"],
        config["views"]["normalize"],
        config["views"]["color_space"],
    ]


def cell(result: dict[str, Any]) -> str:
    """Return the top-1 accuracy in percent with its confidence interval, or a dash if there is no result."""
    if "top1" not in result:
        return "-"
    low, high = (100 * value for value in result["interval"])
    return f"{100 * result['top1']:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
