"""Views: which random crops and colour changes are made of each image.

A `View` is one distribution, written in yaml; `Views` draws from a list of them. Every parameter is a pure function of
(image key, view number, operation), see `rng`: a view of an image is the same in whatever batch it comes.
The operations come in this order, each optional (grayscale before the jitter where `grayscale_first` is set):

    crop and resize -> flip -> colour jitter -> grayscale -> blur -> solarize -> colour space -> normalise

With RandAugment the blur comes earlier, which makes no difference to gray: jitter -> blur -> RandAugment -> grayscale.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sslcli.data import augment, rand_augment
from sslcli.data.color import LAB_MEAN, LAB_STD, YDBDR_MEAN, YDBDR_STD, lab_to_rgb, ydbdr_to_rgb
from sslcli.data.rng import mix, uniform

COLOR_SPACES = ("rgb", "lab", "ydbdr")

# Streams of rng.uniform. A number says what a draw is for; changing one changes every run.
_FLIP, _JITTER, _ORDER, _FACTORS, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE, _COLOUR_STREAMS = 0, 1, 2, 3, 7, 8, 9, 10, 11
_TRIES = 10
_TOP, _LEFT, _AREA, _RATIO, _CROP_STREAMS = 0, 1, 2, 2 + _TRIES, 2 + 2 * _TRIES
_FIRST_CROP_STREAM, _FIRST_RAND_AUGMENT_STREAM = 64, 128

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
_IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])


@dataclass(frozen=True, kw_only=True)
class View:
    """One distribution of views. Probabilities are per image, pairs are inclusive ranges (low, high).

    Attributes:
        count: how many views are drawn from it.
        size: side in pixels; None for the run's image size.
        crop_scale: area of the crop as a share of the image, uniform; None takes the whole image.
        crop_ratio: width / height of the crop, log-uniform.
        interpolation: "bilinear" or "bicubic", both antialiased.
        flip: probability of a left-right flip.
        jitter: strength of (brightness, contrast, saturation, hue). The first three draw a factor from
            [max(0, 1 - strength), 1 + strength], hue draws turns from [-strength, strength]; the order is random.
        jitter_p: probability of jitter.
        grayscale: probability of gray.
        grayscale_first: gray before jitter (InstDisc) instead of after it.
        blur: probability of a Gaussian blur.
        blur_sigma: its standard deviation in pixels, uniform.
        blur_kernel: number of its taps, odd; None for about a tenth of the side, at least 3 (SimCLR).
        solarize: probability of inverting the values from `solarize_threshold` in [0, 1] on.
        rand_augment: number of operations of RandAugment, see `sslcli.data.rand_augment`; 0 for none.
        rand_augment_magnitude: mean of their magnitude, in [0, 10]; what is drawn is clipped to that.
        rand_augment_std: deviation of the magnitude.
        rand_augment_p: probability of each of the operations to happen at all.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    count: int = 1
    size: int | None = None
    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 1.0
    grayscale: float = 0.0
    grayscale_first: bool = False
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    rand_augment: int = 0
    rand_augment_magnitude: float = 10.0
    rand_augment_std: float = 0.5
    rand_augment_p: float = 0.5

    def __post_init__(self) -> None:
        """Check every field, and turn the lists that yaml gives into tuples."""
        self._check_integer("count", minimum=1)
        if self.size is not None:
            self._check_integer("size", minimum=1)
        if self.crop_scale is not None:
            self._check_range("crop_scale", above=0.0, maximum=1.0)
        self._check_range("crop_ratio", above=0.0)
        if self.interpolation not in augment.INTERPOLATIONS:
            raise _wrong("interpolation", self.interpolation, f"one of {', '.join(augment.INTERPOLATIONS)}")
        strengths = self._check_numbers("jitter", 4, "four numbers (brightness, contrast, saturation, hue)")
        if min(strengths) < 0 or strengths[3] > 0.5:
            raise _wrong("jitter", self.jitter, "at least 0 each, and hue, the fourth, at most 0.5")
        for name in ("flip", "jitter_p", "grayscale", "blur", "solarize", "solarize_threshold", "rand_augment_p"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise _wrong(name, value, "a number in [0, 1]")
        if not isinstance(self.grayscale_first, bool):
            raise _wrong("grayscale_first", self.grayscale_first, "true or false")
        self._check_range("blur_sigma", above=0.0)
        if self.blur_kernel is not None:
            self._check_integer("blur_kernel", minimum=1)
            if self.blur_kernel % 2 == 0:
                raise _wrong("blur_kernel", self.blur_kernel, "odd, so that it has a centre")
        self._check_integer("rand_augment", minimum=0)
        for name, most in (("rand_augment_magnitude", rand_augment.MOST), ("rand_augment_std", math.inf)):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= most:
                limit = "" if most == math.inf else f" and at most {most:g}"
                raise _wrong(name, value, f"a number of at least 0{limit}")

    def _check_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise _wrong(name, value, f"an integer of at least {minimum}")

    def _check_numbers(self, name: str, length: int, what: str) -> tuple[float, ...]:
        value = getattr(self, name)
        if not isinstance(value, Sequence) or len(value) != length or not all(map(_is_number, value)):
            raise _wrong(name, value, what)
        numbers = tuple(float(number) for number in value)
        object.__setattr__(self, name, numbers)
        return numbers

    def _check_range(self, name: str, *, above: float, maximum: float = math.inf) -> None:
        limit = "" if maximum == math.inf else f" <= {maximum:g}"
        constraint = f"a pair (low, high) with {above:g} < low <= high{limit}"
        low, high = self._check_numbers(name, 2, constraint)
        if not above < low <= high <= maximum:
            raise _wrong(name, getattr(self, name), constraint)

    @property
    def jitters(self) -> bool:
        """Whether this view ever changes colours by jitter."""
        return self.jitter_p > 0 and any(strength > 0 for strength in self.jitter)

    def kernel_size(self, size: int) -> int:
        """Number of taps of the blur for images of `size` pixels; `blur_kernel` where that is set."""
        return self.blur_kernel if self.blur_kernel is not None else max(3, size // 10 // 2 * 2 + 1)

    def describe(self) -> str:
        """One line for people, without the operations that never happen."""
        parts = [f"{self.count} x {self.size or 'image size'}"]
        parts.append("no crop" if self.crop_scale is None else "crop {:g}-{:g}".format(*self.crop_scale))
        if self.interpolation != "bilinear":
            parts.append(self.interpolation)
        if self.flip > 0:
            parts.append(f"flip p={self.flip:g}")
        gray = [f"gray p={self.grayscale:g}"] if self.grayscale > 0 else []
        jitter = "jitter ({:g}, {:g}, {:g}, {:g})".format(*self.jitter)
        jitters = [f"{jitter} p={self.jitter_p:g}"] if self.jitters else []
        parts += gray + jitters if self.grayscale_first else jitters + gray
        if self.blur > 0:
            parts.append("blur {:g}-{:g}".format(*self.blur_sigma) + f" p={self.blur:g}")
        if self.solarize > 0:
            parts.append(f"solarize p={self.solarize:g}")
        if self.rand_augment > 0:
            magnitude = f"{self.rand_augment_magnitude:g}+-{self.rand_augment_std:g}"
            parts.append(f"RandAugment {self.rand_augment} x {magnitude} p={self.rand_augment_p:g}")
        return ", ".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: object, constraint: str) -> ValueError:
    return ValueError(f"{name}={value!r} of a view must be {constraint}")


def _parse(number: int, entry: Mapping[str, Any] | View) -> View:
    """A View from its yaml; errors say which entry it is."""
    if isinstance(entry, View):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"views[{number}]={entry!r} must be a mapping of view fields")
    known = [field.name for field in fields(View)]
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"views[{number}] has the unknown key {key!r}{hint} Known keys: {', '.join(known)}")
    try:
        return View(**{str(key): value for key, value in entry.items()})
    except ValueError as error:
        raise ValueError(f"views[{number}]: {error}") from None


