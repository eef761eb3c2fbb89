"""Rows of a run's picture, as data in the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

GAP = 2  # white pixels around each tile, as ReconstructionGrid draws
NUM_ROWS = 3  # images, reconstructions, latents
MAX_WIDTH = 1600  # pixels; wider rows are made smaller, the page has no room for more
CRISP_WIDTH = 1100  # enlarged rows have about so many: small pixels stay squares on a fine screen


def picture_rows(path: Path, num_rows: int = NUM_ROWS, enlarged: bool = False) -> list[bytes] | None:
    """Return the rows of a picture as PNG files, or ``None`` if it cannot be read or has not so many rows.

    Args:
        path: A grid of tiles with a gap around each.
        num_rows: Of tiles.
        enlarged: Repeat the pixels of small pictures, and bring large ones to the same width.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    height, rest = divmod(image.height - GAP, num_rows)
    if rest or height <= GAP or image.width <= 2 * GAP:
        return None
    boxes = [(GAP, GAP + row * height, image.width - GAP, (row + 1) * height) for row in range(num_rows)]
    crops = [image.crop(box) for box in boxes]
    return [png(crisp(crop), CRISP_WIDTH) if enlarged else png(crop) for crop in crops]


def crisp(image: Image.Image) -> Image.Image:
    """Return an image with each pixel repeated as often as fits."""
    times = max(1, CRISP_WIDTH // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def png(image: Image.Image, max_width: int = MAX_WIDTH) -> bytes:
    """Return an image as a PNG file."""
    if image.width > max_width:
        size = (max_width, max(1, round(image.height * max_width / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png_file: bytes) -> str:
    """Return a PNG file as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(png_file).decode()
