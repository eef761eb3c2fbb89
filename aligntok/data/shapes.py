"""Procedural shapes: a labelled image set that needs no download and can be drawn at any size.

Figures are signed distance functions, so that one formula gives antialiased edges at every image size.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from aligntok.errors import UserError, check_positive

Array = npt.NDArray[np.floating[Any]]  # float32, which mypy cannot follow through arithmetic

MIN_SIZE = 8  # the smallest figure is then about 3 pixels wide; below that nothing can be told apart


class Shapes(Dataset[tuple[Image.Image, int]]):
    """Coloured, textured figures of 12 shapes among distractors; the shape is the class.

    Position, scale, rotation, both colours, both textures, distractors and pixel noise are drawn at random and
    independently of the class. Image ``index`` depends on ``(seed, index)`` alone, whatever the order, worker or
    process; its label is ``index % 12``. Another ``image_size`` draws the same scenes at that size (up to the pixel
    noise; on a non-square canvas the placement also stretches).

    >>> image, label = Shapes(num_images=100, image_size=32)[13]
    >>> image.size, label
    ((32, 32), 1)

    Args:
        num_images: Number of images.
        image_size: Side in pixels, or (H, W).
        seed: Another seed draws other images, e.g. for a validation set.
        plain: Leave out textures, distractors and noise: scenes that a small tokenizer can reconstruct.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self, num_images: int = 6000, image_size: int | tuple[int, int] = 32, seed: int = 0, plain: bool = False
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_positive(num_images=num_images)
        if min(height, width) < MIN_SIZE:
            raise UserError(f"image_size={image_size}: give at least {MIN_SIZE} pixels a side")
        if seed < 0:
            raise UserError(f"seed={seed}: give 0 or more")
        self.num_images = num_images
        self.image_size = (height, width)
        self.seed = seed
        self.plain = plain
        self.classes = list(FIGURES)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not -self.num_images <= index < self.num_images:
            raise IndexError(f"index {index} of {self.num_images} images")
        index %= self.num_images
        label = index % len(self.classes)
        rng = np.random.default_rng([self.seed, index])
        return Image.fromarray(draw_scene(self.classes[label], self.image_size, rng, self.plain)), label

    def __repr__(self) -> str:
        plain = ", plain=True" if self.plain else ""
        return f"Shapes(num_images={self.num_images}, image_size={self.image_size}, seed={self.seed}{plain})"


def draw_scene(
    name: str, image_size: tuple[int, int], rng: np.random.Generator, plain: bool = False
) -> npt.NDArray[np.uint8]:
    """Draw one figure on its ground.

    Args:
        name: One of the keys of ``FIGURES``.
        image_size: (H, W) in pixels.
        rng: Draws all that is random. The number of draws before the noise does not depend on the size.
        plain: One colour for the figure, one for the ground, and nothing else.

    Returns:
        RGB image, (H, W, 3).
    """
    height, width = image_size
    side = min(height, width)
    # coordinates of the pixel centres in units of the shorter side, (0, 0) in the middle of the image
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side)[None, :]
    half = np.array([width, height]) / (2 * side)

    figure_colour, ground_colour = _contrasting_colours(rng)
    radius = rng.uniform(0.35, 0.75) / 2
    centre = rng.uniform(-1, 1, 2) * (half - radius)
    angle = rng.uniform(0, 2 * math.pi)

    def fill(colour: Array) -> Array:
        return np.broadcast_to(colour, (height, width, 3)).copy() if plain else _texture(x, y, side, colour, rng)

    canvas = fill(ground_colour)
    num_under, num_over = (0, 0) if plain else rng.integers([0, 0], [6, 2])
    for _ in range(num_under):
        _add_distractor(canvas, x, y, side, half, rng)
    u, v = _rotate(x - np.float32(centre[0]), y - np.float32(centre[1]), angle)
    distance = FIGURES[name](u / np.float32(radius), v / np.float32(radius))
    _paint(canvas, _coverage(distance, radius * side), fill(figure_colour))
    for _ in range(num_over):
        _add_distractor(canvas, x, y, side, half, rng)
    if not plain:
        canvas += rng.uniform(0, 0.06) * rng.standard_normal(canvas.shape, dtype=np.float32)
    np.clip(canvas, 0, 1, out=canvas)
    return (canvas * 255 + 0.5).astype(np.uint8)


# Figures: signed distance (negative inside) to a shape whose circumscribed circle is the unit circle; y points down.


def _circle(x: Array, y: Array) -> Array:
    return _norm(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5))


def _triangle(x: Array, y: Array) -> Array:
    return _common(y, math.sqrt(0.75) * abs(x) - 0.5 * y) - 0.5


def _star(x: Array, y: Array) -> Array:
    sector = math.pi / 5
    inner = 0.42
    radius, angle = _norm(x, y), abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)
    # the edge from the tip (1, 0) to the notch, in the half sector that every other one mirrors
    dx, dy = inner * math.cos(sector) - 1, inner * math.sin(sector)
    return ((radius * np.cos(angle) - 1) * dy - radius * np.sin(angle) * dx) / math.hypot(dx, dy)


