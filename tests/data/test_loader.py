from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sslcli.data.bad_images import TooManyBadImages
from sslcli.data.crops import ViewCrops
from sslcli.data.loader import Loader, plain_batches
from sslcli.data.order import epoch_order
from sslcli.data.sources.base import Shapes, Source
from sslcli.data.sources.files import Folder
from sslcli.data.views import augment
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError

VIEWS = [{"count": 2, "crop_scale": [0.3, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "grayscale": 0.2}]


def shapes(**options: object) -> Source:
    return Shapes(**({"image_size": 16, "train_images": 44, "test_images": 0, "seed": 0} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of 12 images, one of them broken."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(12):
            pixels = torch.randint(0, 256, (24, 20, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number:02d}.png")
    (root / "cat" / "05.png").write_bytes(b"<html>not found</html>")
    return root


def folder(root: Path, *, workers: int = 0, max_bad: float = 0.2) -> Source:
    options = {"image_size": 16, "val_fraction": 0.0, "workers": workers, "max_bad": max_bad, "seed": 0}
    return Folder(root=str(root), mean=[0.5] * 3, std=[0.25] * 3, **options)


def loader(source: Source, *, batch_size: int = 8, accumulate: int = 1, seed: int = 0) -> Loader:
    device = torch.device("cpu")
    return Loader(source, Views(VIEWS), batch_size=batch_size, accumulate=accumulate, seed=seed, device=device)


def by_image(train_loader: Loader, start: int, stop: int) -> dict[tuple[int, int], torch.Tensor]:
    """The views of each image, by step's epoch and index."""
    found = {}
    for step, batches in enumerate(train_loader.steps(start, stop), start=start):
        for batch in batches:
            for row, index in enumerate(batch.index.tolist()):
                found[step // train_loader.steps_per_epoch, index] = torch.stack([view[row] for view in batch.views])
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_pixel_and_no_order(images: Path, workers: int) -> None:
    alone = list(loader(folder(images)).steps(0, 5))
    helped = list(loader(folder(images, workers=workers)).steps(0, 5))
    for (one,), (other,) in zip(alone, helped, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(torch.stack(one.views), torch.stack(other.views))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (20, 1), (8, 4)])
def test_a_view_does_not_depend_on_the_batch_it_comes_in(batch_size: int, accumulate: int) -> None:
    train_loader = loader(shapes(val_fraction=0.0))
    other = loader(shapes(val_fraction=0.0), batch_size=batch_size, accumulate=accumulate)
    one, two = by_image(train_loader, 0, 5), by_image(other, 0, other.steps_per_epoch)
    common = one.keys() & two.keys()
    assert len(common) >= 32
    for key in common:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("files", [False, True])
def test_each_view_is_that_of_its_number_though_two_are_made_together(images: Path, files: bool) -> None:
    source = folder(images) if files else shapes(val_fraction=0.0)
    views = Views([VIEWS[0] | {"count": 3}, {"size": 12, "flip": 0.5}])
    train_loader = Loader(source, views, batch_size=6, accumulate=1, seed=0, device=torch.device("cpu"))
    request = next(train_loader.requests(0, 1))
    ((batch,),) = train_loader.steps(0, 1)
    assert len(batch.views) == 4
    key = train_loader.key(request)
    if files:
        _, alone, _, _ = ViewCrops(source, views, 0)[request]
        crops = [view.float().div(255) for view in alone]
    else:
        assert source.images is not None
        whole = source.images[source.splits["train"][request.index]]
        side = torch.full((6,), 16)
        crops = [
            augment.resized_crop(whole, views.boxes(number, key, side, side), size)
            for number, size in enumerate(views.sizes(16))
        ]
    for number, crop in enumerate(crops):
        wanted = views.color(number, key, crop, mean=source.mean, std=source.std)
        torch.testing.assert_close(batch.views[number], wanted, rtol=0, atol=1e-5)


def test_two_processes_see_the_halves_of_what_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [batch for (batch,) in loader(shapes()).steps(0, 6)]
    monkeypatch.setattr("sslcli.data.loader.world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr("sslcli.data.loader.rank", lambda rank=rank: rank)
        halves.append([batch for (batch,) in loader(shapes()).steps(0, 6)])
    for one, left, right in zip(whole, *halves, strict=True):
        assert torch.equal(one.index, torch.cat([left.index, right.index]))
        both = torch.cat([torch.stack(left.views), torch.stack(right.views)], dim=1)
        torch.testing.assert_close(torch.stack(one.views), both, rtol=0, atol=1e-6)


def test_a_run_resumed_within_an_epoch_sees_what_is_left_of_it() -> None:
    straight = [batch for (batch,) in loader(shapes()).steps(0, 9)]
    resumed = [batch for (batch,) in loader(shapes()).steps(3, 9)]
    for one, other in zip(straight[3:], resumed, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(torch.stack(one.views), torch.stack(other.views))


def test_views_differ_between_epochs_and_seeds() -> None:
    train_loader = loader(shapes(val_fraction=0.0))
    first, second = (
        by_image(train_loader, 0, train_loader.steps_per_epoch),
        by_image(train_loader, train_loader.steps_per_epoch, 2 * train_loader.steps_per_epoch),
    )
    other = by_image(loader(shapes(val_fraction=0.0), seed=1), 0, train_loader.steps_per_epoch)
    index = next(i for _, i in first if (1, i) in second and (0, i) in other)
    assert not torch.equal(first[0, index], second[1, index])
    assert not torch.equal(first[0, index], other[0, index])


def test_an_epoch_is_a_permutation_and_another_one_each_time() -> None:
    source = shapes()
    orders = [epoch_order(len(source.splits["train"]), source.weights, seed=0, epoch=epoch)[0] for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(len(source.splits["train"]))) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_weights_are_honored_exactly_and_repetitions_get_views_of_their_own() -> None:
    source = shapes(val_fraction=0.0)
    source.weights = torch.tensor([2.5] * 20 + [0.25] * 24)
    totals = torch.zeros(44)
    for epoch in range(4):
        index, occurrence = epoch_order(len(source.splits["train"]), source.weights, seed=0, epoch=epoch)
        counts = torch.bincount(index, minlength=44)
        assert counts[:20].sum() == 50
        assert counts[20:].sum() == 6
        assert counts[:20].min() == 2
        assert len(set(zip(index.tolist(), occurrence.tolist(), strict=True))) == len(index)
        totals += counts
    assert totals[20:].max() > totals[20:].min() >= 0


def test_a_batch_above_the_set_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size is 100, but the training split of shapes has 40 images"):
        loader(shapes(), batch_size=100)


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose a multiple of 3"):
        loader(shapes(), batch_size=8, accumulate=3)


def test_a_broken_image_is_replaced_the_same_way_each_time_and_counted(images: Path) -> None:
    source = folder(images)
    runs = [loader(source, batch_size=24) for _ in range(2)]
    (first,), (second,) = (next(run.steps(0, 1)) for run in runs)
    assert torch.equal(torch.stack(first.views), torch.stack(second.views))
    assert [run.bad.count for run in runs] == [1, 1]


def test_too_many_broken_images_end_the_run_with_their_paths(images: Path) -> None:
    with pytest.raises(TooManyBadImages, match=r"05\.png"):
        list(loader(folder(images, max_bad=0.0), batch_size=24).steps(0, 1))


def test_evaluation_marks_images_that_cannot_be_read(images: Path) -> None:
    source = folder(images)
    batches = list(plain_batches(source, source.splits["train"], batch_size=7))
    readable = torch.cat([mask for _, mask in batches])
    assert (~readable).sum() == 1
    assert source.path(int(source.splits["train"][~readable])).endswith("05.png")
    assert all(pixels.shape[1:] == (3, 16, 16) and pixels.dtype == torch.uint8 for pixels, _ in batches)


def test_a_default_number_of_workers_is_reduced_and_a_chosen_number_is_an_error(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslcli.data.num_workers.available_memory", lambda: 500_000_000)
    with pytest.raises(ConfigError, match=r"dataset.workers is 6, .* \(dataset.workers=4; "):
        loader(folder(images, workers=6))
    source = folder(images, workers=6)
    source.chooses_workers = True
    with pytest.warns(UserWarning, match="2 data workers per process instead of 6"):
        assert loader(source).workers == 2
    positions = torch.arange(24)
    with pytest.warns(UserWarning, match="2 data workers per process instead of 3"):
        assert len(list(plain_batches(folder(images, workers=6), positions, batch_size=8))) == 3


def seconds_waited(source: Source, device: str) -> float:
    """Return the seconds in which the loader waited for the images of three steps."""
    train_loader = Loader(source, Views(VIEWS), batch_size=8, accumulate=1, seed=0, device=torch.device(device))
    assert len(list(train_loader.steps(0, 3))) == 3
    return train_loader.seconds_waited


def test_a_slow_device_is_not_slow_data_but_a_slow_source_is(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_color(self: Views, view: object, key: object, pixels: torch.Tensor, **_: object) -> torch.Tensor:
        time.sleep(0.3)
        return pixels

    monkeypatch.setattr(Views, "color", slow_color)
    for source in (folder(images), shapes(val_fraction=0.0)):
        assert seconds_waited(source, "meta") < 0.6
    assert seconds_waited(shapes(val_fraction=0.0), "cpu") >= 0.9  # the CPU computes the views before the step

    def slow_read(self: ViewCrops, request: object, read: Any = ViewCrops.__getitem__) -> object:
        time.sleep(0.3)
        return read(self, request)

    monkeypatch.setattr(ViewCrops, "__getitem__", slow_read)
    assert 0.9 <= seconds_waited(folder(images), "meta") < 1.5


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_boxes_are_copied_to_a_gpu_without_waiting(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train_loader = loader(shapes())
    train_loader.device = torch.device(device)
    copies: list[bool] = []

    def copy(tensor: torch.Tensor, *args: Any, to: Any = torch.Tensor.to, **options: Any) -> torch.Tensor:
        if args[0] != train_loader.device:
            return to(tensor, *args, **options)  # type: ignore[no-any-return]
        copies.append(options["non_blocking"])
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(augment, "resized_crop", lambda images, boxes, size, **_: boxes)
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    assert train_loader.crop(images, torch.arange(4), range(2)).shape == (8, 4)
    assert copies == [device == "cuda"]
