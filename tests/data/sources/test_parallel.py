from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from sslcli.data.bad_images import BadImage
from sslcli.data.loader import Loader, plain_batches
from sslcli.data.sources.parallel import Parallel
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError

RGB: dict[str, Any] = {"channels": 3, "photometric": True}
DEPTH: dict[str, Any] = {"channels": 1, "interpolation": "nearest"}
BOTH = {"rgb": RGB, "depth": DEPTH}
STRONG = [{"count": 2, "crop_scale": [0.2, 0.6], "jitter": [0.8, 0.8, 0.8, 0.2], "blur": 1.0, "solarize": 0.5}]


def ramp(number: int, width: int = 20, height: int = 24) -> np.ndarray[Any, Any]:
    """Return an 8-bit image (H, W) that differs for each number and encodes the position of each pixel."""
    across = np.arange(width)[None] * 5 + np.arange(height)[:, None] * 4
    return ((across + 7 * number) % 256).astype(np.uint8)


def write(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of eight images; the depth is the red channel, of another kind of file."""
    for number in range(16):
        red = ramp(number)
        place = f"{'ab'[number % 2]}/{number:02d}"
        write(tmp_path / "rgb" / f"{place}.png", np.stack([red, red // 2, 255 - red], 2))
        write(tmp_path / "depth" / f"{place}.BMP", red)
    return tmp_path


def parallel(root: Path, modalities: dict[str, Any] | None = None, **options: Any) -> Parallel:
    modalities = modalities or BOTH
    channels = sum(modality["channels"] for modality in modalities.values())
    common = {"image_size": 16, "val_fraction": 0.0, "workers": 0, "max_bad": 0.3, "seed": 0}
    common |= {"mean": [0.3, 0.4, 0.5, 0.6][:channels], "std": [0.1, 0.2, 0.3, 0.4][:channels]}
    return Parallel(root=str(root), modalities=modalities, **(common | options))


def batches(source: Parallel, views: list[dict[str, Any]], *, normalize: bool = False, steps: int = 2) -> list[Any]:
    parsed = Views(views, normalize=normalize)
    loader = Loader(source, parsed, batch_size=8, accumulate=1, seed=0, device=torch.device("cpu"))
    return [batch for (batch,) in loader.steps(0, steps)]


def test_channels_are_stacked_in_declared_order_with_the_constants_of_each(root: Path) -> None:
    source = parallel(root)
    assert (len(source), source.channels, source.classes) == (16, 4, ["a", "b"])
    assert source.modality_channels == [slice(0, 3), slice(3, 4)]
    assert source.present.tolist() == [[True, True]] * 16
    first = np.asarray(source.read(0))
    assert first.shape == (24, 20, 4)
    assert (first[..., [0, 3]] == ramp(0)[..., None]).all()
    turned = parallel(root, {"depth": DEPTH, "rgb": RGB})
    assert (np.asarray(turned.read(0)) == first[..., [3, 0, 1, 2]]).all()
    assert turned.photometric == slice(1, 4)
    assert source.labels.tolist() == [0] * 8 + [1] * 8
    assert source.relative(0) == "a/00"
    assert source.path(0) == str(root / "rgb/a/00.png")


def test_modalities_are_matched_by_class_and_stem_whatever_the_order_of_files(root: Path) -> None:
    source = parallel(root)
    for position in range(len(source)):
        layers = np.asarray(source.read(position))
        assert (layers[..., 0] == layers[..., 3]).all()


def test_crop_and_flip_are_the_same_for_all_modalities(root: Path) -> None:
    smooth = {"rgb": RGB, "depth": DEPTH | {"interpolation": "smooth"}}
    plain = [{"count": 2, "crop_scale": [0.2, 0.6], "flip": 0.5}]
    for batch in batches(parallel(root, smooth), plain):
        for view in batch.views:
            assert view.shape == (8, 4, 16, 16)
            torch.testing.assert_close(view[:, 0], view[:, 3])


def test_a_nearest_modality_has_only_values_of_its_file(root: Path) -> None:
    for path in (root / "depth").rglob("*.BMP"):
        write(path, np.where(np.asarray(Image.open(path)) > 90, 200, 30).astype(np.uint8))
    depth = torch.cat([view[:, 3] for batch in batches(parallel(root), STRONG) for view in batch.views])
    assert set((depth * 255).round().int().unique().tolist()) == {30, 200}


def test_color_operations_change_the_photometric_modality_alone(root: Path) -> None:
    source = parallel(root)
    still: list[dict[str, Any]] = [{"count": 2, "crop_scale": [0.2, 0.6]}]
    for strong, weak in zip(batches(source, STRONG), batches(source, still), strict=True):
        for one, other in zip(strong.views, weak.views, strict=True):
            assert torch.equal(one[:, 3], other[:, 3])
            assert (one[:, :3] - other[:, :3]).abs().amax((1, 2, 3)).min() > 0.05
    nothing = parallel(root, {"rgb": RGB | {"photometric": False}, "depth": DEPTH})
    for strong, weak in zip(batches(nothing, STRONG), batches(nothing, still), strict=True):
        assert torch.equal(torch.stack(strong.views), torch.stack(weak.views))


def test_the_photometric_modality_is_what_a_set_of_it_alone_would_be(root: Path) -> None:
    alone = parallel(root, {"rgb": RGB})
    for one, other in zip(batches(parallel(root), STRONG), batches(alone, STRONG), strict=True):
        torch.testing.assert_close(torch.stack(one.views)[:, :, :3], torch.stack(other.views))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, workers: int) -> None:
    (root / "depth" / "a" / "04.BMP").unlink()
    optional = {"rgb": RGB, "depth": DEPTH | {"optional": True}}
    pair = (batches(parallel(root, optional, workers=n), STRONG) for n in (0, workers))
    for one, other in zip(*pair, strict=True):
        assert torch.equal(torch.stack(one.views), torch.stack(other.views))
        assert torch.equal(one.present, other.present)


def test_an_optional_modality_may_be_absent_and_is_marked(root: Path) -> None:
    absent = {"a/04", "b/07"}
    for name in absent:
        (root / "depth" / f"{name}.BMP").unlink()
    (root / "rgb" / "b" / "09.png").unlink()
    optional = {"rgb": RGB | {"optional": True}, "depth": DEPTH | {"optional": True}}
    source = parallel(root, optional)
    assert len(source) == 16
    seen: dict[str, list[bool]] = {}
    for batch in batches(source, [{"flip": 0.5}], normalize=True):
        assert batch.present.dtype == torch.bool
        for index, present, image in zip(batch.index.tolist(), batch.present.tolist(), batch.views[0], strict=True):
            name = source.relative(int(source.splits["train"][index]))
            seen[name] = present
            # A byte is off by up to half a step from the mean: 0.5 / 255 / 0.1.
            assert (image[3].abs().max() < 0.02) == (not present[1])
            assert (image[:3].abs().max() < 0.02) == (not present[0])
    assert len(seen) == 16
    assert {name for name, present in seen.items() if not present[1]} == absent
    assert {name for name, present in seen.items() if not present[0]} == {"b/09"}
    position = next(p for p in range(16) if source.relative(p) == "b/09")
    assert source.path(position).endswith("depth/b/09.BMP")


def test_a_required_modality_that_is_absent_is_an_error_with_a_name_and_a_remedy(root: Path) -> None:
    (root / "depth" / "a" / "04.BMP").unlink()
    with pytest.raises(ValueError, match=r"depth lacks 1 of 16 images, such as a/04: .*depth\.optional=true"):
        parallel(root)


def test_a_file_that_cannot_be_read_is_replaced_whole_and_the_marks_are_those_of_the_other(root: Path) -> None:
    (root / "depth" / "a" / "04.BMP").write_bytes(b"<html>")
    for number in range(16):  # all others lack their depth but one that is broken too: what stands in has none
        if number not in (4, 7):
            (root / "depth" / "ab"[number % 2] / f"{number:02d}.BMP").unlink()
    (root / "depth" / "b" / "07.BMP").write_bytes(b"<html>")
    source = parallel(root, {"rgb": RGB, "depth": DEPTH | {"optional": True}})
    with pytest.raises(BadImage, match=r"depth/a/04\.BMP"):
        source.read(next(p for p in range(16) if source.relative(p) == "a/04"))
    found = batches(source, [{"flip": 0.0, "crop_scale": None}])
    assert sum(len(batch.present) for batch in found) == 16
    assert not any(batch.present[:, 1].any() for batch in found)
    assert all(batch.present[:, 0].all() for batch in found)


def test_evaluation_sees_all_channels_and_leaves_out_what_cannot_be_read(root: Path) -> None:
    (root / "rgb" / "a" / "02.png").write_bytes(b"")
    source = parallel(root)
    for workers in (0, 1):
        found = list(plain_batches(source, torch.arange(16), batch_size=10, workers=workers))
        images, readable = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert images.shape == (16, 4, 16, 16)
        assert images.dtype == torch.uint8
        assert [source.relative(p) for p in range(16) if not readable[p]] == ["a/02"]
    assert Views(STRONG).finish(images / 255, mean=source.mean, std=source.std).shape == images.shape


def test_a_span_keeps_what_16_bits_say(root: Path) -> None:
    for path in list((root / "depth").rglob("*.BMP")):
        write(path.with_suffix(".png"), np.asarray(Image.open(path)).astype(np.uint16) * 40)
        path.unlink()
    spanned = parallel(root, {"rgb": RGB, "depth": DEPTH | {"span": [0, 10_200]}})
    layers = np.asarray(spanned.read(3))
    assert (layers[..., 3] == layers[..., 0]).all()
    clipped = parallel(root, {"rgb": RGB, "depth": DEPTH | {"span": [2000, 4000]}})
    want = np.rint(((layers[..., 0].astype(float) * 40 - 2000) / 2000).clip(0, 1) * 255)
    assert (np.asarray(clipped.read(3))[..., 3] == want).all()
    whole = np.asarray(parallel(root).read(3))[..., 3]
    assert abs(whole.astype(float) - layers[..., 0].astype(float) * 40 / 65535 * 255).max() <= 0.5


def test_other_sizes_of_one_shape_are_brought_together_and_other_shapes_refused(root: Path) -> None:
    half = np.asarray(Image.fromarray(ramp(0)).resize((10, 12), Image.Resampling.NEAREST))
    write(root / "depth" / "a" / "00.BMP", half)
    layers = np.asarray(parallel(root).read(0))
    assert layers.shape == (24, 20, 4)
    assert (layers[::2, ::2, 3] == half).all()
    assert (layers[1::2, 1::2, 3] == half).all()
    write(root / "depth" / "a" / "00.BMP", ramp(0, width=40))
    with pytest.raises(BadImage, match="40 x 24 pixels differ in aspect ratio from the 20 x 24 of"):
        parallel(root).read(0)


def test_the_fingerprint_and_the_split_are_of_what_there_is(root: Path, tmp_path: Path) -> None:
    source = parallel(root, val_fraction=0.25)
    again = parallel(root, val_fraction=0.25)
    assert source.fingerprint == again.fingerprint
    other = parallel(root, {"depth": DEPTH, "rgb": RGB}, val_fraction=0.25)
    assert torch.equal(other.splits["val"], source.splits["val"])
    assert other.fingerprint != source.fingerprint
    write(root / "depth" / "a" / "00.BMP", ramp(0, width=10, height=12))
    assert parallel(root).fingerprint != source.fingerprint


def test_a_test_split_of_its_own(root: Path, tmp_path: Path) -> None:
    official = tmp_path / "official"
    for name in ("rgb", "depth"):
        write(official / name / "b" / "x.png", ramp(3))
    source = parallel(root, test=str(official))
    assert source.splits["test"].tolist() == [16]
    assert source.labels[16] == 1
    assert source.path(16) == str(official / "rgb" / "b" / "x.png")
    for name in ("rgb", "depth"):
        write(official / name / "zebra" / "x.png", ramp(3))
    with pytest.raises(ValueError, match="class folder 'zebra'"):
        parallel(root, test=str(official))


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({}, "must have at least one folder"),
        ([], "must have at least one folder"),
        ({"rgb": 3}, r"modalities\.rgb is 3, but it must be a mapping of channels"),
        ({"rgb": RGB | {"channel": 3}}, r"modalities\.rgb has the unknown key 'channel'\. Did you mean 'channels'\?"),
        ({"rgb": RGB | {"channels": 4}}, r"modalities\.rgb\.channels is 4, but it must be 1 or 3"),
        ({"rgb": RGB | {"interpolation": "cubic"}}, "must be smooth or nearest"),
        ({"rgb": RGB | {"optional": 1}}, r"rgb\.optional is 1, but it must be true or false"),
        ({"rgb": RGB | {"span": [0, 1]}}, "only a modality with one channel"),
        ({"depth": DEPTH | {"span": [5, 1]}}, "two numbers, the lower one first"),
        ({"rgb": RGB, "depth": DEPTH | {"photometric": True}}, "several photometric modalities"),
        ({"rgb": RGB | {"optional": True}}, "is the only modality, so it cannot be optional"),
        (BOTH, r"dataset\.mean is \[0\.5, 0\.5, 0\.5\], but it must be 4 numbers"),
        (
            {"rgb": RGB | {"channels": 1}, "d": DEPTH, "ir": DEPTH},
            r"dataset\.root/d \(a modality\) is .* cannot be opened",
        ),
    ],
)
def test_wrong_modalities_are_refused(root: Path, modalities: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parallel(root=str(root), modalities=modalities, image_size=16)


def test_two_files_of_one_image_are_refused(root: Path) -> None:
    write(root / "rgb" / "a" / "00.bmp", ramp(0))
    with pytest.raises(ValueError, match=r"a/00\.bmp and a/00\.png: keep one"):
        parallel(root)


def test_the_yaml_shows_every_field_and_builds(root: Path) -> None:
    config = yaml.safe_load((Path(__file__).parents[3] / "conf" / "dataset" / "parallel.yaml").read_text())
    assert config.pop("_target_") == "sslcli.data.sources.parallel.Parallel"
    assert Parallel(**(config | {"root": str(root)})).channels == 4


def test_the_views_of_a_batch_are_tensors_of_channels_last(root: Path) -> None:
    view: Tensor = batches(parallel(root), STRONG)[0].views[0]
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_the_training_folder_cannot_be_the_test_folder(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.test is .*rgb, which is the same folder as dataset.root="):
        parallel(root, test=str(root))
