"""Feature extraction, shared by all protocols.

    source -> plain_batches (uint8) -> device, [0, 1] -> prepare (color, normalize) -> encode -> CPU

Features are stored in the dtype of the forward pass. With bfloat16, convolutions and matrix products have 16-bit
outputs, which are stored without loss. If the last layer is a normalization layer, its float32 output is rounded to
bfloat16. Features of a bfloat16 network are not stored in the more precise float16, because its range is only 6e-8 to
65,504 and features may have any scale.

The monitor during training and `ssl-eval` both call `extract`, so both report the same accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.data.loader import plain_batches
from sslcli.distributed import collectives, shared_work, watchdog
from sslcli.distributed.devices import copy_to, unchanged_random_state
from sslcli.engine.precision import DTYPES, autocast
from sslcli.errors import ConfigError, NotFinite, is_out_of_memory
from sslcli.system.memory import available_memory

if TYPE_CHECKING:
    from sslcli.data.sources.base import Source

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features and labels of the splits of one dataset.

    `val` is the held-out part of the training images, and `test` is the official test split. Either `val` or `test` may
    be None.

    - Features are (n, d) floats of 16 or 32 bits, all finite.
    - Labels are (n,) int64 in [0, num_classes).
    - Positions are (n,) int64, the indices of the images in their source. Protocols that read the images need the
      positions.

    Raises ValueError, with the name of the split, if the tensors of a split are invalid.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor | None = None
    val_labels: Tensor | None = None
    test: Tensor | None = None
    test_labels: Tensor | None = None
    train_positions: Tensor | None = None
    val_positions: Tensor | None = None
    test_positions: Tensor | None = None
    num_classes: int
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            features, labels = getattr(self, name), getattr(self, f"{name}_labels")
            if (features is None) != (labels is None):
                raise ValueError(f"split {name!r} has features or labels but not both: pass both or neither")
            if features is not None:
                check_features(features, labels, num_classes=self.num_classes, width=self.train.shape[-1], name=name)
        if self.val is None and self.test is None:
            raise ValueError("a feature set needs a val or a test split: set dataset.val_fraction above 0")

    def reported(self) -> tuple[str, Tensor, Tensor]:
        """Return name, features and labels of the split to report: test if it exists, else val."""
        name = "val" if self.test is None else "test"
        return name, getattr(self, name), getattr(self, f"{name}_labels")

    def to(self, device: torch.device | str) -> FeatureSet:
        """Return a copy with all tensors on `device`. Protocols compute on the device of the features."""
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return FeatureSet(**moved)


def computed(
    protocol: Callable[..., dict[str, Any]], features: FeatureSet, device: torch.device, **given: Any
) -> dict[str, Any]:
    """Return `protocol(features, **given)`, computed on `device`, or on the CPU if the GPU has too little memory.

    With several processes, all of them must call `computed`, and all compute on the CPU if one GPU lacks memory. With
    MPS, the CPU computes, see `with_fallback`.
    """
    return with_fallback(
        device,
        lambda: protocol(shared_work.agreed(partial(features.to, device)), **given),
        lambda: protocol(features, **given),
    )


def computed_on(device: torch.device, compute: Callable[..., T], *tensors: Tensor) -> T:
    """Return `compute(*tensors)` with the tensors on `device`, or on the CPU if the GPU has too little memory.

    With MPS, the CPU computes, see `with_fallback`.
    """
    return with_fallback(device, lambda: compute(*(tensor.to(device) for tensor in tensors)), lambda: compute(*tensors))


def with_fallback(device: torch.device, on_device: Callable[[], T], on_cpu: Callable[[], T]) -> T:
    """Return `on_device()`, or `on_cpu()` if the GPU has too little memory or `device` is not a GPU.

    With MPS, the CPU computes, because MPS lacks float64 and is not tested.
    """
    if device.type not in ("cpu", "mps"):
        try:
            return on_device()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return on_cpu()


def from_bank(features: FeatureSet, rows: Tensor, split: Tensor) -> FeatureSet:
    """Return a copy of `features` in which the rows of a memory bank replace the train features.

    The bank has rows only for images of the training split. Other images are dropped. There are such images if a
    protocol uses the labels of "val", and the images of "val" are not pre-trained on.

    Args:
        features: features with d dimensions.
        rows: (n, d), one row per image of the training split. All-zero rows were never written and are dropped.
        split: (n,) positions of the training images in their source.

    Raises ValueError if the numbers of rows and of training images differ.
    """
    if len(rows) != len(split):
        raise ValueError(f"the memory bank has {len(rows):,} rows, but the training split {len(split):,} images")
    assert features.train_positions is not None
    ordered, places = split.sort()
    index = torch.searchsorted(ordered, features.train_positions).clamp(max=len(ordered) - 1)
    mine = rows.float().cpu()[places[index]]
    known = mine.any(1) & (ordered[index] == features.train_positions)
    return replace(
        features,
        train=mine[known],
        train_labels=features.train_labels[known],
        train_positions=features.train_positions[known],
    )


def check_features(features: Tensor, labels: Tensor, *, num_classes: int, width: int, name: str) -> None:
    """Raise ValueError unless features are finite (n, width), n >= 1, and labels (n,) int64 in [0, num_classes)."""
    if features.ndim != 2 or len(features) == 0 or features.shape[1] != width:
        raise ValueError(
            f"{name} features have shape {tuple(features.shape)}, but must be (n, {width}) with at least one row"
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{name} labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, but must be int64, one for each "
            f"of the {len(features)} feature rows"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"{name} labels run from {int(labels.min())} to {int(labels.max())}, but must be in [0, {num_classes}): "
            "-1 marks an unlabeled image, which no probe can use; choose labeled positions or another dataset"
        )
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        raise NotFinite(
            f"{name} features of {bad} of {len(features)} images are NaN or infinite: the checkpoint has diverged, "
            "or 16 bits are too few for this net; evaluate an earlier one, or with train.precision=fp32"
        )


def extract(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    positions: Tensor,
    *,
    prepare: Callable[[Tensor], Tensor],
    batch_size: int,
    device: torch.device | str,
    precision: str,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    is_sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Extract the features of the images of `source` at `positions` (n,) int64.

    Returns the features (n, d) in the order of `positions`, and a mask (n,) bool that is False for unreadable images.
    Both tensors are on the CPU. An unreadable image is replaced by a blank image, so the caller must drop its features.
    The features are float32 if `precision` is fp32, bfloat16 if it is bf16, and float16 if it is fp16.

    `prepare` maps float images (N, C, S, S) in [0, 1] to the network's input (`Views.finish`), and `encode` maps this
    input to (N, d). The caller must put the network in eval mode with `evaluating`. `progress(done, total)` is called
    after each batch. `extract` changes no parameter, buffer or random state, so it has no effect on training.

    With several processes, all of them must call `extract` with the same arguments. Each process reads and encodes a
    part of the batches, and all processes return all features. The batches are those of one process, because the last
    bits of a feature may depend on the other images of its batch. If `is_sharded` is True, the parameters of the
    network are sharded over the processes. All processes then call `encode` equally often, and an error on one process
    is not raised on the others.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1: 256 is usual")
    if len(positions) == 0:
        raise ValueError("there are no images to extract features of: the split is empty; check dataset.limit")
    parts = shared_work.parts(len(positions), chunk=batch_size)
    mine, sizes = parts[collectives.rank()], [len(part) for part in parts]
    own, done = positions[mine.start : mine.stop], 0

    encode_own = partial(encode_batch, encode, prepare=prepare, device=torch.device(device), precision=precision)

    def report(count: int) -> None:
        nonlocal done
        done += count
        watchdog.report_progress()
        if progress is not None:
            progress(len(positions) * done // len(own), len(positions))

    def extract_own() -> tuple[Tensor, Tensor]:
        batches_of_own = plain_batches(source, own, batch_size=batch_size, workers=workers) if len(own) else ()
        # A DataLoader draws the base seed of its workers from the global generator, so fork the generator's state.
        with unchanged_random_state(torch.device(device)):
            features, readable = _extract_part(
                encode_own, batches_of_own, len(own), report=report, gathered=len(positions)
            )
            if features is None or math.ceil(len(own) / batch_size) < math.ceil(max(sizes) / batch_size):
                blank = torch.zeros(1, source.channels, source.image_size, source.image_size, dtype=torch.uint8)
                empty = encode_own(blank)[:0]  # has the shape (0, d), which a process without images needs
                features = empty if features is None else features
        return features, readable

    watchdog.report_progress(f"{watchdog.IMAGES} of an evaluation")
    features, readable = extract_own() if is_sharded else shared_work.agreed(extract_own)
    watchdog.report_progress("an evaluation")
    gathered = shared_work.gather_parts(features, sizes)
    return gathered, shared_work.gather_parts(readable.to(torch.uint8), sizes).bool()


def _extract_part(
    encode_own: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    total: int,
    *,
    report: Callable[[int], None],
    gathered: int,
) -> tuple[Tensor | None, Tensor]:
    """Return the features (total, d) of `batches`, and a mask (total,) of the readable images.

    The features are None if `batches` is empty. `report(n)` is called after each batch of n images. Raises ConfigError
    if the features of the images of all processes, `gathered`, do not fit into the available memory.
    """
    features: Tensor | None = None
    readable = torch.empty(total, dtype=torch.bool)
    done = 0
    for images, whole in batches:
        batch = encode_own(images)
        if features is None:
            check_memory(gathered * batch[0].nbytes, images=gathered, width=batch.shape[1])
            features = torch.empty(total, batch.shape[1], dtype=batch.dtype)
        features[done : done + len(batch)] = batch
        readable[done : done + len(batch)] = whole
        done += len(batch)
        report(len(batch))
    assert done == total
    return features, readable


def check_memory(needed: int, *, images: int, width: int) -> None:
    """Raise ConfigError if the features of `images` images, `width` values each, take more than the available memory.

    `needed` is their memory in bytes. Linux may grant memory that does not exist, and end the process later.
    """
    free = available_memory()
    if needed > free:
        raise ConfigError(
            f"the features of {images:,} images with {width:,} values each take {needed / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} GiB of memory are available: evaluate fewer images (dataset.limit) or another "
            "feature_layer; with protocol=attentive, protocol.crop_scale=[0.08,1] computes the tokens in every step"
        )


@torch.inference_mode()
def encode_batch(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    precision: str,
) -> Tensor:
    """Encode uint8 images (N, C, S, S). The returned features (N, d) are a CPU tensor with the dtype of `precision`.

    The images are first scaled to [0, 1]. `prepare` then converts them, for example by normalization, to the input of
    `encode`.
    """
    prepared = prepare(copy_to(device, images).float() / 255)
    with autocast(device, precision):
        features = encode(prepared.contiguous(memory_format=torch.channels_last))
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"encode returned shape {tuple(features.shape)} for {len(images)} images, but must return (N, d): pool "
            "feature maps first"
        )
    return features.to(DTYPES[precision]).cpu()


def pixels(images: Tensor) -> Tensor:
    """Return the pixels of images (N, C, H, W) as features (N, d). They are a baseline for learned features.

    If the longer side of the images exceeds 32 pixels, area averaging reduces this side to 32 pixels. d is therefore at
    most C * 1024.
    """
    height, width = images.shape[-2:]
    if (longest := max(height, width)) > 32:
        size = (max(1, round(height * 32 / longest)), max(1, round(width * 32 / longest)))
        images = F.interpolate(images.float(), size=size, mode="area")
    return images.flatten(1)
