"""Reading, cropping and flipping of single images, PIL in and PIL out."""

import math
import os
from importlib.util import find_spec
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aligntok.errors import UserError, check, words_of

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"]
"""What is opened, whatever a file is called: formats of pixels alone. Pillow would have Ghostscript run an EPS."""
if find_spec("PIL.AvifImagePlugin"):  # of newer Pillow
    FORMATS.append("AVIF")

_MAX_16_BIT = 65535
_REDUCING_GAP = 3.0  # from here on the result is "almost indistinguishable" from a full one (Pillow, Image.resize)
_NUM_ATTEMPTS = 10  # of torchvision's RandomResizedCrop


def read_image(path: str | PathLike[str], min_size: int | None = None) -> Image.Image:
    """Read the first frame of an image file as RGB, turned upright as its EXIF orientation says.

    Args:
        path: A file of one of the ``FORMATS``.
        min_size: Allow a JPEG to be decoded at 1/2, 1/4 or 1/8 as long as both sides keep this many pixels. Much faster
            on large photographs, but the pixels differ slightly from a full decode: for training, not for evaluation.

    Raises:
        UserError: If the file is missing, empty, truncated, no image, or has pixels without an agreed 8-bit scale.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            return _decoded(file, min_size)
    except Exception as error:  # the decoders raise many kinds on what is damaged
        raise UserError(f"cannot read image {printable(fspath(path))}: {_reason(error, Path(path))}") from error


def decode_image(content: bytes, name: str, min_size: int | None = None) -> Image.Image:
    """Return the image that a file holds, see ``read_image``; ``name`` is what messages call it."""
    check(bool(content), f"cannot read image {name}: the file is empty")
    try:
        return _decoded(BytesIO(content), min_size)
    except Exception as error:
        raise UserError(f"cannot read image {name}: {_reason(error)}") from error


def printable(name: str) -> str:
    r"""Return a name of a file as it can be printed in a line, whatever is in it.

    >>> printable("a\nb.png"), printable("ä.png")
    ('a\\nb.png', 'ä.png')
    """
    return name if name.isprintable() else repr(name)[1:-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB: 16-bit grey by its high byte, transparency composited on white.

    Raises:
        UserError: If the pixels are floating point or integers outside 16 bits, which have no agreed scale.
    """
    transparent = image.has_transparency_data
    if image.mode == "F":
        raise UserError("floating point pixels have no agreed scale; convert to 8 or 16 bits")
    if image.mode.startswith("I"):
        image, transparent = _grey_from_16_bit(image), False
    if transparent:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale the image to just cover ``size`` = (H, W) and cut out its middle.

    For a square this is the crop that ImageNet generators are trained and evaluated with.

    Reference:
        Dhariwal and Nichol, ADM, arXiv:2105.05233, ``center_crop_arr`` of openai/guided-diffusion.
    """
    image = _halve(image, size)
    width, height = _covering(image, size)
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size[1], top + size[0]))


def random_crop(image: Image.Image, size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """Scale the image as ``center_crop`` does and cut out ``size`` = (H, W) at a random place."""
    image = _halve(image, size)
    width, height = _covering(image, size)
    left, top = (int(generator.integers(length)) for length in (width - size[1] + 1, height - size[0] + 1))
    x, y = image.width / width, image.height / height  # resize only what the window shows
    box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Cut out a box of random area and aspect ratio and resize it to ``size`` = (H, W).

    Args:
        image: Any size.
        size: (H, W) of the result.
        generator: Source of the randomness.
        scale: Least and greatest area of the box, as a part of the image.
        ratio: Least and greatest width over height of the box, uniform in the logarithm.

    Reference:
        Szegedy et al., Going deeper with convolutions, arXiv:1409.4842, section 6;
        ``RandomResizedCrop`` of torchvision.
    """
    left, top, width, height = _random_box(image.width, image.height, generator, scale, ratio)
    return to_rgb(image).resize(
        (size[1], size[0]),
        Image.Resampling.BICUBIC,
        box=(left, top, left + width, top + height),
        reducing_gap=_REDUCING_GAP,
    )


def random_flip(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Mirror left and right in half of the cases."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 1 / 2 else image


def _open(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of what is none, such as a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has none


def _decoded(file: IO[bytes], min_size: int | None) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        if min_size is not None:
            image.draft(None, (min_size, min_size))  # nothing but JPEG heeds it
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def _reason(error: Exception, path: Path | None = None) -> str:
    if path and os.path.exists(path) and not os.path.isfile(path):
        return "it is no file"
    if path and os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"the file is no image of a format that is read ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return words_of(error)


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """Return the high byte of 16-bit grey, white where the file declares one grey value as transparent."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > _MAX_16_BIT:
        raise UserError(f"pixels in {values.min()}..{values.max()} have no agreed scale; convert to 8 or 16 bits")
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _halve(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Halve the image, which is cheap, while both sides stay at least as long as ``size`` = (H, W)."""
    image = to_rgb(image)
    while image.width >= 2 * size[1] and image.height >= 2 * size[0]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _covering(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height at which the image just covers ``size`` = (H, W)."""
    factor = max(size[1] / image.width, size[0] / image.height)
    return round(image.width * factor), round(image.height * factor)


def _random_box(
    width: int, height: int, generator: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) of a box that lies inside an image of the given width and height."""
    for _ in range(_NUM_ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = (int(generator.integers(length)) for length in (width - box_width + 1, height - box_height + 1))
            return left, top, box_width, box_height
    # the image is too long for such a box: the largest one in its middle that keeps to the aspect ratios
    box_width, box_height = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