def _plus(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return _common(_common(x, y) - 0.95, _union(x, y) - 0.3)


def _ring(x: Array, y: Array) -> Array:
    return abs(_norm(x, y) - 0.78) - 0.22


def _heart(x: Array, y: Array) -> Array:
    # a square on its corner and a disc on each of its two upper sides
    corner, shift = 0.793, 0.207  # its half diagonal, and how far it sits below the centre of the unit circle
    x, y = abs(x), y - shift
    square = (x + abs(y) - corner) * math.sqrt(0.5)
    return _union(square, _norm(x - corner / 2, y + corner / 2) - corner * math.sqrt(0.5))


def _crescent(x: Array, y: Array) -> Array:
    return _common(_norm(x, y) - 1, 0.84 - _norm(x - 0.45, y))


def _hexagon(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return _common(y, math.sqrt(0.75) * x + 0.5 * y) - math.sqrt(0.75)


def _arrow(x: Array, y: Array) -> Array:
    length, width = 0.9, 0.82  # of the head, whose tip is at (1, 0)
    slope = (width * (x - 1) + length * abs(y)) / math.hypot(width, length)
    return _union(_box(x, y, -0.96, -0.2, 0.5, 0.2), _common(1 - length - x, slope))


def _letter_l(x: Array, y: Array) -> Array:
    return _union(_box(x, y, -0.56, -0.82, -0.14, 0.82), _box(x, y, -0.56, 0.4, 0.56, 0.82))


def _letter_t(x: Array, y: Array) -> Array:
    return _union(_box(x, y, -0.76, -0.65, 0.76, -0.24), _box(x, y, -0.2, -0.65, 0.2, 0.97))


def _box(x: Array, y: Array, left: float, top: float, right: float, bottom: float) -> Array:
    across = abs(x - (left + right) / 2) - (right - left) / 2
    return _common(across, abs(y - (top + bottom) / 2) - (bottom - top) / 2)


def _union(a: Array, b: Array) -> Array:
    distance: Array = np.minimum(a, b)
    return distance


def _common(a: Array, b: Array) -> Array:
    distance: Array = np.maximum(a, b)
    return distance


def _norm(x: Array, y: Array) -> Array:
    distance: Array = np.sqrt(x * x + y * y)  # several times faster than hypot
    return distance


FIGURES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "plus": _plus,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "hexagon": _hexagon,
    "arrow": _arrow,
    "L": _letter_l,
    "T": _letter_t,
}
"""Signed distance function of each class, in the order of the labels."""


def _coverage(distance: Array, pixels: float) -> Array:
    """Return how much of each pixel lies inside, given the distance in units of ``pixels`` pixels."""
    return (0.5 - distance * np.float32(pixels)).clip(0, 1)


def _rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _paint(canvas: Array, coverage: Array, colour: Array) -> None:
    canvas += coverage[..., None] * (colour - canvas)


def _contrasting_colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw two colours, (3,) each, that stay apart when texture and noise are added."""
    colours = _colours(12, rng)
    # luma counts most: an eye, or a network on grey values, should also see the figure (weights: ITU-R BT.601)
    offset = colours[1:] - colours[0]
    contrast = abs(offset @ np.array([0.299, 0.587, 0.114], dtype=np.float32)) + 0.3 * np.sqrt((offset**2).sum(1))
    enough = contrast > 0.45
    return colours[1 + int(np.argmax(enough if enough.any() else contrast))], colours[0]


def _colours(count: int, rng: np.random.Generator) -> Array:
    """Draw colours, (count, 3) in [0, 1], uniform in hue and lightness."""
    hue, lightness, saturation = rng.random((3, count, 1), dtype=np.float32)
    wave = np.cos(2 * math.pi * (hue + np.array([0, 1 / 3, 2 / 3], dtype=np.float32)))
    colours: Array = np.clip(0.1 + 0.8 * lightness + 0.35 * np.sqrt(saturation) * wave, 0, 1)
    return colours


def _texture(x: Array, y: Array, side: int, colour: Array, rng: np.random.Generator) -> Array:
    """Draw a pattern of two shades around ``colour``, (H, W, 3)."""
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    period = rng.uniform(0.09, 0.25)
    phase = rng.random(2, dtype=np.float32)
    u, v = _rotate(x, y, rng.uniform(0, 2 * math.pi))
    shade = rng.uniform(-1, 1, 3).astype(np.float32)
    shade *= np.float32(rng.uniform(0.08, 0.16)) / np.sqrt((shade**2).sum())
    if kind == "flat":
        return np.broadcast_to(colour, (*u.shape, 3)).copy()
    if kind == "gradient":
        return colour + (2 * u).clip(-1, 1)[..., None] * shade
    u, v = u / np.float32(period) + phase[0], v / np.float32(period) + phase[1]
    if kind == "stripes":
        pattern = _wave(u, period * side)
    elif kind == "checks":
        pattern = _wave(u / 2, 2 * period * side) * _wave(v / 2, 2 * period * side)
    else:
        distance = _norm(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5) - 0.32
        pattern = 2 * _coverage(distance, period * side) - 1
    return colour + pattern[..., None] * shade


TEXTURES = ["flat", "stripes", "checks", "dots", "gradient"]


def _wave(u: Array, period: float) -> Array:
    """Antialiased square wave in [-1, 1] of period 1 in ``u`` and ``period`` pixels."""
    distance = abs(u - np.floor(u) - 0.5) - 0.25
    return 2 * _coverage(distance, period) - 1


def _add_distractor(
    canvas: Array, x: Array, y: Array, side: int, half: npt.NDArray[np.float64], rng: np.random.Generator
) -> None:
    """Paint a blob or a short line anywhere on the canvas, much thinner than any figure."""
    centre = (rng.uniform(-1, 1, 2) * half).astype(np.float32)
    is_line = rng.random() < 0.5
    thickness = rng.uniform(0.01, 0.02) if is_line else rng.uniform(0.02, 0.05)
    length = rng.uniform(0.08, 0.25) if is_line else 0.0
    u, v = _rotate(x - centre[0], y - centre[1], rng.uniform(0, math.pi))
    distance = _norm(np.maximum(abs(u) - np.float32(length), 0), v) - np.float32(thickness)
    _paint(canvas, _coverage(distance, side), _colours(1, rng)[0])
