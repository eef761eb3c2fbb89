"""From a source to tensors: crops, flips, and what to do about an image that cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.data.images import center_crop, random_crop, random_flip, random_resized_crop, to_rgb
from aligntok.data.sampler import Key
from aligntok.data.sources import Item, length, read_item, spread_over
from aligntok.errors import UserError
from aligntok.randomness import image_generator

Transform = Callable[[Image.Image, np.random.Generator], Image.Image]
Sample = dict[str, Any]
Crop = Literal["random", "random_resized", "center"]
WHOLE_RANGE = (0.08, 1.0)  # torchvision's RandomResizedCrop
BAD_IMAGE = (UserError, OSError, SyntaxError)  # ours; Pillow's are OSError, and SyntaxError for a broken PNG
MAX_BAD_SHARE = 0.01
NUM_TRIES = 32


class ImageDataset(Dataset[Sample | None]):
    """Images of a source as bytes (H, W, 3), with label and id; a sample is a function of (seed, epoch, index).

    An image that cannot be read is named, counted and, in training, replaced by the next one; in evaluation it is left
    out. More than one in a hundred is an error.

    Args:
        source: Items (PIL image, label).
        transform: Image and random generator to an image of the final size.
        seed: Of the augmentation.
        replace_bad: Whether the next image stands in for a bad one.
        on_bad_image: ``skip`` as above, or ``raise``.
    """

    def __init__(
        self,
        source: Dataset[Item],
        transform: Transform,
        seed: int,
        replace_bad: bool,
        on_bad_image: Literal["skip", "raise"],
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.replace_bad, self.on_bad_image = replace_bad, on_bad_image
        bad = torch.zeros(length(source), dtype=torch.uint8)
        self.bad = bad.share_memory_()  # type: ignore[no-untyped-call]  # one count for all workers

    def __len__(self) -> int:
        return len(self.bad)

    def __getitem__(self, key: Key | int) -> Sample | None:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = image_generator(self.seed, epoch, index)
        for candidate in range(index, index + (len(self) if self.replace_bad else 1)):
            candidate %= len(self)
            try:
                image, label = read_item(self.source, candidate)
                pixels = np.array(self.transform(to_rgb(image), generator))
            except BAD_IMAGE as error:
                self.report(candidate, error)
            else:
                return {"image": torch.from_numpy(pixels), "label": label, "id": candidate}
        return None

    def __getitems__(self, keys: Sequence[Key | int]) -> list[Sample | None]:
        """Return several samples."""
        return [self[key] for key in keys]

    def report(self, index: int, error: Exception) -> None:
        """Name and count a bad image; stop when there are too many."""
        message = str(error) if isinstance(error, UserError) else f"image {index} of the source: {error}"
        if self.on_bad_image == "raise":
            raise UserError(f"{message} (data.on_bad_image is raise)") from error
        known, self.bad[index] = bool(self.bad[index]), 1
        if known:
            return
        count = int(self.bad.sum())
        if count > MAX_BAD_SHARE * len(self):
            raise UserError(
                f"{count} of {len(self)} images cannot be read, more than {MAX_BAD_SHARE:.0%}; the last: {message}."
                " Remove or replace these files"
            ) from error
        print(f"aligntok: image skipped ({count} of {len(self)} so far): {message}", file=sys.stderr, flush=True)

    @staticmethod
    def collate(samples: list[Sample | None]) -> dict[str, Tensor] | None:
        """Stack samples to a batch."""
        return collate(samples)

    def check_readable(self) -> None:
        """Raise a ``UserError`` if none of some images can be read: then it is no matter of a few bad files."""
        spread = spread_over(len(self), NUM_TRIES)
        for index in spread:
            try:
                to_rgb(read_item(self.source, index)[0])
            except BAD_IMAGE as error:
                last = error
            else:
                return
        raise UserError(f"no image can be read ({len(spread)} of {len(self)} tried); the last: {last}")


def collate(samples: list[Sample | None]) -> dict[str, Tensor] | None:
    """Stack samples to a batch of ``image`` (B, 3, H, W) in bytes, ``label`` (B,) and ``id`` (B,).

    Bad images are left out; ``None`` if nothing is left.
    """
    good = [sample for sample in samples if sample is not None]
    if not good:
        return None
    return {
        "image": torch.stack([sample["image"] for sample in good]).permute(0, 3, 1, 2),  # copied later, on the device
        "label": torch.tensor([sample["label"] for sample in good]),
        "id": torch.tensor([sample["id"] for sample in good]),
    }


def training_crop(crop: Crop, size: tuple[int, int], scale: tuple[float, float], flip: bool) -> Transform:
    """Return crop and flip for training."""
    crops: dict[str, Callable[..., Image.Image]] = {
        "random": random_crop,
        "random_resized": partial(random_resized_crop, scale=scale),
        "center": lambda image, size, generator: center_crop(image, size),
    }

    def transform(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        image = crops[crop](image, size, generator)
        return random_flip(image, generator) if flip else image

    return transform


def evaluation_crop(size: tuple[int, int]) -> Transform:
    """Return ADM's centre crop."""
    return lambda image, generator: center_crop(image, size)
