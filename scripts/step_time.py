"""A model of the time of a step on many GPUs: `python scripts/step_time.py COUNTS.json [--plot FILE.svg]`

COUNTS.json is what count_communication.py wrote. Prints the tables of docs/scaling.md. Nothing here was measured on
GPUs: the machine below is written down from data sheets and assumptions, each marked.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from count_communication import Traffic

MB, GB = 1e6, 1e9
IMAGE = 3 * 224 * 224 * 4  # bytes of a float32 image
COUNTED_IMAGE = 3 * 64 * 64 * 4  # of those that were counted


@dataclass(frozen=True)
class Machine:
    """Nodes of 8 A100 with NVSwitch and a 200 Gb/s InfiniBand port for each GPU."""

    gpus: int = 8  # a node
    nvlink: float = 300 * GB  # bytes/s each way a GPU (data sheet: 600 GB/s both ways)
    port: float = 25 * GB  # bytes/s each way a GPU (200 Gb/s)
    reached: float = 0.8  # assumption: share of these that collectives reach
    launch: float = 10e-6  # assumption: s to start a collective
    near: float = 1e-6  # assumption: s from one GPU of a node to another
    far: float = 5e-6  # assumption: s from node to node
    float32: float = 0.5 * 19.5e12  # operations/s; data sheet, and the assumption that half is reached
    memory: float = 0.8 * 1.555e12  # bytes/s; data sheet, and the same for 80 %
    bucket: float = 25 * MB  # of gradients, DistributedDataParallel's default
    trees: bool = False  # gathers and scattered sums go over trees too, whatever they do today

    def hops(self, processes: int) -> tuple[int, int]:
        """Nodes, and processes of the largest."""
        return math.ceil(processes / self.gpus), min(processes, self.gpus)

    def seconds(self, collective: str, calls: int, through_the_link: float, processes: int) -> float:
        """Time of `calls` collectives that send so many bytes through the link of a GPU together.

        Sums run over trees, whose latency grows with the logarithm of the nodes; gathers and scattered sums over rings,
        whose latency grows with the processes. A ring enters a node through one port and there are as many rings as
        ports, so it has the bandwidth of all ports of a node; an exchange of all with all has that of one.
        """
        nodes, local = self.hops(processes)
        if collective == "all-reduce":
            latency = 2 * ((local - 1) * self.near + math.log2(nodes) * self.far)
        elif collective == "all-to-all":
            latency = (local - 1) * self.near + (processes - local) * self.near  # messages leave one after the other
        elif self.trees:
            latency = (local - 1) * self.near + math.log2(nodes) * self.far
        else:
            latency = nodes * (local - 1) * self.near + (nodes - 1) * self.far
        ring = self.nvlink if nodes == 1 else min(self.nvlink, self.gpus * self.port)
        speed = self.port if collective == "all-to-all" and nodes > 1 else ring
        return calls * (self.launch + latency) + through_the_link / (self.reached * speed)


@dataclass(frozen=True)
class Workload:
    """What a GPU computes for an image, and how the loss grows."""

    name: str  # in COUNTS.json
    images_per_s: float  # training speed of the network on one GPU, mixed precision
    learned: int  # views that go forward and backward
    looked_at: int  # views that go forward alone
    anchors: int  # rows of the loss an image
    candidates: int  # columns an image of the global batch
    fixed: int  # columns besides
    dim: int
    products: int  # of rows and columns: 1 and one a gradient

    def compute(self, images: int) -> float:
        """Seconds of the network; a pass forward is a third of one with its backward."""
        return images * (self.learned + self.looked_at / 3) / self.images_per_s

    def loss(self, machine: Machine, images: int, processes: int) -> float:
        """Seconds of the similarities: products in float32, and about 8 passes over them in memory (assumption)."""
        pairs = self.anchors * images * (self.candidates * images * processes + self.fixed)
        return pairs * (2 * self.dim * self.products / machine.float32 + 8 * 4 / machine.memory)


# Images/s on one A100, mixed precision. ResNet-50: DeepLearningExamples of NVIDIA, 21.03. ViT-B is an assumption:
# 40 % of 312 TFLOPS at 3 x 2 x 17.6 GFLOP an image.
RESNET50, VIT_B = 2470, 1180
WORKLOADS = [
    Workload("resnet50, simclr", RESNET50, 2, 0, 2, 2, 0, 128, 3),
    Workload("resnet50, byol", RESNET50, 2, 2, 0, 0, 0, 256, 0),
    Workload("resnet50, moco_v2", RESNET50, 1, 1, 1, 0, 65536, 128, 2),
    Workload("resnet50, moco_v3", RESNET50, 2, 2, 2, 1, 0, 256, 2),
    Workload("resnet50, memory_bank", RESNET50, 1, 0, 1, 0, 4097, 128, 2),
    Workload("vit_base, simclr", VIT_B, 2, 0, 2, 2, 0, 128, 3),
    Workload("vit_base, moco_v3", VIT_B, 2, 2, 2, 1, 0, 256, 2),
]


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they are spent on."""

    compute: float
    loss: float
    gradients: float  # what of their sum is not hidden behind the backward pass
    norm: float  # BatchNorm over processes
    embeddings: float
    shuffle: float

    @property
    def total(self) -> float:
        return self.compute + self.loss + self.gradients + self.norm + self.embeddings + self.shuffle


def at_224(purpose: str, traffic: Traffic) -> Traffic:
    """The traffic of images of 224 pixels, where those counted had 64: in the shuffle alone."""
    if purpose != "shuffle":
        return traffic
    return Traffic(traffic.collective, traffic.calls, traffic.fixed, traffic.an_image - COUNTED_IMAGE + IMAGE)


