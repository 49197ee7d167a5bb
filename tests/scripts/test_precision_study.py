"""scripts/precision_study.py: products rounded as a processor with bfloat16 rounds them, and its table."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SCRIPT = Path(__file__).parents[2] / "scripts" / "precision_study.py"
TINY = ["backbone.width=8", "dataset.limit=64", "train.epochs=2", "train.batch_size=32", "monitor.pictures=0"]


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (lambda x, w: F.conv2d(x, w, padding=1), [(2, 8, 5, 5), (4, 8, 3, 3)]),
        (F.linear, [(6, 40), (7, 40)]),
        (lambda x, w: x @ w, [(6, 40), (40, 7)]),
    ],
    ids=["convolution", "linear layer", "matrices"],
)
def test_values_and_gradients_are_those_of_autocast(
    study: dict[str, Any], product: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    """As far from those of float32, which a rounding or two turns the other way."""
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for shape in shapes]

    def found() -> list[Tensor]:
        out = product(*drawn)
        return [out.detach().float(), *torch.autograd.grad(out.float().square().sum(), drawn)]

    exact = found()
    with torch.autocast("cpu", torch.bfloat16):
        native = found()
        with study["RoundedProducts"]():
            rounded = found()
    for value, wanted, other in zip(rounded, native, exact, strict=True):
        assert (value - wanted).norm() < 1e-2 * wanted.norm()
        assert 0.5 < (value - other).norm() / (wanted - other).norm() < 1.2


def test_outside_autocast_nothing_changes(study: dict[str, Any]) -> None:
    x, w = torch.randn(4, 9), torch.randn(9, 3)
    with study["RoundedProducts"]():
        assert torch.equal(x @ w, torch.mm(x, w))
        assert (x @ w).dtype == torch.float32


def test_it_trains_in_both_formats(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--dir", "study", "--seeds", "3", *TINY]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows = ended.stdout.strip().splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["fp32", "bf16"]
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"fp32-seed3", "bf16-seed3"}
    again = subprocess.run([*line, "train.batch_size=7"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2, "what ssl-train refuses is refused"
