"""Built-in dataset of generated images. The label of an image is a shape. All other properties are nuisances.

Each image shows two to four instances of one shape on a cluttered background. Fill color, texture, scale, rotation and
position differ between the instances of an image. Therefore two random crops have only the shape in common. The
background varies across the image, so a crop contains little information about the background of another crop. Each
nuisance has a strength in [0, 1].

The pixels of image i depend only on (seed, i, size, nuisances), and are bit-identical on all CPUs. Each random number
is a hash of integers such as the seed and i, see `sslcli.data.rng`. The renderer uses only correctly rounded operations
(+ - * / sqrt min max floor). Therefore no pixel depends on the split into batches, the number of threads or the vector
width of the CPU. Edges are anti-aliased with signed distance functions, see
https://iquilezles.org/articles/distfunctions2d/. Such a function is negative inside of a shape. Near the edge, its
slope is 1.

Tensor shapes: n images, side S in pixels. Lengths are in units of half the image side: x and y are in [-1, 1]. The y
axis points down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sslcli.data.rng import mix, uniform

_SLOTS = ((-0.5, -0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, 0.5))  # centers of instances; the first two are always used
_CHUNK_PIXELS = 1 << 17  # pixels rendered in one call; one float32 channel takes half a MiB and fits in the CPU cache
_TURNS = 4096  # size of the cosine table; the last bits of libm's cos differ between CPUs and in SIMD code
_COSINE = torch.tensor([math.cos(2 * math.pi * i / _TURNS) for i in range(_TURNS)], dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Nuisances:
    """Strength in [0, 1] of each nuisance.

    A nuisance is the variation of a property other than the shape. Strength 0 disables a nuisance.

    color: hue, saturation and lightness of each instance (0: the same light gray).
    texture: stripes and checks inside the instances (0: uniform fill).
    scale: size and aspect ratio of each instance.
    rotation: angle of each instance (0: upright, 1: any angle).
    position: position and number of the instances (0: four, at the centers of the quadrants).
    background: color, patches and noise behind the instances (0: uniform dark gray).
    light: brightness, direction and tint of the light on the whole image.

    Raises ValueError if a strength is outside [0, 1].
    """

    color: float = 1.0
    texture: float = 1.0
    scale: float = 1.0
    rotation: float = 1.0
    position: float = 1.0
    background: float = 1.0
    light: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"nuisance {field.name} is {value}, but it must be from 0 (off) to 1 (full strength)")


def draw(indices: Tensor, *, seed: int, size: int, nuisances: Nuisances = Nuisances()) -> tuple[Tensor, Tensor]:
    """Generate images of the dataset.

    indices: (n,) int64 on the CPU, the numbers of the images, in any order; repeats are allowed.
    seed: seed of the dataset.
    size: side in pixels, at least 16.
    nuisances: strength of the variation of each property other than the shape.

    Returns images (n, 3, size, size) uint8 and labels (n,) int64. Labels are indices into `CLASSES` and are uniformly
    distributed.

    Raises ValueError if `indices` is not a vector of int64, or if `size` is below 16.
    """
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be a vector of int64, but they are {indices.dtype} of shape {tuple(indices.shape)}: "
            "pass torch.arange(n) or a 1-d selection of it"
        )
    if size < 16:
        raise ValueError(f"size is {size}, but shapes are recognizable only from 16 pixels on: use 32 or more")
    keys = mix(seed, indices)
    labels = (uniform(keys, 0) * len(CLASSES)).long()
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    chunk = max(1, _CHUNK_PIXELS // size**2)
    for label, distance in enumerate(_DISTANCES.values()):
        for rows in torch.split((labels == label).nonzero().flatten(), chunk):
            images[rows] = _render(keys[rows], distance, size, nuisances)
    return images, labels


# Signed distances to the shapes: coordinates (n, S, S) in units of the instance's radius -> (n, S, S), negative inside.
# The scales are random, so the sizes of different shapes overlap. Therefore the size contains little information about
# the label.


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 0.8


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.68).abs() - 0.24


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.75, 0.75)


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 1.0, 0.3)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slanted = x.abs() * math.sqrt(0.75) - y * 0.5
    return torch.maximum(slanted, y) - 0.52


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Three reflections map the plane to a tenth of the star. In this part, the border is a line from a tip to a notch.
    cos, sin, notch = math.cos(math.pi / 5), math.sin(math.pi / 5), 0.5
    x, y = x.abs(), -y
    for side in (cos, -cos):
        beyond = (x * side - y * sin).clamp(min=0) * 2
        x, y = x - beyond * side, y + beyond * sin
    across, along = 1 - notch * cos, notch * sin
    return (x.abs() * across + (y - 1) * along) / math.hypot(across, along)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_length(x, y) - 0.95, 0.75 - _length(x - 0.45, y))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # The heart is a square that stands on a corner, plus a disc on each of its two upper sides.
    side = 0.55
    x, y = x.abs(), y - 0.15
    diagonal, other = (x + y) * math.sqrt(0.5), (x - y) * math.sqrt(0.5)
    disc = _length(diagonal, other - side) - side
    return torch.minimum(_box(diagonal, other, side, side), disc)


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum((x.abs() - y - 1.0) * math.sqrt(0.5), y + 0.15)
    return torch.minimum(head, _box(x, y - 0.3, 0.22, 0.7))


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "bar": _bar,
    "cross": _cross,
    "triangle": _triangle,
    "star": _star,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
}
CLASSES: tuple[str, ...] = tuple(_DISTANCES)


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


class _RandomNumbers:
    """Random numbers for one part of n images. Each call returns one number per image (n,).

    A part is the background, or one instance of the shape. At most `count` calls are possible. The numbers of all calls
    are computed together when the object is created. If n is small, this is faster than one computation per call.

    key: (n,) int64, one key per image. The key of an image is different for each of its parts.
    count: maximum number of calls.
    """

    def __init__(self, key: Tensor, count: int = 20) -> None:
        self._columns = iter(uniform(mix(key[:, None], torch.arange(count)), 0).unbind(1))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return next(self._columns) * (high - low) + low


def _render(keys: Tensor, distance: Callable[[Tensor, Tensor], Tensor], size: int, nuisances: Nuisances) -> Tensor:
    """Render n images of one class. Return (n, 3, S, S) uint8.

    keys: (n,) int64, one key per image. All random numbers of an image are computed from its key.
    distance: signed distance function of the shape of the class, as in `_DISTANCES`.
    size: side S in pixels.
    nuisances: strengths of the variations that do not depend on the class, such as color and rotation.
    """
    axis = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    x, y = axis.view(1, 1, size), axis.view(1, size, 1)
    numbers = _RandomNumbers(mix(keys, 1))
    lightness = _blend(0.25, numbers(0.25, 0.5), nuisances.background)
    image = _background(numbers, x, y, lightness, nuisances.background)
    image += (_noise(mix(keys, 2), x, y) * (0.08 * nuisances.background))[:, None]
    light = _light(numbers, x, y, nuisances.light)
    for slot, (slot_x, slot_y) in enumerate(_SLOTS):
        numbers = _RandomNumbers(mix(keys, 3, slot))
        present = numbers() >= (0.2 * nuisances.position if slot >= 2 else 0)
        radius = 0.46 * (1 + nuisances.scale * numbers(-0.2, 0.2))
        aspect = 1 + nuisances.scale * numbers(-0.1, 0.1)
        cos, sin = _direction(nuisances.rotation * numbers(-0.5, 0.5))
        move_x = x - _field(slot_x + nuisances.position * numbers(-0.2, 0.2))
        move_y = y - _field(slot_y + nuisances.position * numbers(-0.2, 0.2))
        u = move_x * _field(cos / (radius * aspect)) + move_y * _field(sin / (radius * aspect))
        v = move_y * _field(cos * aspect / radius) - move_x * _field(sin * aspect / radius)
        cover = (0.5 - distance(u, v) * _field(radius * (size / 2))).clamp(0, 1) * _field(present)
        fill = _fill_color(numbers, lightness, nuisances.color)
        shade = 1 + _texture(numbers, u, v) * (0.2 * nuisances.texture)
        image += (fill[:, :, None, None] * shade[:, None] - image) * cover[:, None]
    image *= light
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _background(numbers: _RandomNumbers, x: Tensor, y: Tensor, lightness: Tensor, strength: float) -> Tensor:
    """Return the background (n, 3, S, S) of images: one color per image, changed in two random half-planes.

    numbers: random numbers for the background.
    x, y: (1, 1, S) and (1, S, 1), the coordinates of the pixels in [-1, 1].
    lightness: (n,) mean lightness of each background in [0, 1].
    strength: strength of the variation of the color, in [0, 1].
    """
    ground = lightness[:, None] + _chroma(numbers) * (0.15 * strength)
    image = ground[:, :, None, None].expand(-1, -1, y.shape[1], x.shape[2]).clone()
    for _ in range(2):
        cos, sin = _direction(numbers())
        depth = (x * _field(cos) + y * _field(sin) - _field(numbers(-0.6, 0.6))) * (x.shape[2] / 2)
        change = numbers(-0.08, 0.08)[:, None] + _chroma(numbers) * 0.2
        image += (change * strength)[:, :, None, None] * (depth + 0.5).clamp(0, 1)[:, None]
    return image


def _fill_color(numbers: _RandomNumbers, background: Tensor, strength: float) -> Tensor:
    """Return the fill color of one instance of the shape in each of n images, (n, 3).

    The color differs in lightness from the background, so that the shape is also visible in grayscale.

    numbers: random numbers for this instance.
    background: (n,) lightness of the background.
    strength: strength of the variation of the color, in [0, 1]. If it is 0, all images get the same light gray.
    """
    darker = (background > 0.37) & (numbers() < 0.6)
    contrast = numbers(0.35, 0.5)
    lightness = torch.where(darker, background - contrast, background + contrast)
    color = lightness[:, None] + _chroma(numbers) * 0.3
    return _blend(0.85, color, strength).clamp(0, 1)


def _texture(numbers: _RandomNumbers, u: Tensor, v: Tensor) -> Tensor:
    """Return a texture of stripes or checks in [-1, 1], for n images of S x S pixels: (n, S, S).

    numbers: source of the random numbers of n images.
    u, v: (n, S, S) coordinates of the pixels in units of the radius of an instance of the shape. The origin is the
        center of the instance, and the axes are rotated with the instance.
    """
    cos, sin = _direction(numbers())
    frequency = numbers(0.4, 1.4)
    amount = numbers()
    stripes = _wave(u * _field(cos * frequency) + v * _field(sin * frequency) + _field(numbers()))
    across = _wave(v * _field(cos * frequency) - u * _field(sin * frequency) + _field(numbers()))
    checks = numbers() < 0.5
    return stripes * torch.where(_field(checks), across, 1.0) * _field(amount)


def _light(numbers: _RandomNumbers, x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Return the light (n, 3, S, S): a factor by which each channel of each pixel is multiplied.

    The factor is 1 plus the sum of an offset of the brightness, a gradient across the image, and a tint.

    numbers: source of the random numbers of n images.
    x, y: (1, 1, S) and (1, S, 1), the coordinates of the pixels in [-1, 1].
    strength: strength of the variation of the light, in [0, 1].
    """
    cos, sin = _direction(numbers())
    slope = numbers(0.0, 0.15)
    gain = (x * _field(cos) + y * _field(sin)) * _field(slope) + _field(numbers(-0.2, 0.1))
    tint = _chroma(numbers) * 0.1
    return 1 + (gain[:, None] + tint[:, :, None, None]) * strength


