"""Images that are stored for a measurement: an ``.npz`` as ADM's evaluator takes it, or a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aligntok.data.folders import ImageFolder
from aligntok.data.images import center_crop
from aligntok.data.loaders import read_ahead
from aligntok.data.sources import crop_id
from aligntok.errors import UserError, check
from aligntok.metrics import AdmFile
from aligntok.progress import Progress

CLASS_IN_NAME = re.compile(r"_class(\d+)\.\w+$")  # in the file names of `aligntok sample`
BATCHES_AHEAD = 2  # that are decoded while one is measured


class StoredFile(AdmFile):
    """The images of an ``.npz``; labels are ``arr_1``, if it has some.

    >>> path = getfixture("tmp_path") / "samples.npz"
    >>> np.savez(path, np.zeros((5, 8, 8, 3), np.uint8), np.arange(5))
    >>> StoredFile(path).count, StoredFile(path).labels
    (5, tensor([0, 1, 2, 3, 4]))
    """

    @property
    def count(self) -> int:
        """Number of images."""
        return self.shape[0]

    @cached_property
    def labels(self) -> Tensor | None:
        """Class of each image, (count,)."""
        if "arr_1" not in self.entries:
            return None
        labels = self.array("arr_1")
        fits = labels.shape == (self.count,) and np.issubdtype(labels.dtype, np.integer)
        return torch.from_numpy(labels.astype(np.int64)) if fits else None

    def images(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield the images in order, and say how far they are."""
        return with_progress(super().images(batch_size), self.count, self.path)


class StoredFolder:
    """The images of a folder, in the order of their names; those of class folders, a class after the other, in turn.

    >>> Image.new("RGB", (8, 6)).save(getfixture("tmp_path") / "000000_class7.png")
    >>> folder = StoredFolder(getfixture("tmp_path"))
    >>> folder.count, folder.image_size, folder.labels
    (1, (6, 8), tensor([7]))

    Args:
        path: The folder.
        crop: Side of ADM's centre crop in pixels; without, all images must have one size.

    Raises:
        UserError: No image is there, or the first cannot be read.
    """

    def __init__(self, path: Path, crop: int | None = None) -> None:
        self.path, self.folder = path, ImageFolder(str(path))
        classes, names, labels = self.folder.index
        self.count = len(names)
        found = [CLASS_IN_NAME.search(name.decode(errors="replace")) for name in names]
        self.order, self.labels = np.arange(self.count), None
        if all(found):
            self.labels = torch.tensor([int(match[1]) for match in found if match])
        elif len(classes) > 1:
            by_class = np.argsort(labels, kind="stable")
            number = np.arange(self.count) - np.searchsorted(labels[by_class], labels[by_class])  # within its class
            self.order = by_class[np.argsort(number, kind="stable")]
            self.labels = torch.from_numpy(labels[self.order])
        self.crop = None if crop is None else (crop, crop)
        first = self.folder[int(self.order[0])][0]
        self.image_size = self.crop or (first.height, first.width)

    @property
    def names(self) -> list[str]:
        """Paths of the images below the folder, in the order in which they are measured."""
        return [os.fsdecode(self.folder.index[1][index]) for index in self.order]

    @property
    def source(self) -> str:
        """Name of the folder, and a hash of the images' names, file sizes and crop."""
        return f"{self.path.resolve().name} images:{crop_id(self.folder, self.image_size)}"

    def images(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield the images in order, float32 (batch_size, 3, H, W) in [0, 1], and say how far they are.

        Raises:
            UserError: An image cannot be read, or has another size.
        """
        return with_progress(self.batches(batch_size), self.count, self.path)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the same in silence."""
        images = read_ahead(self.read, self.order.tolist(), (1 + BATCHES_AHEAD) * batch_size)
        while batch := list(islice(images, batch_size)):
            yield torch.stack(batch).permute(0, 3, 1, 2).contiguous().float() / 255

    def read(self, index: int) -> Tensor:
        """Return an image, bytes (H, W, 3)."""
        image: Image.Image = self.folder[index][0]
        if self.crop is not None:
            image = center_crop(image, self.crop)
        if (image.height, image.width) != self.image_size:
            name = self.folder.index[1][index].decode(errors="replace")
            raise UserError(
                f"{self.path / name} has {image.height}x{image.width} pixels, the first image"
                f" {self.image_size[0]}x{self.image_size[1]}: store images of one size; those of a reference are"
                " centre-cropped with --image_size"
            )
        return torch.from_numpy(np.array(image))


Images = StoredFile | StoredFolder


def open_images(path: Path, crop: int | None = None) -> Images:
    """Open an ``.npz`` or a folder.

    Raises:
        UserError: It is neither, or a folder without images.
    """
    if path.is_dir():
        return StoredFolder(path, crop)
    check(path.is_file(), f"there is no {path}: name an .npz or a folder of images")
    check(path.suffix == ".npz", f"{path} is neither an .npz nor a folder of images")
    return StoredFile(path)


def with_progress(batches: Iterable[Tensor], count: int, path: Path) -> Iterator[Tensor]:
    """Yield the batches of ``count`` images, and print from time to time how many are done."""
    progress = Progress(path.name, count)
    for batch in batches:
        yield batch
        progress.add(len(batch))
