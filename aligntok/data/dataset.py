"""From a source to batches, each a function of (seed, epoch, ids): crop, flip, choice of views, unreadable images."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.data.folders import ImageFolder
from aligntok.data.images import center_crop, random_crop, random_flip, random_resized_crop, to_rgb
from aligntok.data.mixture import Mixture
from aligntok.data.order import Key
from aligntok.data.sources import Batch, Item, Subset, length, read_item, source_indices, spread_over, whole_source
from aligntok.data.tars import CaptionedTars
from aligntok.errors import UserError, check
from aligntok.randomness import choices, image_generator, weighted_choice

WHOLE_RANGE = (0.08, 1.0)  # torchvision's RandomResizedCrop
BAD_IMAGE = (UserError, OSError, SyntaxError)  # ours; Pillow's are OSError, and SyntaxError for a broken PNG
MAX_BAD_SHARE = 0.01
NUM_TRIES = 32
MAX_FLAGS = 1 << 22  # bytes of shared memory


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image at random; evaluation always takes ADM's centre crop.

    >>> augmentation = Augmentation("random_resized", crop_scale=(0.5, 1.0))
    >>> augmentation(Image.new("RGB", (40, 30)), (16, 16), np.random.default_rng(0)).size
    (16, 16)

    Attributes:
        crop: ``random`` (resize the shorter side, crop anywhere), ``random_resized`` (also scale and aspect), or
            ``center``.
        crop_scale: Range of the area that ``random_resized`` keeps, as a share of the image's.
        flip: Mirror half of the images; of a cache, take what was encoded of the mirrored image.

    Raises:
        UserError: ``crop_scale`` without ``random_resized``, or no range of shares.
    """

    crop: Literal["random", "random_resized", "center"] = "random"
    crop_scale: tuple[float, float] = WHOLE_RANGE
    flip: bool = True

    def __post_init__(self) -> None:
        effective = self.crop == "random_resized" or tuple(self.crop_scale) == WHOLE_RANGE
        check(effective, f"crop_scale {self.crop_scale} has no effect on crop {self.crop}: leave it out")
        least, most = self.crop_scale
        check(0 < least <= most <= 1, f"crop_scale {self.crop_scale}: give two shares, 0 < least <= most <= 1")

    def __call__(self, image: Image.Image, size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
        """Return a random view of ``size`` = (H, W)."""
        if self.crop == "random":
            image = random_crop(image, size, generator)
        elif self.crop == "random_resized":
            image = random_resized_crop(image, size, generator, self.crop_scale)
        else:
            image = center_crop(image, size)
        return random_flip(image, generator) if self.flip else image


class ImageDataset(Dataset[dict[str, Any] | None]):
    """Images of a source as bytes (H, W, 3), with label or caption, and id; a function of (seed, epoch, index).

    Where an image has several captions, one is chosen for each epoch by their weights; evaluation sees that of epoch 0.

    An image that cannot be read is named, counted, and replaced by the next one or left out (``None``). More than one
    in a hundred of the whole source, of which this may be a subset, is an error.

    >>> dataset = ImageDataset([(Image.new("RGB", (40, 30)), 7)], (16, 16))
    >>> dataset[0]["image"].shape, dataset[0]["label"]
    (torch.Size([16, 16, 3]), 7)

    Args:
        source: Items (PIL image, label or captions), see ``read_item``.
        image_size: (H, W).
        augmentation: Of training; without one, ADM's centre crop.
        seed: Of the augmentation.
        replace_bad: Whether the next image stands in for a bad one.
        on_bad_image: ``skip`` as above, or ``raise``.
        bad: Which images of the whole source are known to be bad, if others read it too: see ``no_bad_images``.
    """

    num_threads = 0  # that read ahead: images are read by processes

    def __init__(
        self,
        source: Dataset[Item],
        image_size: tuple[int, int],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        replace_bad: bool = False,
        on_bad_image: Literal["skip", "raise"] = "skip",
        bad: Tensor | None = None,
    ) -> None:
        self.source, self.image_size, self.augmentation, self.seed = source, image_size, augmentation, seed
        self.replace_bad, self.on_bad_image = replace_bad, on_bad_image
        self.bad = no_bad_images(source) if bad is None else bad

    def __len__(self) -> int:
        return length(self.source)

    def __getitem__(self, key: Key | int) -> dict[str, Any] | None:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = image_generator(self.seed, epoch, index)
        for candidate in range(index, index + (len(self) if self.replace_bad else 1)):
            candidate %= len(self)
            try:
                image, target = read_item(self.source, candidate)
                image = to_rgb(image)
                if self.augmentation is None:
                    image = center_crop(image, self.image_size)
                else:
                    image = self.augmentation(image, self.image_size, generator)
                sample = {"image": torch.from_numpy(np.array(image)), "id": candidate}
                if isinstance(target, int):
                    return {**sample, "label": target}
                chosen = weighted_choice(list(target.values()), self.seed, epoch, candidate, "caption")
                return {**sample, "caption": list(target)[chosen]}
            except BAD_IMAGE as error:
                self.report(candidate, error)
        return None

    def __getitems__(self, keys: Sequence[Key | int]) -> Batch | None:
        """Return a batch: ``image`` (B, 3, H, W) in bytes, ``id`` (B,), and ``label`` (B,) or ``caption`` (B strings).

        It is without the bad images, ``None`` if none is left. torch's loader calls this instead of asking for one
        item after the other.

        Raises:
            UserError: Some images have labels, others captions.
        """
        good = [sample for key in keys if (sample := self[key]) is not None]
        if not good:
            return None
        (target, *others) = {key for sample in good for key in sample} - {"image", "id"}
        check(not others, "some images have labels and others captions: give sources of one kind")
        targets = [sample[target] for sample in good]
        return {
            "image": torch.stack([sample["image"] for sample in good]).permute(0, 3, 1, 2),  # copied on the device
            target: torch.tensor(targets) if target == "label" else targets,
            "id": torch.tensor([sample["id"] for sample in good]),
        }

    def report(self, index: int, error: Exception) -> None:
        """Name and count a bad image; stop when there are too many."""
        message = str(error) if isinstance(error, UserError) else f"image {index} of the source: {error}"
        if self.on_bad_image == "raise":
            raise UserError(f"{message} (on_bad_image is raise)") from error
        (place,) = source_indices(self.source, [index])
        place %= len(self.bad)
        known, self.bad[place] = bool(self.bad[place]), 1
        if known:
            return
        count, total = int(self.bad.sum()), length(whole_source(self.source))
        if count > MAX_BAD_SHARE * total:
            raise UserError(
                f"{count} of {total} images cannot be read, more than {MAX_BAD_SHARE:.0%}; the last: {message}."
                " Remove or replace these files"
            ) from error
        print(f"aligntok: image skipped ({count} of {total} so far): {message}", file=sys.stderr, flush=True)

    def check_readable(self) -> None:
        """Raise a ``UserError`` if none of some images can be read: then it is no matter of a few bad files."""
        _ = self.has_captions

    @cached_property
    def has_captions(self) -> bool:
        """Whether the images have captions, or else labels; see ``check_readable``."""
        spread = spread_over(len(self), NUM_TRIES)
        for index in spread:
            try:
                image, target = read_item(self.source, index)
                to_rgb(image)
            except BAD_IMAGE as error:
                last = error
            else:
                return isinstance(target, dict)
        raise UserError(f"no image can be read ({len(spread)} of {len(self)} tried); the last: {last}")


def no_bad_images(source: Dataset[Any]) -> Tensor:
    """Return a flag for each image of the whole source, of which this may be a subset; workers share the flags.

    Of a source of more than ``MAX_FLAGS`` images several share one: the count is a little too low then.
    """
    flags = torch.zeros(min(length(whole_source(source)), MAX_FLAGS), dtype=torch.uint8)
    return flags.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


class BatchDataset(Dataset[Any]):
    """Batches of a ``BatchSource``, or of a subset of one, with their ``id``; a function of (seed, epoch, ids).

    Args:
        source: Gives the rows.
        seed: Of the choice of views.
        num_views: Take one of the first so many, each as often as the others.
        num_threads: So many threads read ahead; 0 leaves it to the loader's processes.
    """

    def __init__(self, source: Dataset[Any], seed: int, num_views: int, num_threads: int) -> None:
        self.source: Any = source
        self.seed, self.num_views, self.num_threads = seed, num_views, num_threads

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key | int]) -> Batch:
        """Return the batch of these keys."""
        epochs, ids = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], dtype=np.int64).T.copy()
        views = choices(self.num_views, self.seed, epochs, ids)
        return {**self.source.batch(ids, views), "id": torch.from_numpy(ids)}


def reduced(source: Dataset[Any], min_size: int) -> Dataset[Any]:
    """Return the same images, of files decoded faster and a little coarser with both sides at least ``min_size``."""
    if isinstance(source, Subset):
        return Subset(reduced(source.source, min_size), source.indices)
    if isinstance(source, Mixture):
        return source.of([reduced(one, min_size) for one in source.sources])
    if isinstance(source, (ImageFolder, CaptionedTars)):
        smaller = copy.copy(source)
        smaller.min_size = min_size
        return smaller
    return source
