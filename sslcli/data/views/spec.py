"""Settings of views: the distributions of random crops and color changes that the yaml file of a run lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sslcli.data.views import augment, rand_augment
from sslcli.errors import check_keys


@dataclass(frozen=True, kw_only=True)
class View:
    """Distribution from which views are drawn. A view is a random crop of an image with random color changes.

    Probabilities are per view. Pairs are inclusive ranges (low, high).

    Attributes:
        count: number of views per image that are drawn from this distribution.
        size: side in pixels; None uses the image size of the run.
        crop_scale: range of the area of the crop as a fraction of the image, drawn uniformly; None = the whole
            image.
        crop_ratio: range of width / height of the crop, drawn log-uniformly.
        interpolation: "bilinear" or "bicubic", both antialiased.
        flip: probability of a left-right flip.
        jitter: strengths of (brightness, contrast, saturation, hue). For each of the first three, a factor is drawn
            from [max(0, 1 - strength), 1 + strength]. The hue is rotated by a number of turns, which is drawn from
            [-strength, strength]. The four operations are applied in random order.
        jitter_p: probability of the jitter.
        grayscale: probability of conversion to grayscale.
        grayscale_first: whether to convert to grayscale before the jitter (InstDisc) instead of after the jitter.
        blur: probability of a Gaussian blur.
        blur_sigma: range of the standard deviation of the blur in pixels, drawn uniformly.
        blur_kernel: kernel size of the blur, an odd number of pixels. None uses about a tenth of the side of the view,
            at least 3 (SimCLR).
        solarize: probability of solarization, which inverts the values >= `solarize_threshold`.
        solarize_threshold: threshold of the solarization, in [0, 1].
        rand_augment: number of RandAugment operations per view, see `sslcli.data.views.rand_augment`; 0 = none.
        rand_augment_magnitude: mean of the normal distribution of the magnitude, in [0, 10]. Drawn magnitudes are
            clipped to [0, 10].
        rand_augment_std: standard deviation of this normal distribution, at least 0.
        rand_augment_p: probability that a RandAugment operation is applied, drawn separately for each operation.

    Raises:
        ValueError: a value is out of range. The message names the field.
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
        """Validate every field, and convert lists from the yaml file to tuples."""
        self._check_integer("count", minimum=1)
        if self.size is not None:
            self._check_integer("size", minimum=1)
        if self.crop_scale is not None:
            self._check_range("crop_scale", above=0.0, maximum=1.0)
        self._check_range("crop_ratio", above=0.0)
        if self.interpolation not in augment.INTERPOLATIONS:
            raise _field_error("interpolation", self.interpolation, f"one of {', '.join(augment.INTERPOLATIONS)}")
        strengths = self._check_numbers("jitter", 4, "four numbers (brightness, contrast, saturation, hue)")
        if min(strengths) < 0 or strengths[3] > 0.5:
            raise _field_error("jitter", self.jitter, "at least 0 each, and hue, the fourth, at most 0.5")
        for name in ("flip", "jitter_p", "grayscale", "blur", "solarize", "solarize_threshold", "rand_augment_p"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise _field_error(name, value, "a number in [0, 1]")
        if not isinstance(self.grayscale_first, bool):
            raise _field_error("grayscale_first", self.grayscale_first, "true or false")
        self._check_range("blur_sigma", above=0.0)
        if self.blur_kernel is not None:
            self._check_integer("blur_kernel", minimum=1)
            if self.blur_kernel % 2 == 0:
                raise _field_error("blur_kernel", self.blur_kernel, "odd, so that it has a center")
        self._check_integer("rand_augment", minimum=0)
        for name, maximum in (("rand_augment_magnitude", rand_augment.MAX_MAGNITUDE), ("rand_augment_std", math.inf)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= maximum:
                limit = "" if maximum == math.inf else f" and at most {maximum:g}"
                raise _field_error(name, value, f"a number of at least 0{limit}")

    def _check_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise _field_error(name, value, f"an integer of at least {minimum}")

    def _check_numbers(self, name: str, length: int, constraint: str) -> tuple[float, ...]:
        value = getattr(self, name)
        if not isinstance(value, Sequence) or len(value) != length or not all(map(is_number, value)):
            raise _field_error(name, value, constraint)
        numbers = tuple(float(number) for number in value)
        object.__setattr__(self, name, numbers)
        return numbers

    def _check_range(self, name: str, *, above: float, maximum: float = math.inf) -> None:
        limit = "" if maximum == math.inf else f" <= {maximum:g}"
        constraint = f"a pair (low, high) with {above:g} < low <= high{limit}"
        low, high = self._check_numbers(name, 2, constraint)
        if not above < low <= high <= maximum:
            raise _field_error(name, getattr(self, name), constraint)

    @property
    def has_jitter(self) -> bool:
        """Whether the jitter of this view can change colors."""
        return self.jitter_p > 0 and any(strength > 0 for strength in self.jitter)

    def check_size(self, size: int) -> None:
        """Raise ValueError if the blur kernel is too large for views with a side of `size` pixels."""
        if self.blur == 0 or self.kernel_size(size) // 2 < size:
            return
        if self.blur_kernel is None:
            raise _field_error("blur", self.blur, f"0 at a side of {size} pixels, which is too small for a blur")
        raise _field_error("blur_kernel", self.blur_kernel, f"at most {2 * size - 1} at a side of {size} pixels")

    def kernel_size(self, size: int) -> int:
        """Return `blur_kernel` if it is not None, else the default kernel size for a side of `size` pixels."""
        return self.blur_kernel if self.blur_kernel is not None else max(3, size // 10 // 2 * 2 + 1)

    def describe(self) -> str:
        """Return a one-line description. Operations of probability 0 are left out."""
        parts = [f"{self.count} x {self.size or 'image size'}"]
        parts.append("no crop" if self.crop_scale is None else "crop {:g}-{:g}".format(*self.crop_scale))
        if self.interpolation != "bilinear":
            parts.append(self.interpolation)
        if self.flip > 0:
            parts.append(f"flip p={self.flip:g}")
        gray = [f"gray p={self.grayscale:g}"] if self.grayscale > 0 else []
        jitter = "jitter ({:g}, {:g}, {:g}, {:g})".format(*self.jitter)
        jitters = [f"{jitter} p={self.jitter_p:g}"] if self.has_jitter else []
        parts += gray + jitters if self.grayscale_first else jitters + gray
        if self.blur > 0:
            parts.append("blur {:g}-{:g}".format(*self.blur_sigma) + f" p={self.blur:g}")
        if self.solarize > 0:
            parts.append(f"solarize p={self.solarize:g}")
        if self.rand_augment > 0:
            magnitude = f"{self.rand_augment_magnitude:g}+-{self.rand_augment_std:g}"
            parts.append(f"RandAugment {self.rand_augment} x {magnitude} p={self.rand_augment_p:g}")
        return ", ".join(parts)


def is_number(value: object) -> bool:
    """Return whether `value` is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _field_error(name: str, value: object, constraint: str) -> ValueError:
    return ValueError(f"{name}={value!r} of a view must be {constraint}")


def parse(number: int, entry: Mapping[str, Any] | View) -> View:
    """Return the View that an entry of the list of views in a yaml file defines.

    number: index of the entry in the list, for error messages.
    entry: a mapping from fields of `View` to values. A `View` is returned unchanged.

    Raises ValueError if a field is unknown or a value is out of range.
    """
    if isinstance(entry, View):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"views[{number}] is {entry!r}, but it must be a mapping of view fields")
    check_keys(f"views[{number}]", entry, [field.name for field in fields(View)])
    try:
        return View(**{str(key): value for key, value in entry.items()})
    except ValueError as error:
        raise ValueError(f"views[{number}]: {error}") from None
