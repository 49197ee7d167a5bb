"""Generator of the table of export formats in docs/export.md, from the backbones of conf/backbone.

python scripts/export_table.py            write the table
python scripts/export_table.py --measure  export every pair, load it and print the differences of features
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sslcli.runs.build import find_class
from sslcli.runs.export_check import difference, features_of
from sslcli.weights.export.formats import TARGETS
from sslcli.weights.export.preprocessing import Preprocessing
from sslcli.weights.export.target import Target, Trained

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "export.md"
CONF = ROOT / "conf" / "backbone"
FORMATS = ("torch", *TARGETS)
BEGIN, END = "<!-- table of scripts/export_table.py -->\n", "<!-- end of the table -->\n"
# Title of a further row -> yaml file and changed arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNets with `stem=cifar`": ("resnet18", {"stem": "cifar"}),
    "ResNets with `norm=layer`": ("resnet18", {"norm": "layer"}),
    "ResNets for images of 4 channels": ("resnet18", {"in_channels": 4}),
    "ViTs with `registers`, `layer_scale`": ("vit_tiny", {"registers": 4, "layer_scale": 0.1}),
    "ViTs with `pool=mean`": ("vit_tiny", {"pool": "mean"}),
    "ViTs for images of 4 channels": ("vit_tiny", {"in_channels": 4}),
}


class OwnModule(nn.Module):
    """A backbone of a user."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu().mean((2, 3))  # type: ignore[no-any-return]


def arguments_of(name: str, changes: dict[str, Any], image_size: int) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the class and the arguments of the backbone of a yaml file."""
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text("utf-8"))
    node |= {"image_size": image_size, "in_channels": 3}
    node |= {"pool": "cls"} if "pool" in node else {}
    node |= {"name": "resnet10t"} if name == "timm" else {}
    kind = find_class(node.pop("_target_"), base=nn.Module, trust=[], where="backbone._target_")
    return kind, node | changes


def backbones(image_size: int, device: str) -> Iterator[tuple[str, Trained]]:
    """Yield the title and an untrained backbone of each row of the table."""
    for path in sorted(CONF.glob("*.yaml")):
        yield f"`{path.stem}`", trained(path.stem, {}, image_size, device)
    for title, (name, changes) in VARIANTS.items():
        yield title, trained(name, changes, image_size, device)
    yield "your own module", described(OwnModule(), OwnModule, 3, image_size)


def trained(name: str, changes: dict[str, Any], image_size: int, device: str) -> Trained:
    """Return the backbone of a yaml file as if it had been trained for images of `image_size` pixels."""
    kind, arguments = arguments_of(name, changes, image_size)
    with torch.device("cpu" if name == "timm" else device):  # timm computes an output, which needs values
        return described(kind(**arguments), partial(kind, **arguments), arguments["in_channels"], image_size)


def described(net: nn.Module, build: Any, channels: int, image_size: int) -> Trained:
    """Return a backbone with example values of its preprocessing."""
    given = Preprocessing(image_size=image_size, resized_side=256, mean=(0.5,) * channels, std=(0.25,) * channels)
    return Trained(net=net.eval(), build=build, settings={}, preprocessing=given, facts={})


@cache
def table() -> str:
    """Return the table in Markdown, and the reasons of its refusals."""
    lines = [f"| backbone | {' | '.join(f'`{name}`' for name in FORMATS)} |\n", f"|---{'|---' * len(FORMATS)}|\n"]
    reasons: list[str] = []
    for title, one in backbones(224, "meta"):
        cells = ["yes"]
        for target in TARGETS.values():
            reason = target.obstacle(one)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {title} | {' | '.join(cells)} |\n")
    numbered = [f"{number}. {reason}.\n" for number, reason in enumerate(reasons, start=1)]
    return "".join([*lines, "\n", *numbered])


def with_table(page: str) -> str:
    """Return the text of the page with an updated table."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table()}\n{END}", page, flags=re.DOTALL)


def measure(target: Target, one: Trained) -> float:
    """Export a backbone, load it, and return the relative difference of the features of two images."""
    size, channels = one.preprocessing.image_size, one.preprocessing.channels
    images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    prepared = one.preprocessing.normalize(images)
    with tempfile.TemporaryDirectory() as folder:
        target.write(one, Path(folder))
        found = features_of(target.load(one, Path(folder)), images if target.normalizes else prepared)
    return difference(found, features_of(one.net, prepared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="export and load every pair")
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    if not arguments.measure:
        PAGE.write_text(with_table(PAGE.read_text("utf-8")), encoding="utf-8")
        return
    for title, one in backbones(arguments.image_size, "cpu"):
        for target in TARGETS.values():
            reason = target.obstacle(one)
            print(f"{title:40} {target.name:12} {reason or format(measure(target, one), '.1e')}", flush=True)


if __name__ == "__main__":
    main()
