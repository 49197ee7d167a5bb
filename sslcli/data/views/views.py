"""Views of an image: random crops and color changes, drawn and applied in batches.

`Views` has a list of distributions, see `sslcli.data.views.spec`. It draws the views of each image from these
distributions. Each image has a key, a 64-bit integer that is different in each epoch. Every random parameter of an
operation is a pure function of (key of the image, view number, operation), see `sslcli.data.rng`. Therefore a view does
not depend on the other images of the batch. The operations run in this order, and each operation is optional:

    crop and resize -> flip -> color jitter -> grayscale -> blur -> solarize -> color space -> normalize

With `grayscale_first`, grayscale runs before the jitter. With RandAugment, the order is jitter -> blur -> RandAugment
-> grayscale. Without RandAugment, the order of blur and grayscale has no effect, because the two operations commute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sslcli.data.rng import mix, uniform
from sslcli.data.views import augment, rand_augment
from sslcli.data.views.color import LAB_MEAN, LAB_STD, YDBDR_MEAN, YDBDR_STD, lab_to_rgb, ydbdr_to_rgb
from sslcli.data.views.spec import View, is_number
from sslcli.data.views.spec import parse as parse_view
from sslcli.kernels.color import Parameters, color_operations

COLOR_SPACES = ("rgb", "lab", "ydbdr")

# Streams of rng.uniform, one for each kind of parameter. Changing a number changes the results of every run.
_FLIP, _JITTER, _ORDER, _FACTORS, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE, _COLOR_STREAMS = 0, 1, 2, 3, 7, 8, 9, 10, 11
_TRIES = 10  # number of candidate boxes per crop
_TOP, _LEFT, _AREA, _RATIO, _CROP_STREAMS = 0, 1, 2, 2 + _TRIES, 2 + 2 * _TRIES
_FIRST_CROP_STREAM, _FIRST_RAND_AUGMENT_STREAM = 64, 128

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4) orders of the four operations of the jitter
_IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors of the jitter that leave an image unchanged


class Views:
    """List of the views of an image, and the operations that compute them.

    Args:
        views: list of distributions. Each entry is a `View` or a mapping from fields of `View` to values. An entry with
            `count` n defines n consecutive views.
        normalize: whether to subtract a mean and divide by a standard deviation at the end. With color_space "rgb", the
            mean and standard deviation of the dataset are used. With "lab" and "ydbdr", the constants of CMC are used,
            which map each channel to about [-1, 1].
        color_space: color space of the result: "rgb", "lab" (CIE Lab) or "ydbdr" (YDbDr).

    Raises:
        ValueError: the list of views is empty, a field of an entry is unknown, the color space is unknown, or a value
            is out of range.
    """

    def __init__(
        self, views: Sequence[Mapping[str, Any] | View], *, normalize: bool = True, color_space: str = "rgb"
    ) -> None:
        if isinstance(views, (str, Mapping)) or not isinstance(views, Sequence) or len(views) == 0:
            raise ValueError(f"views is {views!r}, but it must be a list of at least one view")
        if color_space not in COLOR_SPACES:
            raise ValueError(f"color_space is {color_space!r}, but it must be one of {', '.join(COLOR_SPACES)}")
        self.entries = [parse_view(number, entry) for number, entry in enumerate(views)]
        self.views = [entry for entry in self.entries for _ in range(entry.count)]
        self.normalize = normalize
        self.color_space = color_space

    @property
    def num_views(self) -> int:
        """Number of views per image."""
        return len(self.views)

    @property
    def groups(self) -> list[range]:
        """Groups of views, as ranges of view numbers. The views of a group are computed in one batch.

        A group consists of one view, or of two views that the same entry of the list of views defines. Larger groups
        would need more memory.
        """
        ends = itertools.accumulate(entry.count for entry in self.entries)
        entries = [range(end - entry.count, end) for entry, end in zip(self.entries, ends, strict=True)]
        return [numbers[start : start + 2] for numbers in entries for start in range(0, len(numbers), 2)]

    def sizes(self, image_size: int) -> list[int]:
        """Return the side of each view in pixels, for a run with this image size."""
        return [view.size or image_size for view in self.views]

    def check_sizes(self, image_size: int) -> None:
        """Raise ValueError if the blur kernel of an entry of the list of views is too large for its views.

        The message names the entry. `image_size` is the image size of the run in pixels.
        """
        for number, entry in enumerate(self.entries):
            try:
                entry.check_size(entry.size or image_size)
            except ValueError as error:
                raise ValueError(f"views.views.{number}: {error}") from None

    def entry_number(self, view: int) -> int:
        """Return the index of the entry (element of `entries`) that defines the view number `view`.

        An entry defines `count` views. The views of the first entry have the numbers 0 to `count` - 1.
        """
        ends = itertools.accumulate(entry.count for entry in self.entries)
        return next(number for number, end in enumerate(ends) if view < end)

    def describe(self) -> list[str]:
        """Return a one-line description of each entry of the list of views."""
        return [entry.describe() for entry in self.entries]

    def boxes(self, view: int | Tensor, key: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Draw crop boxes as torchvision's RandomResizedCrop.get_params does.

        Ten candidate boxes are drawn, and the first candidate that fits the image is returned. If no candidate fits,
        the largest centered box with an allowed ratio is returned.

        Args:
            view: number of the view, in range(num_views); or one number per image, (N,). These numbers must belong to
                views with equal settings.
            key: (N,) int64, the key of each image. All views of an image have the same key.
            height, width: (N,) int64 size of each image in pixels.

        Returns:
            (N, 4) int64 top, left, height, width, on the device of `key`.
        """
        spec = self._spec(view)
        if spec.crop_scale is None:
            return torch.stack((torch.zeros_like(height), torch.zeros_like(height), height, width), 1)
        streams = torch.arange(_FIRST_CROP_STREAM, _FIRST_CROP_STREAM + _CROP_STREAMS, device=key.device)
        # With float64, rounding errors of sqrt and exp almost never move a box by a pixel.
        draws = uniform(mix(key, view).unsqueeze(1), streams).double()
        area = _between(draws[:, _AREA : _AREA + _TRIES], *spec.crop_scale)
        low, high = spec.crop_ratio
        ratio = torch.exp(_between(draws[:, _RATIO : _RATIO + _TRIES], math.log(low), math.log(high)))
        offset = draws[:, [_TOP, _LEFT]]
        return augment.crop_boxes(area, ratio, offset, height, width, ratio_range=(low, high))

    def color(
        self,
        view: int | Tensor,
        key: Tensor,
        images: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        photometric: slice = slice(None),
    ) -> Tensor:
        """Apply all operations after the crop: flip, photometric operations (such as jitter and blur), then `finish`.

        Args:
            view: number of the view, in range(num_views); or one number per image, (N,). These numbers must belong to
                views with equal settings.
            key: (N,) int64, the key of each image; preferably on the CPU, where the parameters are drawn.
            images: (N, C, S, S) float in [0, 1], the crops.
            mean, std: mean and standard deviation of the dataset, one value per channel, for values in [0, 1].
            photometric: the channels that the photometric operations change. The slice may be empty.

        Returns:
            (N, C, S, S) of the dtype of `images`.

        Raises:
            ValueError: the dtype of the images is not floating-point, or the views use RandAugment and `photometric`
                does not contain all channels.
        """
        if not images.is_floating_point():
            raise ValueError(f"color() got images of dtype {images.dtype}: divide by 255 to get floats in [0, 1]")
        spec = self._spec(view)
        draws = uniform(mix(key.cpu(), view).unsqueeze(0), torch.arange(_COLOR_STREAMS).unsqueeze(1))
        parameters = _draw_parameters(spec, draws, images)
        first, last, _ = photometric.indices(images.shape[1])
        if (first, last) == (0, images.shape[1]):
            plain = self.normalize and self.color_space == "rgb"
            changed = _in_one_pass(spec, parameters, images, (mean, std) if plain else None)
            if changed is not None:
                return changed if plain else self.finish(changed, mean=mean, std=std)
        images = augment.flip(images, parameters.flipped)
        if first < last:
            before, part, after = images.tensor_split((first, last), 1)
            if spec.rand_augment > 0 and part.shape != images.shape:
                raise ValueError(
                    "rand_augment of a view moves pixels, so the modalities of an image would no longer be aligned: "
                    "set rand_augment to 0, or choose other views"
                )
            part = _photometric(spec, parameters, mix(key.cpu(), view), part, mean[first:last])
            images = part if part.shape == images.shape else torch.cat((before, part, after), 1)
        return self.finish(images, mean=mean, std=std)

    def _spec(self, view: int | Tensor) -> View:
        return self.views[view if isinstance(view, int) else int(view[0])]

    def finish(self, images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Convert images to the color space and normalize them. Evaluation applies no other operation of the views.

        Args:
            images: (N, C, H, W) float in [0, 1].
            mean, std: mean and standard deviation of the dataset. They are used only if the color space is "rgb" and
                `normalize` is True.
        """
        if self.color_space == "lab":
            images = augment.rgb_to_lab(images)
        elif self.color_space == "ydbdr":
            images = augment.rgb_to_ydbdr(images)
        if not self.normalize:
            return images
        return augment.normalize(images, *self.statistics(mean=mean, std=std))

    def statistics(self, *, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation per channel with which `finish` normalizes images.

        If `normalize` is False, the results are 0 and 1.

        mean, std: mean and standard deviation of the dataset, one value per channel.
        """
        if not self.normalize:
            return [0.0] * len(mean), [1.0] * len(std)
        constants = {"lab": (LAB_MEAN, LAB_STD), "ydbdr": (YDBDR_MEAN, YDBDR_STD)}
        mean, std = constants.get(self.color_space, (mean, std))
        return list(mean), list(std)

    def restore(self, images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Apply the inverse of `finish` and clamp to [0, 1], for display.

        The arguments are the same as for `finish`.
        """
        if self.normalize:
            mean, std = self.statistics(mean=mean, std=std)
            images = images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)
        if self.color_space != "rgb":
            images = (lab_to_rgb if self.color_space == "lab" else ydbdr_to_rgb)(images)
        return images.clamp(0, 1)


class ScaledViews(Views):
    """Views with all jitter strengths multiplied by the same factor, for studies of augmentation strength.

    Args:
        views, normalize, color_space: as for `Views`.
        strength: the factor, at least 0. The product of the factor and each hue strength must be at most 0.5.

    Raises:
        ValueError: in the same cases as `Views`, and if `strength` is out of range.
    """

    def __init__(
        self,
        views: Sequence[Mapping[str, Any] | View],
        *,
        strength: float = 1.0,
        normalize: bool = True,
        color_space: str = "rgb",
    ) -> None:
        super().__init__(views, normalize=normalize, color_space=color_space)
        hue = max(entry.jitter[3] for entry in self.entries)
        if not is_number(strength) or not 0 <= strength * hue <= 0.5 or strength < 0:
            limit = f" and at most {0.5 / hue:g}, which scales the hue to its limit of 0.5" if hue > 0 else ""
            raise ValueError(f"strength={strength!r} of the views must be a number of at least 0{limit}")
        self.entries = [_with_jitter(entry, strength) for entry in self.entries]
        self.views = [entry for entry in self.entries for _ in range(entry.count)]


def _with_jitter(view: View, strength: float) -> View:
    brightness, contrast, saturation, hue = (strength * number for number in view.jitter)
    return replace(view, jitter=(brightness, contrast, saturation, hue))


def _between(fraction: Tensor, low: float, high: float) -> Tensor:
    return fraction * (high - low) + low


def _in_one_pass(
    spec: View,
    parameters: Parameters,
    images: Tensor,
    scale: tuple[Sequence[float], Sequence[float]] | None,
) -> Tensor | None:
    """Apply all operations after the crop with one call of the compiled kernel.

    If the kernel does not support the operations, return None.

    scale: the mean and the standard deviation of each channel, for normalization at the end. None = do not normalize.

    Raises ValueError if the blur kernel is too large for the images, even if no image is blurred.
    """
    if spec.rand_augment > 0:
        return None
    if spec.blur > 0:
        augment.check_taps(parameters.taps, *images.shape[2:])
    mean, std = scale or ([0.0] * images.shape[1], [1.0] * images.shape[1])
    augment.check_scale(mean, std, images.shape[1])
    return color_operations(images, parameters, mean=mean, std=std)


def _photometric(spec: View, parameters: Parameters, key: Tensor, images: Tensor, mean: Sequence[float]) -> Tensor:
    """Apply jitter, RandAugment, grayscale, blur and solarize, in the order given in the module docstring.

    key, mean: see `_rand_augment`.
    """
    unflipped = replace(parameters, flipped=torch.zeros_like(parameters.flipped))
    changed = _in_one_pass(spec, unflipped, images, None)
    if changed is not None:
        return changed
    if spec.grayscale_first:
        images = augment.to_grayscale(images, parameters.gray)
    if spec.has_jitter:
        # Images without jitter get neutral factors. color_jitter skips images with neutral factors.
        factors = torch.where(parameters.jittered.unsqueeze(1), parameters.factors, _IDENTITY)
        images = augment.color_jitter(images, factors, parameters.order)
    if spec.rand_augment > 0:
        images = _blur(spec, parameters, images)
        images = _rand_augment(spec, key, images, mean)
    if not spec.grayscale_first:
        images = augment.to_grayscale(images, parameters.gray)
    if spec.rand_augment == 0:
        images = _blur(spec, parameters, images)
    if spec.solarize > 0:
        images = augment.solarize(images, spec.solarize_threshold, parameters.solarized)
    return images


def _draw_parameters(spec: View, draws: Tensor, images: Tensor) -> Parameters:
    """Compute the parameters of the color operations of N images (N, C, S, S).

    draws: (streams, N) uniform random numbers in [0, 1). Each row is one stream, which gives one number per image: for
        example, the numbers that determine the flip.
    """
    factors = []
    for number, strength in enumerate(spec.jitter):
        low, high = (max(0.0, 1 - strength), 1 + strength) if number < 3 else (-strength, strength)
        factors.append(_between(draws[_FACTORS + number], low, high))
    return Parameters(
        flipped=draws[_FLIP] < spec.flip,
        jittered=draws[_JITTER] < (spec.jitter_p if spec.has_jitter else 0.0),
        factors=torch.stack(factors, 1),
        order=_ORDERS[(draws[_ORDER] * len(_ORDERS)).long()],
        gray=draws[_GRAYSCALE] < spec.grayscale,
        gray_first=spec.grayscale_first,
        blurred=draws[_BLUR] < spec.blur,
        sigma=_between(draws[_SIGMA], *spec.blur_sigma),
        taps=spec.kernel_size(min(images.shape[2:])),
        solarized=draws[_SOLARIZE] < spec.solarize,
        threshold=spec.solarize_threshold,
    )


def _blur(spec: View, parameters: Parameters, images: Tensor) -> Tensor:
    """Blur the images for which `parameters.blurred` is True."""
    if spec.blur == 0:
        return images
    return augment.gaussian_blur(images, parameters.sigma, parameters.taps, parameters.blurred)


def _rand_augment(spec: View, key: Tensor, images: Tensor, mean: Sequence[float]) -> Tensor:
    """Apply RandAugment. Areas outside of the original image get `mean`, the mean color of the dataset.

    key: (N,) int64, one hash per image, from which the random numbers of RandAugment are computed. The hash is computed
        from the key of the image (see `Views.color`) and the number of the view.
    """
    number = spec.rand_augment * rand_augment.STREAMS
    streams = torch.arange(_FIRST_RAND_AUGMENT_STREAM, _FIRST_RAND_AUGMENT_STREAM + number)
    draws = uniform(key.unsqueeze(0), streams.unsqueeze(1)).view(spec.rand_augment, rand_augment.STREAMS, -1)
    return rand_augment.rand_augment(
        images,
        draws,
        magnitude=spec.rand_augment_magnitude,
        std=spec.rand_augment_std,
        probability=spec.rand_augment_p,
        fill=torch.tensor(mean),
    )
