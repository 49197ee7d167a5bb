"""Model of the time of a training step on many GPUs: `python scripts/step_time.py COUNTS.json [--plot FILE.svg]`

COUNTS.json is the output of `count_communication.py --json`. The script prints the tables of docs/scaling.md. Nothing
was measured on GPUs: the values of `Machine` come from data sheets or are assumptions, which the comments mark.
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
COUNTED_IMAGE = 3 * 64 * 64 * 4  # bytes of an image in COUNTS.json, for the cases with ResNet-50 and ViT-B


@dataclass(frozen=True)
class Machine:
    """Nodes of 8 A100 with NVSwitch and a 200 Gb/s InfiniBand port per GPU. Bandwidths are per GPU and direction."""

    gpus: int = 8  # per node
    nvlink: float = 300 * GB  # bytes/s (data sheet: 600 GB/s for both directions)
    port: float = 25 * GB  # bytes/s (200 Gb/s)
    link_efficiency: float = 0.8  # assumption: fraction of these bandwidths that collectives reach
    launch: float = 10e-6  # assumption: s to start a collective
    latency_in_node: float = 1e-6  # assumption: s between GPUs of a node
    latency_between_nodes: float = 5e-6  # assumption: s between nodes
    float32: float = 0.5 * 19.5e12  # operations/s: data sheet; assumption: 50 % is reached
    memory: float = 0.8 * 1.555e12  # bytes/s: data sheet; assumption: 80 % is reached
    bucket: float = 25 * MB  # bytes of a gradient bucket; default of DistributedDataParallel
    trees: bool = False  # True: all-gather and reduce-scatter use trees as well, instead of rings

    def layout(self, processes: int) -> tuple[int, int]:
        """Return the number of nodes and the largest number of processes on a node."""
        return math.ceil(processes / self.gpus), min(processes, self.gpus)

    def seconds(self, collective: str, calls: int, link_bytes: float, processes: int) -> float:
        """Return the time of `calls` collectives in which each GPU sends `link_bytes` bytes in total.

        All-reduce uses trees, whose latency grows with the logarithm of the number of nodes; all-gather and
        reduce-scatter use rings, whose latency grows with the number of processes. A ring enters a node through one
        port, and there are as many rings as ports, so it has the bandwidth of all ports of a node; all-to-all has the
        bandwidth of one port.
        """
        nodes, local = self.layout(processes)
        inside, between = self.latency_in_node, self.latency_between_nodes
        if collective == "all-reduce":
            latency = 2 * ((local - 1) * inside + math.log2(nodes) * between)
        elif collective == "all-to-all":
            latency = (local - 1) * inside + (processes - local) * inside  # messages are sent one after the other
        elif self.trees:
            latency = (local - 1) * inside + math.log2(nodes) * between
        else:
            latency = nodes * (local - 1) * inside + (nodes - 1) * between
        ring = self.nvlink if nodes == 1 else min(self.nvlink, self.gpus * self.port)
        bandwidth = self.port if collective == "all-to-all" and nodes > 1 else ring
        return calls * (self.launch + latency) + link_bytes / (self.link_efficiency * bandwidth)


@dataclass(frozen=True)
class Workload:
    """Computation of a GPU per image, and the size of the similarity matrix of the loss."""

    name: str  # name of the case in COUNTS.json
    images_per_s: float  # training throughput of the network on one GPU, mixed precision
    trained_views: int  # views with forward and backward pass
    forward_views: int  # views with forward pass only
    anchors: int  # rows of the matrix per local image
    candidates: int  # columns of the matrix per image of the global batch
    fixed: int  # additional columns
    dim: int  # width of the embeddings
    products: int  # matrix products of the loss: 1 for the similarities and 1 per gradient

    def compute(self, images: int) -> float:
        """Return the seconds of the network; a forward pass takes a third of forward plus backward."""
        return images * (self.trained_views + self.forward_views / 3) / self.images_per_s

    def loss(self, machine: Machine, images: int, processes: int) -> float:
        """Return the seconds of the loss: products in float32, and about 8 passes over the matrix (assumption)."""
        pairs = self.anchors * images * (self.candidates * images * processes + self.fixed)
        return pairs * (2 * self.dim * self.products / machine.float32 + 8 * 4 / machine.memory)


# Images/s on one A100, mixed precision. ResNet-50: NVIDIA's DeepLearningExamples, 21.03. ViT-B is an assumption:
# 40 % of 312 TFLOPS at 3 x 2 x 17.6 GFLOP per image.
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
    """Seconds of a step by component."""

    compute: float
    loss: float
    gradients: float  # the part of the all-reduce that does not overlap with the backward pass
    norm: float  # synchronized BatchNorm
    embeddings: float
    shuffle: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.loss + self.gradients + self.norm + self.embeddings + self.shuffle


def at_224(purpose: str, traffic: Traffic) -> Traffic:
    """Return the traffic with images of 224 pixels, given the traffic with 64; only the shuffle sends images."""
    if purpose != "shuffle":
        return traffic
    return Traffic(traffic.collective, traffic.calls, traffic.fixed, traffic.per_image - COUNTED_IMAGE + IMAGE)


def step(load: Workload, traffic: dict[str, Traffic], machine: Machine, images: int, processes: int) -> Step:
    """Return the time of a step with `images` images of 224 pixels per GPU on `processes` GPUs."""
    seconds = dict.fromkeys(("gradients", "norm", "embeddings", "shuffle"), 0.0)
    if processes > 1:
        for purpose, counted in traffic.items():
            scaled = at_224(purpose, counted)
            if purpose in ("gradients", "stop flag"):
                continue
            kind = "norm" if "BatchNorm" in purpose or purpose == "running statistics" else "embeddings"
            kind = "shuffle" if purpose == "shuffle" else kind
            link_bytes = scaled.link_bytes(images, processes)
            seconds[kind] += machine.seconds(scaled.collective, scaled.calls, link_bytes, processes)
        link_bytes = traffic["gradients"].link_bytes(images, processes)
        buckets = max(1, math.ceil(traffic["gradients"].fixed / machine.bucket))
        whole = machine.seconds("all-reduce", buckets, link_bytes, processes)
        backward = images * load.trained_views / load.images_per_s * 2 / 3
        seconds["gradients"] = max(whole / buckets, whole - backward)  # the last bucket overlaps with nothing
    return Step(load.compute(images), load.loss(machine, images, processes), **seconds)


def read_traffic(path: Path) -> dict[str, dict[str, Traffic]]:
    """Read COUNTS.json and return the traffic of each case by purpose."""
    cases = json.loads(path.read_text())
    return {name: {p: Traffic(**t) for p, t in case["traffic"].items()} for name, case in cases.items()}


GPUS = (8, 16, 64, 256, 1024)
WEAK = 64  # images per GPU
STRONG = 4096  # images per step


def efficiency(load: Workload, traffic: dict[str, Traffic], machine: Machine, processes: int, images: int) -> float:
    """Return images/s per GPU as a fraction of one GPU's images/s with the same batch and no communication."""
    single = load.compute(images) + load.loss(machine, images, 1)
    return single / step(load, traffic, machine, images, processes).total


