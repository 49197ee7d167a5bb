"""format=safetensors: weights of any backbone in the safetensors format, with a description in JSON.

The writer needs no further package. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sslcli.errors import ConfigError
from sslcli.weights.export.target import Target, Trained, json_text
from sslcli.weights.files import load_strictly, wrapped
from sslcli.weights.safetensors import DTYPES, read_safetensors

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes; the values of all tensors begin at a multiple


class Safetensors(Target):
    """`model.safetensors`, and `config.json` with the architecture and the origin of the weights."""

    name = "safetensors"
    files = ("config.json",)

    def obstacle(self, trained: Trained) -> str | None:
        others = [name for name, value in trained.state.items() if not isinstance(value, Tensor)]
        return f"{others[0]} is not a tensor, and the format holds only tensors" if others else None

    def write(self, trained: Trained, folder: Path) -> None:
        (folder / "config.json").write_text(
            json_text({"backbone": trained.settings, **trained.facts}), encoding="utf-8"
        )
        write_safetensors(folder / self.weights_file, trained.state, {"format": "pt"})

    def load(self, trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
        net = trained.build()
        path = folder / self.weights_file
        with path.open("rb") as file:
            load_strictly(net, wrapped(net, read_safetensors(file)), str(path))
        return net.eval()

    def usage(self, trained: Trained) -> str:
        return f"""\
from safetensors.torch import load_file

state = load_file("{self.weights_file}")  # names and tensors, for a network of the same architecture
"""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. `metadata` is a mapping of strings for the header.

    Raises ConfigError if the format has no such dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    # Wide values first, so that each tensor is aligned to its dtype.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise ConfigError(f"{name} has the dtype {tensor.dtype}, which a safetensors file cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