def _noise(key: Tensor, x: Tensor, y: Tensor, cells: int = 5) -> Tensor:
    """Return value noise (n, S, S) in [-1, 1]: a random lattice that is smoothly interpolated and randomly shifted.

    key: (n,) int64, one key per image.
    x, y: (1, 1, S) and (1, S, 1), the coordinates of the pixels in [-1, 1].
    cells: number of lattice cells per axis. The random shift is less than one cell.
    """
    nodes = torch.arange(cells + 1)
    lattice = uniform(mix(key[:, None, None], nodes[:, None], nodes), 0, -1.0, 1.0)

    def kernel(axis: Tensor, shift: Tensor) -> list[Tensor]:
        position = (axis + 1) * ((cells - 1) / 2) + _field(shift)
        reach = [(1 - (position - node).abs()).clamp(min=0) for node in range(cells + 1)]
        return [weight * weight * (3 - 2 * weight) for weight in reach]

    columns, rows = kernel(x, uniform(key, 1)), kernel(y, uniform(key, 2))
    noise = torch.zeros(())
    for i, row in enumerate(rows):
        line = torch.zeros(())
        for j, column in enumerate(columns):
            line = line + column * _field(lattice[:, i, j])
        noise = noise + row * line
    return noise


def _chroma(numbers: _RandomNumbers) -> Tensor:
    """Return RGB offsets (n, 3) of random hue and saturation. They do not change the lightness (ITU-R BT.601 luma)."""
    hue, saturation = numbers(), numbers()
    red, green, blue = (((hue + shift) % 1 * 6 - 3).abs() - 1 for shift in (0.0, 2 / 3, 1 / 3))
    rgb = torch.stack([red, green, blue], dim=1).clamp(0, 1)
    luma = rgb[:, 0] * 0.299 + rgb[:, 1] * 0.587 + rgb[:, 2] * 0.114
    return (rgb - luma[:, None]) * saturation[:, None]


def _direction(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of angles in turns (1 turn = 360 degrees)."""
    step = (turn * _TURNS).floor().long()
    return _COSINE[step % _TURNS], _COSINE[(step - _TURNS // 4) % _TURNS]


def _wave(phase: Tensor) -> Tensor:
    """Return a triangle wave of period 1 in [-1, 1]."""
    return ((phase - phase.floor()) * 4 - 2).abs() - 1


def _blend(fixed: float, varied: Tensor, strength: float) -> Tensor:
    return fixed + (varied - fixed) * strength


def _field(values: Tensor) -> Tensor:
    """Reshape (n,) to (n, 1, 1), for broadcasting with (n, S, S)."""
    return values[:, None, None]