def table(cases: dict[str, dict[str, Traffic]], machine: Machine, *, weak: bool) -> str:
    """Return a Markdown table of the milliseconds of a step, and the efficiency, for each number of GPUs."""
    lines = ["| case | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " |", "|---|" + "---|" * len(GPUS)]
    for load in WORKLOADS:
        cells = []
        for gpus in GPUS:
            images = WEAK if weak else STRONG // gpus
            total = step(load, cases[load.name], machine, images, gpus).total
            fraction = efficiency(load, cases[load.name], machine, gpus, images)
            cells.append(f"{1e3 * total:,.0f} ms, {100 * fraction:.0f} %")
        lines.append(f"| {load.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def components(cases: dict[str, dict[str, Traffic]], machine: Machine, processes: int) -> str:
    """Return a Markdown table of the milliseconds of each component of a step, for weak scaling."""
    lines = [
        "| case | network | loss | gradients | BatchNorm | embeddings | shuffle |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in WORKLOADS:
        time = step(load, cases[load.name], machine, WEAK, processes)
        values = (time.compute, time.loss, time.gradients, time.norm, time.embeddings, time.shuffle)
        lines.append(f"| {load.name} | " + " | ".join(f"{1e3 * value:.1f}" for value in values) + " |")
    return "\n".join(lines)


def plot(cases: dict[str, dict[str, Traffic]], machine: Machine, path: Path) -> None:
    """Plot the efficiency of weak scaling against the number of GPUs as SVG."""
    width, height, left, bottom, right = 720, 360, 60, 50, 170
    gpus = [2**n for n in range(11)]
    colors = ["#1b6ca8", "#d1495b", "#edae49", "#00798c", "#6a4c93", "#8d99ae", "#2f3e46"]

    def position(processes: int, fraction: float) -> tuple[float, float]:
        x = left + (width - left - right) * math.log2(processes) / 10
        return x, (height - bottom) - (height - bottom - 30) * fraction

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" font-size="14">Model: efficiency at {WEAK} images per GPU</text>',
    ]
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (end, _) = position(1, fraction), position(1024, fraction)
        lines.append(f'<line x1="{x}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * fraction:.0f} %</text>')
    for processes in gpus:
        x, y = position(processes, 0)
        lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{processes}</text>')
    lines.append(f'<text x="{position(32, 0)[0]:.1f}" y="{height - 10}" text-anchor="middle">GPUs</text>')
    ends = []
    for load, color in zip(WORKLOADS, colors, strict=True):
        fractions = [efficiency(load, cases[load.name], machine, processes, WEAK) for processes in gpus]
        points = " ".join("{:.1f},{:.1f}".format(*position(p, f)) for p, f in zip(gpus, fractions, strict=True))
        dashes = ' stroke-dasharray="6 3"' if load.name.startswith("vit") else ""
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        ends.append((position(1024, fractions[-1])[1], load.name, color))
    label_y = 0.0
    for y, name, color in sorted(ends):  # positions from the top, at least 15 pixels apart
        label_y = max(y, label_y + 15)
        lines.append(f'<text x="{width - right + 8}" y="{label_y + 4:.1f}" fill="{color}">{name}</text>')
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, metavar="COUNTS.json", help="output of count_communication.py --json")
    parser.add_argument("--plot", type=Path, help="also plot the efficiency to this SVG file")
    arguments = parser.parse_args()
    cases, machine = read_traffic(arguments.counts), Machine()
    print(f"Weak scaling, {WEAK} images per GPU:\n\n{table(cases, machine, weak=True)}\n")
    print(f"Strong scaling, {STRONG:,} images per step:\n\n{table(cases, machine, weak=False)}\n")
    print(f"Milliseconds per component at 1,024 GPUs, {WEAK} images per GPU:\n\n{components(cases, machine, 1024)}\n")
    print(f"Weak scaling if gathers used trees:\n\n{table(cases, Machine(trees=True), weak=True)}")
    if arguments.plot:
        plot(cases, machine, arguments.plot)


if __name__ == "__main__":
    main()
