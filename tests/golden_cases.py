"""Golden cases: inputs, and outputs of the methods' official code. See tests/golden/README.md.

A case put into the folder is tested by every test that asks for its prefix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One case with its floating-point numbers in `dtype`."""

    entry: dict[str, Any]
    dtype: torch.dtype

    @property
    def params(self) -> dict[str, Any]:
        return self.entry["params"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        stored = load_file(str(FOLDER / f"{self.entry['case']}.safetensors"))
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in stored.items()}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: self.tensors[name].clone() for name in self.entry["inputs"]}

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.entry["outputs"]}

    def check(self, actual: Tensor | list[Tensor] | None, name: str) -> None:
        """Fail unless `actual` (a list: one a step) equals the output `name` within the tolerance of the case."""
        assert actual is not None, f"there is nothing to compare with {name}"
        value = torch.stack(actual) if isinstance(actual, list) else actual
        torch.testing.assert_close(
            value.detach(),
            self.outputs[name],
            rtol=self.entry["rtol"],
            atol=self.entry["atol"],
            check_dtype=False,
            msg=lambda text: f"{self.entry['case']}, {name}: {text}",
        )


def golden_cases(prefix: str, *, but_not: str | tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test over all cases whose name begins with `prefix`, in float32 and float64, as its argument `case`.

    Cases whose name begins with `but_not`, or with one of its elements, are left out.
    """
    entries = [e for e in json.loads((FOLDER / "index.json").read_text()) if e["case"].startswith(prefix)]
    entries = [e for e in entries if not but_not or not e["case"].startswith(but_not)]
    if not entries:
        raise LookupError(f"no golden case begins with {prefix!r}")
    cases = [
        pytest.param(Case(entry, dtype), id=f"{entry['case']}-{str(dtype).removeprefix('torch.')}")
        for entry in entries
        for dtype in (torch.float32, torch.float64)
    ]
    return pytest.mark.parametrize("case", cases)