def step(load: Workload, traffic: dict[str, Traffic], machine: Machine, images: int, processes: int) -> Step:
    """A step of `images` a GPU on so many GPUs."""
    spent = dict.fromkeys(("gradients", "norm", "embeddings", "shuffle"), 0.0)
    if processes > 1:
        for purpose, counted in traffic.items():
            law = at_224(purpose, counted)
            if purpose in ("gradients", "stop flag"):
                continue
            kind = "norm" if "BatchNorm" in purpose or purpose == "running statistics" else "embeddings"
            kind = "shuffle" if purpose == "shuffle" else kind
            link = law.through_the_link(images, processes)
            spent[kind] += machine.seconds(law.collective, law.calls, link, processes)
        link = traffic["gradients"].through_the_link(images, processes)
        buckets = max(1, math.ceil(traffic["gradients"].fixed / machine.bucket))
        whole = machine.seconds("all-reduce", buckets, link, processes)
        backward = images * load.learned / load.images_per_s * 2 / 3
        spent["gradients"] = max(whole / buckets, whole - backward)  # the last bucket has nothing to hide behind
    return Step(load.compute(images), load.loss(machine, images, processes), **spent)


def counts(path: Path) -> dict[str, dict[str, Traffic]]:
    read = json.loads(path.read_text())
    return {name: {p: Traffic(**t) for p, t in entry["traffic"].items()} for name, entry in read.items()}


GPUS = (8, 16, 64, 256, 1024)
WEAK = 64  # images a GPU
STRONG = 4096  # images a step


def efficiency(load: Workload, traffic: dict[str, Traffic], machine: Machine, processes: int, images: int) -> float:
    """Images/s a GPU as a share of those of one GPU with the same images that talks to nobody."""
    alone = load.compute(images) + load.loss(machine, images, 1)
    return alone / step(load, traffic, machine, images, processes).total


def table(found: dict[str, dict[str, Traffic]], machine: Machine, *, weak: bool) -> str:
    """Milliseconds of a step, and the efficiency, for each number of GPUs."""
    lines = ["| case | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " |", "|---|" + "---|" * len(GPUS)]
    for load in WORKLOADS:
        cells = []
        for gpus in GPUS:
            images = WEAK if weak else STRONG // gpus
            spent = step(load, found[load.name], machine, images, gpus)
            share = efficiency(load, found[load.name], machine, gpus, images)
            cells.append(f"{1e3 * spent.total:,.0f} ms, {100 * share:.0f} %")
        lines.append(f"| {load.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts(found: dict[str, dict[str, Traffic]], machine: Machine, processes: int) -> str:
    """What a step of the weak scaling is spent on."""
    lines = [
        "| case | network | loss | gradients | BatchNorm | embeddings | shuffle |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in WORKLOADS:
        spent = step(load, found[load.name], machine, WEAK, processes)
        values = (spent.compute, spent.loss, spent.gradients, spent.norm, spent.embeddings, spent.shuffle)
        lines.append(f"| {load.name} | " + " | ".join(f"{1e3 * value:.1f}" for value in values) + " |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Traffic]], machine: Machine, path: Path) -> None:
    """Efficiency against the number of GPUs, weak scaling, as SVG."""
    width, height, left, bottom, right = 720, 360, 60, 50, 170
    gpus = [2**n for n in range(11)]
    colors = ["#1b6ca8", "#d1495b", "#edae49", "#00798c", "#6a4c93", "#8d99ae", "#2f3e46"]

    def at(processes: int, share: float) -> tuple[float, float]:
        x = left + (width - left - right) * math.log2(processes) / 10
        return x, (height - bottom) - (height - bottom - 30) * share

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" font-size="14">Model: images/s a GPU at {WEAK} images a GPU, share of one GPU</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (end, _) = at(1, share), at(1024, share)
        lines.append(f'<line x1="{x}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for processes in gpus:
        x, y = at(processes, 0)
        lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{processes}</text>')
    lines.append(f'<text x="{at(32, 0)[0]:.1f}" y="{height - 10}" text-anchor="middle">GPUs</text>')
    ends = []
    for load, color in zip(WORKLOADS, colors, strict=True):
        shares = [efficiency(load, found[load.name], machine, processes, WEAK) for processes in gpus]
        points = " ".join("{:.1f},{:.1f}".format(*at(p, s)) for p, s in zip(gpus, shares, strict=True))
        dashes = ' stroke-dasharray="6 3"' if load.name.startswith("vit") else ""
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        ends.append((at(1024, shares[-1])[1], load.name, color))
    free = 0.0
    for y, name, color in sorted(ends):  # labels from above, none over another
        free = max(y, free + 15)
        lines.append(f'<text x="{width - right + 8}" y="{free + 4:.1f}" fill="{color}">{name}</text>')
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found, machine = counts(arguments.counts), Machine()
    print(f"Weak scaling, {WEAK} images a GPU:\n\n{table(found, machine, weak=True)}\n")
    print(f"Strong scaling, {STRONG:,} images a step:\n\n{table(found, machine, weak=False)}\n")
    print(f"Milliseconds at 1,024 GPUs, {WEAK} images each:\n\n{parts(found, machine, 1024)}\n")
    print(f"Weak scaling if gathers went over trees:\n\n{table(found, Machine(trees=True), weak=True)}")
    if arguments.plot:
        plot(found, machine, arguments.plot)


if __name__ == "__main__":
    main()
