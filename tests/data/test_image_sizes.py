"""Typical size of stored images, and the warning about images that are enlarged much."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import Cli
from small_shards import write_parquet, write_tar
from sslcli.data.image_sizes import SAMPLE, enlargement_warning, typical_side
from sslcli.data.shards.source import HfStream
from sslcli.data.sources.base import Shapes, Source
from sslcli.data.sources.files import Flat, ListFile
from sslcli.data.sources.hf import Hf
from sslcli.data.sources.parallel import Parallel


def save(folder: Path, *sizes: tuple[int, int], extension: str = "jpg") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number:04}.{extension}")
    return folder


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
def test_the_typical_side_is_the_median_of_the_shorter_sides(tmp_path: Path, extension: str) -> None:
    root = save(tmp_path, (20, 31), (30, 21), (25, 25), (500, 400), (2, 9), extension=extension)
    assert typical_side(Flat(root=root, image_size=8)) == (21, 5)


@pytest.mark.parametrize(
    ("side", "image_size", "recommended"),
    [(32, 224, 32), (28, 224, 32), (100, 224, 104), (5, 32, 8), (112, 224, None), (300, 224, None), (32, 64, None)],
)
def test_only_images_that_are_enlarged_much_are_warned_of(
    tmp_path: Path, side: int, image_size: int, recommended: int | None
) -> None:
    root = save(tmp_path, *[(side, side + 3)] * 3)
    found = enlargement_warning(Flat(root=root, image_size=image_size))
    if recommended is None:
        assert found is None
    else:
        assert found is not None
        assert f"median of {side} pixels, but dataset.image_size is {image_size}" in found
        assert found.endswith(f"set dataset.image_size={recommended}")


def test_a_few_small_images_cause_no_warning(tmp_path: Path) -> None:
    root = save(tmp_path, (16, 16), (16, 16), *[(200, 200)] * 3)
    assert enlargement_warning(Flat(root=root, image_size=224)) is None


def test_the_sample_is_spread_over_the_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.jpg").touch()
    rows = "".join("0.jpg\n" for _ in range(1000))
    (tmp_path / "a.csv").write_text(f"path\n{rows}")
    source = ListFile(file=tmp_path / "a.csv", image_size=8, limit=900)
    asked: list[int] = []
    monkeypatch.setattr(source, "stored_size", lambda position: asked.append(position) or (10, 20))
    assert typical_side(source) == (10, SAMPLE)
    assert set(asked) <= set(source.splits["train"].tolist())
    gaps = torch.tensor(sorted(asked)).diff()
    assert len(gaps) == SAMPLE - 1
    assert int(gaps.max()) < 40
    asked.clear()
    monkeypatch.setattr(source, "stored_size", lambda position: time.sleep(0.05) or asked.append(position))
    start = time.monotonic()
    assert typical_side(source, seconds=0.2) is None
    assert time.monotonic() - start < 10
    assert 2 <= len(asked) < 10
    assert max(asked) - min(asked) > 100  # spread, although the time ended


def test_only_the_header_of_a_file_is_read(tmp_path: Path) -> None:
    root = save(tmp_path, (40, 40))
    with (root / "0000.jpg").open("r+b") as file:
        file.truncate(700)  # the header is intact, and the pixels are missing
        file.seek(1 << 30)
        file.write(b"x")  # a sparse file, which takes seconds to read whole
    assert typical_side(Flat(root=root, image_size=8)) == (40, 1)


def test_unreadable_files_have_no_size(tmp_path: Path) -> None:
    root = save(tmp_path, (40, 40))
    (root / "1.jpg").write_bytes(b"no image")
    os.mkfifo(root / "2.jpg")
    (root / "3.jpg").symlink_to("nowhere")
    assert typical_side(Flat(root=root, image_size=8)) == (40, 1)
    (root / "0000.jpg").unlink()
    assert typical_side(Flat(root=root, image_size=8)) is None
    assert enlargement_warning(Flat(root=root, image_size=8)) is None


def parallel(tmp_path: Path) -> Source:
    for name in ("rgb", "depth"):
        save(tmp_path / name / "a", (8, 8), (8, 8), extension="png")
    modalities = {"rgb": {"channels": 3}, "depth": {"channels": 1}}
    return Parallel(root=tmp_path, modalities=modalities, image_size=224, mean=[0.5] * 4, std=[0.5] * 4)


SOURCES: list[Callable[[Path], Source]] = [
    parallel,
    lambda folder: Hf(path=write_parquet(folder / "train.parquet", range(9)), image_size=224, cache=folder / "cache"),
    lambda folder: HfStream(path=write_tar(folder / "a.tar", range(9)), image_size=224, cache=folder / "cache"),
    lambda folder: HfStream(path=write_parquet(folder / "a.parquet", range(9)), image_size=224, cache=folder / "cache"),
]


@pytest.mark.parametrize("make", SOURCES, ids=["parallel", "hf", "tar", "parquet"])
def test_images_in_tables_shards_and_modalities_have_sizes(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    source = make(tmp_path)
    assert min(source.read(0).size) < 112
    warning = enlargement_warning(source)
    assert warning is not None
    assert f"median of {min(source.read(0).size)} pixels" in warning


def test_images_in_memory_are_not_warned_of() -> None:
    assert enlargement_warning(Shapes(train_images=4, test_images=0, image_size=32)) is None


def test_a_run_with_small_files_warns_at_the_start(cli: Cli, tmp_path: Path) -> None:
    save(tmp_path / "images", *[(16, 16)] * 8)
    line = ["dataset=flat", f"dataset.root={tmp_path / 'images'}", "dataset.workers=0", "backbone.width=4"]
    line += ["train.batch_size=4", "train.max_steps=1", "monitor.pictures=0", "launcher.threads=1", "dry_run=true"]
    ended = cli("ssl-train", *line, "dataset.image_size=64")
    output = " ".join(ended.out.split())
    assert ended.code == 0, ended.err
    assert "warning: the images are small: the shorter side of 8 sampled images has a median of 16 pixels" in output
    assert "16 times as many pixels as needed: set dataset.image_size=16" in output
    assert "warning" not in cli("ssl-train", *line, "dataset.image_size=16").out