class Views:
    """All views that are made of an image, in order; an entry of `count` n makes n of them.

    Args:
        views: the distributions, as mappings of the fields of `View`, or as `View`.
        normalize: whether to subtract the mean and divide by the standard deviation at the end. With color_space "lab"
            and "ydbdr" these are the constants of CMC, which map each channel to about [-1, 1], not those of the set.
        color_space: "rgb", "lab" (CIE Lab) or "ydbdr" (YDbDr) of the result.

    Raises:
        ValueError: no views, an unknown key or colour space, or a value out of its range.
    """

    def __init__(
        self, views: Sequence[Mapping[str, Any] | View], *, normalize: bool = True, color_space: str = "rgb"
    ) -> None:
        if isinstance(views, (str, Mapping)) or not isinstance(views, Sequence) or len(views) == 0:
            raise ValueError(f"views={views!r} must be a list of at least one view")
        if color_space not in COLOR_SPACES:
            raise ValueError(f"color_space={color_space!r} must be one of {', '.join(COLOR_SPACES)}")
        self.entries = [_parse(number, entry) for number, entry in enumerate(views)]
        self.views = [entry for entry in self.entries for _ in range(entry.count)]
        self.normalize = normalize
        self.color_space = color_space

    @property
    def num_views(self) -> int:
        """Number of views made of an image."""
        return len(self.views)

    def sizes(self, image_size: int) -> list[int]:
        """Side of each view in pixels, for a run of `image_size`."""
        return [view.size or image_size for view in self.views]

    def describe(self) -> list[str]:
        """One line for each entry, for printing."""
        return [entry.describe() for entry in self.entries]

    def boxes(self, view: int, key: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Crop boxes, drawn as torchvision's RandomResizedCrop.get_params draws them.

        The first of ten that fits into the image; where none does, the largest centred box whose ratio is allowed.

        Args:
            view: number of the view, in range(num_views).
            key: (N,) int64, the key of each image, the same for all of its views.
            height, width: (N,) int64 size of each image in pixels.

        Returns:
            (N, 4) int64 top, left, height, width, on the device of `key`.
        """
        spec = self.views[view]
        if spec.crop_scale is None:
            return torch.stack((torch.zeros_like(height), torch.zeros_like(height), height, width), 1)
        streams = torch.arange(_FIRST_CROP_STREAM, _FIRST_CROP_STREAM + _CROP_STREAMS, device=key.device)
        # float64, so that a rounding of sqrt or exp all but never moves a box by a pixel.
        draws = uniform(mix(key, view).unsqueeze(1), streams).double()
        area = _between(draws[:, _AREA : _AREA + _TRIES], *spec.crop_scale)
        low, high = spec.crop_ratio
        ratio = torch.exp(_between(draws[:, _RATIO : _RATIO + _TRIES], math.log(low), math.log(high)))
        place = draws[:, [_TOP, _LEFT]]
        return augment.crop_boxes(area, ratio, place, height, width, ratio_range=(low, high))

    def colour(
        self,
        view: int,
        key: Tensor,
        images: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        photometric: slice = slice(None),
    ) -> Tensor:
        """Everything after the crop: flip, the operations of `_photometric`, then `finish`.

        Args:
            view: number of the view, in range(num_views).
            key: (N,) int64, the key of each image; best on the CPU, where the parameters are drawn.
            images: (N, C, S, S) float in [0, 1], the crops.
            mean, std: of the set, one value a channel, on the scale [0, 1].
            photometric: the channels that the operations between flip and `finish` change; they may be none.

        Returns:
            (N, C, S, S) of the dtype of `images`.

        Raises:
            ValueError: bytes, or RandAugment of some channels only.
        """
        if not images.is_floating_point():
            raise ValueError(f"colour() got images of dtype {images.dtype}; divide by 255 to get floats in [0, 1]")
        spec = self.views[view]
        draws = uniform(mix(key.cpu(), view).unsqueeze(0), torch.arange(_COLOUR_STREAMS).unsqueeze(1))
        if spec.flip > 0:
            images = augment.flip(images, draws[_FLIP] < spec.flip)
        first, last, _ = photometric.indices(images.shape[1])
        if first < last:
            before, part, after = images.tensor_split((first, last), 1)
            if spec.rand_augment > 0 and part.shape != images.shape:
                raise ValueError(
                    "rand_augment of a view moves pixels, so the modalities of an image would no longer lie over each "
                    "other: set it to 0, or choose other views"
                )
            part = _photometric(spec, draws, mix(key.cpu(), view), part, mean[first:last])
            images = part if part.shape == images.shape else torch.cat((before, part, after), 1)
        return self.finish(images, mean=mean, std=std)

    def finish(self, images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Colour space and normalisation only: what evaluation applies, so that both see the same numbers.

        Args:
            images: (N, C, H, W) float in [0, 1].
            mean, std: of the set; not used where the colour space has constants of its own, or `normalize` is off.
        """
        if self.color_space == "lab":
            images, mean, std = augment.rgb_to_lab(images), LAB_MEAN, LAB_STD
        elif self.color_space == "ydbdr":
            images, mean, std = augment.rgb_to_ydbdr(images), YDBDR_MEAN, YDBDR_STD
        return augment.normalize(images, mean, std) if self.normalize else images

    def restore(self, images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """What `finish` was given, clamped to [0, 1], to be looked at; arguments and shapes are those of `finish`."""
        if self.color_space == "lab":
            mean, std = LAB_MEAN, LAB_STD
        elif self.color_space == "ydbdr":
            mean, std = YDBDR_MEAN, YDBDR_STD
        if self.normalize:
            images = images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)
        if self.color_space != "rgb":
            images = (lab_to_rgb if self.color_space == "lab" else ydbdr_to_rgb)(images)
        return images.clamp(0, 1)


class ScaledViews(Views):
    """Views whose jitter is multiplied by one number, for studies of how strong views should be.

    Args:
        views, normalize, color_space: as for `Views`.
        strength: at least 0; hue times strength must stay at most 0.5.

    Raises:
        ValueError: as `Views`, and for a strength out of its range.
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
        if not _is_number(strength) or not 0 <= strength * hue <= 0.5 or strength < 0:
            most = f" and at most {0.5 / hue:g}, where the hue turns by 0.5" if hue > 0 else ""
            raise ValueError(f"strength={strength!r} of the views must be a number of at least 0{most}")
        self.entries = [_with_jitter(entry, strength) for entry in self.entries]
        self.views = [entry for entry in self.entries for _ in range(entry.count)]


def _with_jitter(view: View, strength: float) -> View:
    brightness, contrast, saturation, hue = (strength * number for number in view.jitter)
    return replace(view, jitter=(brightness, contrast, saturation, hue))


def _between(fraction: Tensor, low: float, high: float) -> Tensor:
    return fraction * (high - low) + low


def _photometric(spec: View, draws: Tensor, key: Tensor, images: Tensor, mean: Sequence[float]) -> Tensor:
    """Jitter, RandAugment, grayscale, blur and solarize, in the order of the module's text."""
    gray = draws[_GRAYSCALE] < spec.grayscale
    if spec.grayscale_first:
        images = augment.to_grayscale(images, gray)
    if spec.jitters:
        images = _jitter(spec, draws, images)
    if spec.rand_augment > 0:
        images = _rand_augment(spec, key, _blur(spec, draws, images), mean)
    if not spec.grayscale_first:
        images = augment.to_grayscale(images, gray)
    if spec.rand_augment == 0:
        images = _blur(spec, draws, images)
    if spec.solarize > 0:
        images = augment.solarize(images, spec.solarize_threshold, draws[_SOLARIZE] < spec.solarize)
    return images


def _blur(spec: View, draws: Tensor, images: Tensor) -> Tensor:
    """Gaussian blur of the images whose draw says so."""
    if spec.blur == 0:
        return images
    sigma = _between(draws[_SIGMA], *spec.blur_sigma)
    taps = spec.kernel_size(min(images.shape[2:]))
    return augment.gaussian_blur(images, sigma, taps, draws[_BLUR] < spec.blur)


def _rand_augment(spec: View, key: Tensor, images: Tensor, mean: Sequence[float]) -> Tensor:
    """RandAugment with the mean of the set where pixels are moved away."""
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


def _jitter(spec: View, draws: Tensor, images: Tensor) -> Tensor:
    """Colour jitter of the images whose draw says so."""
    factors = []
    for number, strength in enumerate(spec.jitter):
        low, high = (max(0.0, 1 - strength), 1 + strength) if number < 3 else (-strength, strength)
        factors.append(_between(draws[_FACTORS + number], low, high))
    # The identity, which color_jitter passes over, for those that are not jittered.
    chosen = (draws[_JITTER] < spec.jitter_p).unsqueeze(1)
    order = _ORDERS[(draws[_ORDER] * len(_ORDERS)).long()]
    return augment.color_jitter(images, torch.where(chosen, torch.stack(factors, 1), _IDENTITY), order)
