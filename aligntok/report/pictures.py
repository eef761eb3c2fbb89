"""Rows of a run's picture, as data in the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

GAP = 2  # white pixels around each tile, as ReconstructionGrid draws
NUM_ROWS = 3  # images, reconstructions, latents
MAX_WIDTH = 1600  # pixels; wider rows are made smaller, the page has no room for more


def picture_rows(path: Path) -> list[bytes] | None:
    """Return the three rows of a picture as PNG files, or ``None`` if it cannot be read or has no three rows."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    height, rest = divmod(image.height - GAP, NUM_ROWS)
    if rest or height <= GAP or image.width <= 2 * GAP:
        return None
    boxes = [(GAP, GAP + row * height, image.width - GAP, (row + 1) * height) for row in range(NUM_ROWS)]
    return [png(image.crop(box)) for box in boxes]


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    if image.width > MAX_WIDTH:
        size = (MAX_WIDTH, max(1, round(image.height * MAX_WIDTH / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png_file: bytes) -> str:
    """Return a PNG file as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(png_file).decode()
