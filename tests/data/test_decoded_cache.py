"""Cache of decoded images: the images are bit-identical with and without it, also if it is damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sslcli.data import decode, decoded_cache
from sslcli.data.loader import Loader, plain_batches
from sslcli.data.sources.files import Flat
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError

COUNT = 14


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """JPEGs of several sizes, one that is none, and one of which half is missing."""
    root = tmp_path / "photos"
    root.mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (40 + number, 51, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.jpg")
    (root / "02.jpg").write_bytes(b"<html>not found</html>")
    (root / "03.jpg").write_bytes((root / "03.jpg").read_bytes()[:900])
    return root


def source(root: Path, kind: str, **options: Any) -> Flat:
    where = {"keep_decoded": kind, "keep_dir": str(root.parent / "kept")}
    return Flat(root=str(root), **({"image_size": 24, "max_bad": 0.5} | where | options))


def epochs(photo_set: Flat, *, stop: int = 6) -> Tensor:
    """The views of three epochs and the images of an evaluation, as one tensor."""
    views = Views([{"count": 2, "jitter": [0.4, 0.4, 0.4, 0.1]}, {"size": 8, "crop_scale": [0.3, 1.0]}])
    loader = Loader(photo_set, views, batch_size=6, accumulate=1, seed=0, device=torch.device("cpu"))
    seen = [view.flatten() for (batch,) in loader.steps(0, stop) for view in batch.views]
    seen += [images.flatten().float() for images, _ in plain_batches(photo_set, torch.arange(COUNT), batch_size=8)]
    return torch.cat(seen)


def pixel_file(root: Path) -> Path:
    (found,) = (root.parent / "kept").iterdir()
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_batches_are_the_same_and_each_file_is_decoded_whole_once(
    photos: Path, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = epochs(source(photos, "none"))
    photo_set = source(photos, kind, workers=workers)
    assert torch.equal(epochs(photo_set), wanted)
    # What the workers decoded is here as well.
    assert photo_set.decoded_cache is not None
    assert photo_set.decoded_cache.checksums.astype(bool).tolist() == [number not in (2, 3) for number in range(COUNT)]
    monkeypatch.setattr(decode.Encoded, "decode", None)
    assert all(np.asarray(photo_set.read(number)).any() for number in range(4, COUNT))


def test_another_process_goes_on_with_the_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = epochs(source(photos, "none"))
    child = os.fork()
    if child == 0:
        # Ends as a killed process does, in the middle of the set.
        epochs(source(photos, "disk"), stop=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    photo_set = source(photos, "disk")
    assert photo_set.decoded_cache is not None
    assert photo_set.decoded_cache.checksums.any()
    assert torch.equal(epochs(photo_set), wanted)


def test_two_that_make_the_file_at_the_same_time_share_it(photos: Path) -> None:
    one = source(photos, "disk")
    assert one.decoded_cache is not None
    head = bytes(one.decoded_cache.memory[: decoded_cache._HEADER + 8 * COUNT])  # type: ignore[index]
    other = one.decoded_cache.create_file(head, len(one.decoded_cache.memory))  # type: ignore[arg-type]
    one.read(0)
    assert other[:] == one.decoded_cache.memory[:]  # type: ignore[index]


@pytest.mark.parametrize("where", ["header", "sizes", "marks", "pixels", "cut", "empty"])
def test_a_damaged_file_changes_nothing(photos: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    wanted = epochs(source(photos, "disk"))
    path = pixel_file(photos)
    content = bytearray(path.read_bytes())
    place = {
        "header": 20,
        "sizes": decoded_cache._HEADER + 4,
        "marks": decoded_cache._HEADER + 8 * COUNT + 1,
        "pixels": len(content) - 9,
    }
    if where in place:
        content[place[where]] ^= 0x5A
    damaged = bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(where)])
    path.write_bytes(damaged)
    assert torch.equal(epochs(source(photos, "disk")), wanted)
    aside = path.with_name(f"{path.name}.damaged")
    assert ("is damaged" in caplog.text) == aside.exists() == (where in ("header", "sizes", "cut", "empty"))
    assert not aside.exists() or aside.read_bytes() == damaged
    assert torch.equal(epochs(source(photos, "disk")), wanted)


def test_a_changed_image_is_decoded_anew(photos: Path) -> None:
    epochs(source(photos, "disk"))
    Image.new("RGB", (51, 44), (7, 7, 7)).save(photos / "04.jpg")
    assert np.asarray(source(photos, "disk").read(4)).max() <= 9


def test_an_image_replaced_by_one_of_the_same_size_is_decoded_anew(photos: Path) -> None:
    """A cached image must not be used for another file at the same path."""
    for number in (6, 7):
        Image.new("RGB", (30, 30), (number * 30,) * 3).save(photos / f"{number:02d}.bmp")
    before = source(photos, "disk")
    at = [next(i for i in range(len(before)) if before.path(i).endswith(f"{number:02d}.bmp")) for number in (6, 7)]
    assert [int(np.asarray(before.read(position))[0, 0, 0]) for position in at] == [180, 210]
    found = (photos / "06.bmp").stat()
    Image.new("RGB", (30, 30), (9, 9, 9)).save(photos / "06.bmp")
    os.utime(photos / "06.bmp", ns=(found.st_atime_ns, found.st_mtime_ns + 1000))
    assert (photos / "06.bmp").stat().st_size == found.st_size
    assert [int(np.asarray(source(photos, "disk").read(position))[0, 0, 0]) for position in at] == [9, 210]


def test_a_set_that_does_not_fit_is_refused_with_its_size(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"needs about 0\.00 GB for 14 images, but dataset\.keep_gb is 1e-06"):
        source(photos, "ram", keep_gb=1e-6)
    with pytest.raises(ConfigError, match=r"needs 0\.00 GB for 14 images, but dataset\.keep_gb is 8e-05"):
        source(photos, "ram", keep_gb=8e-5)
    monkeypatch.setattr(decoded_cache, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"keep_decoded=ram needs .* only 0\.00 GB of memory are free"):
        source(photos, "ram")


def test_a_full_disk_is_an_error_before_training(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"needs 0\.00 GB in .*kept, where .*No space left on device"):
        source(photos, "disk")
    assert not list((photos.parent / "kept").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_decoded": "disc"}, r"keep_decoded is 'disc', .*none, ram, disk\. Did you mean 'disk'"),
        ({"keep_gb": 0}, r"keep_gb is 0, but it must be a number above 0"),
        ({"keep_gb": "8"}, r"keep_gb is '8'"),
    ],
)
def test_wrong_options_are_named(photos: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(photos, "ram", **options)


@pytest.mark.parametrize("options", [{"channels": 1}, {"value_range": "auto"}, {"value_range": [0, 100]}])
def test_the_cache_has_the_format_of_the_images(photos: Path, options: dict[str, Any]) -> None:
    ordinary = epochs(source(photos, "disk"))
    if "channels" in options:
        options = options | {"mean": [0.5], "std": [0.25]}
    wanted = epochs(source(photos, "none", **options))
    for _ in range(2):
        assert torch.equal(epochs(source(photos, "disk", **options)), wanted)
    assert torch.equal(epochs(source(photos, "disk")), ordinary)
    assert len(list((photos.parent / "kept").iterdir())) == 2
