"""Images that encode their number, and sets of shards of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor

from sslcli.data.loader import Loader
from sslcli.data.shards.source import HfStream
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views

SIZES = [13, 20, 7, 24]  # 64 images
WHOLE = [{"count": 1, "crop_scale": None, "flip": 0.0}]

KINDS = ["cat", "dog", "emu"]


def png(number: int) -> bytes:
    """A small image of one color, which is its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), (number % 256, number // 256, 0), np.uint8)).save(file, "PNG")
    return file.getvalue()


def number_at(source: Source, position: int) -> int:
    """Return the number that the image at a position encodes."""
    return numbers_in(torch.from_numpy(np.array(source.read(position))[None]).permute(0, 3, 1, 2))[0]


def numbers_in(images: Tensor) -> list[int]:
    """The numbers of images (n, 3, H, W), uint8 or in [0, 1]."""
    scale = 1 if images.dtype == torch.uint8 else 255
    red, green, _ = (images[:, :, 0, 0].float() * scale).round().long().unbind(1)
    return (red + 256 * green).tolist()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, numbers: Sequence[int], *, label: str | None = "cls") -> Path:
    """Write a WebDataset shard, with the label in a separate file (`cls`), in a field (`json`) or without label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            add(tar, f"some/{number:05}.png", png(number))
            if label == "cls":
                add(tar, f"some/{number:05}.cls", str(number % 3).encode())
            elif label == "json":
                add(tar, f"some/{number:05}.json", json.dumps({"label": KINDS[number % 3], "id": number}).encode())
    return path


def write_parquet(path: Path, numbers: Sequence[int], *, group: int = 5, features: bool = True) -> Path:
    """A shard of row groups of `group` rows; with what `datasets` writes about its columns, or plain."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells: list[Any] = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table({"image": cells, "label": [number % 3 for number in numbers]})
    output = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": KINDS}}
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": output}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False)
    return path


def write_set(folder: Path, sizes: Sequence[int], *, kind: str) -> str:
    """Write `tar` or `parquet` shards of the given sizes; return the pattern of their names."""
    first = 0
    for shard, size in enumerate(sizes):
        write = write_tar if kind == "tar" else write_parquet
        write(folder / f"{kind}-{shard:03}.{kind}", range(first, first + size))
        first += size
    return str(folder / f"{kind}-*.{kind}")


def stream(path: str | list[str], cache: str, **options: Any) -> HfStream:
    """A set of shards without a held-out split, of small images."""
    defaults = {"image_size": 8, "val_fraction": 0.0, "lanes": 4, "buffer": 24, "max_bad": 0.1}
    return HfStream(path=path, cache=cache, **(defaults | options))


def loader(source: HfStream, *, batch_size: int = 16, accumulate: int = 1, seed: int = 0) -> Loader:
    """Batches of whole images, without normalization."""
    views = Views(WHOLE, normalize=False)
    device = torch.device("cpu")
    return Loader(source, views, batch_size=batch_size, accumulate=accumulate, seed=seed, device=device)
