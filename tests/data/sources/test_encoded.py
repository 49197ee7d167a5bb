"""Datasets of encoded images with other numbers of channels and other value ranges, from the file to the result."""

from __future__ import annotations

import csv
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import Cli
from small_shards import add
from small_tiffs import needs_tifffile, save_tiff
from sslcli.data.crops import PlainCrops
from sslcli.data.shards.source import HfStream
from sslcli.data.sources.encoded import EncodedImages
from sslcli.data.sources.files import Flat, Folder, ListFile
from sslcli.engine import checkpoint

LINE = [
    "dataset=folder",
    "dataset.image_size=16",
    "dataset.workers=0",
    "dataset.val_fraction=0.3",
    "backbone.width=4",
    "train.batch_size=8",
    "train.max_steps=4",
    "train.save_every_steps=2",
    "launcher.threads=1",
]


def fill(root: Path, kind: str) -> Path:
    """Two classes of 12 images, of which the second is darker."""
    for number in range(24):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).random((20, 24, 5)) / (1 + number % 2)
        if kind == "gray":
            Image.fromarray((values[..., 0] * 255).astype(np.uint8)).save(folder / f"{number}.png")
        elif kind == "rgba":
            Image.fromarray((values[..., :4] * 255).astype(np.uint8)).save(folder / f"{number}.png")
        elif kind == "12 bits":
            Image.fromarray((values[..., 0] * 4095).astype(np.uint16)).save(folder / f"{number}.png")
        else:
            save_tiff(folder / f"{number}.tif", (values * 4095).astype(np.uint16), planar=True)
    return root


@pytest.mark.parametrize(
    ("kind", "channels"),
    [("gray", 1), ("12 bits", 3), ("rgba", 4), pytest.param("bands", 5, marks=needs_tifffile)],
)
def test_a_run_is_trained_resumed_evaluated_and_exported(kind: str, channels: int, cli: Cli, tmp_path: Path) -> None:
    images = fill(tmp_path / "images", kind)
    line = [*LINE, f"dataset.root={images}", f"dataset.channels={channels}"]
    ended = cli("ssl-train", *line, "run_dir=run")
    assert ended.code == 0, ended.err
    assert list((tmp_path / "run").rglob("*.png"))
    shutil.copytree("run", "part", symlinks=True)
    checkpoint.all_of(tmp_path / "part")[-1].unlink()
    Path("part/done").unlink()
    ended = cli("ssl-train", *line, "run_dir=part")
    assert ended.code == 0, ended.err
    assert "step 3" in ended.out
    whole, resumed = (
        torch.load(checkpoint.all_of(tmp_path / name)[-1], weights_only=True)["method"] for name in ("run", "part")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert whole["backbone.block1.0.weight"].shape[1] == channels
    other = ["dataset=folder", "dataset.image_size=16", "dataset.workers=0", f"dataset.root={images}"]
    for arguments in (
        ["ssl-eval", "run=run", "protocol=knn"],
        ["ssl-eval", "run=run", "protocol=knn", *other],
        ["ssl-export", "run=run", "out=net.pt"],
        ["ssl-eval", "weights=net.pt", "protocol=knn", *other],
    ):
        ended = cli(*arguments)
        assert ended.code == 0, (arguments, ended.err)


def datasets(root: Path, **options: Any) -> list[EncodedImages]:
    """The same images in four kinds of datasets."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    with open(root.parent / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path"], *([name] for name in files)])
    with tarfile.open(root.parent / "shard.tar", "w") as tar:
        for number, name in enumerate(files):
            add(tar, f"{number:02d}.png", (root / name).read_bytes())
    common = {"image_size": 16, "val_fraction": 0.0, "value_range": "auto"} | options
    return [
        Folder(root=str(root), **common),
        Flat(root=str(root), **common),
        ListFile(file=str(root.parent / "list.csv"), root=str(root), **common),
        HfStream(path=str(root.parent / "shard.tar"), cache=str(root.parent / "cache"), **common),
    ]


def test_all_datasets_of_encoded_images_read_the_same_pixels(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "12 bits")
    for options, most in (({"channels": 1}, 255), ({"channels": 1, "value_range": "full"}, 16), ({}, 255)):
        first, *others = ([np.asarray(s.read(i)) for i in range(24)] for s in datasets(root, **options))
        assert first[0].shape == (20, 24, options.get("channels", 3))
        assert max(int(image.max()) for image in first) == pytest.approx(most, abs=1)
        for other in others:
            assert all(np.array_equal(one, another) for one, another in zip(first, other, strict=True))


def test_an_unreadable_image_becomes_a_blank_one_with_the_same_channels(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "gray")
    (root / "a/0.png").write_bytes(b"")
    images, readable = PlainCrops(Flat(root=str(root), image_size=16, channels=1))[torch.arange(24)]
    assert images.shape == (24, 1, 16, 16)
    assert readable.tolist() == [False] + [True] * 23
    assert not images[0].any()


def test_the_version_of_the_images_depends_on_their_format(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "gray")
    formats: list[dict[str, Any]] = [{}, {"value_range": "auto"}, {"value_range": [0, 9]}, {"channels": 1}]
    versions = {Flat(root=str(root), image_size=16, **options).version for options in formats}
    assert len(versions) == len(formats)
    assert len({Flat(root=str(root), image_size=16, **options).fingerprint for options in formats}) == 1


def test_mean_and_std_have_one_value_per_channel(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "gray")
    assert Flat(root=str(root), image_size=16, channels=2).mean == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"dataset\.mean is \[0.5\], but it must be 2 numbers"):
        Flat(root=str(root), image_size=16, channels=2, mean=[0.5])
