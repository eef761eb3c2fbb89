"""Where images come from: map-style datasets whose items are (PIL image, label).

Any torchvision dataset is one too; these are the ones that it lacks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from aligntok.data.images import read_image
from aligntok.errors import UserError

Item = tuple[Image.Image, int]


class ImageFolder(Dataset[Item]):
    """Images in class folders, or in one flat folder (then every label is 0).

    Args:
        root: The folder. With subfolders, each is a class, searched to any depth; classes are numbered by sorted name.

    Raises:
        UserError: At the first use, if the folder is missing or holds no image.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.draft_size: int | None = None  # set by the data module where a coarser JPEG decoding may do

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        if not self.root.is_dir():
            raise UserError(f"there is no image folder {self.root}: set data.train.init_args.root (and data.val's) to yours")
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and not entry.name.startswith("."))

    @cached_property
    def files(self) -> list[tuple[str, int]]:
        """Path relative to the root, and label, of each image."""
        folders: Sequence[str] = self.classes or [""]
        found = []
        for label, folder in enumerate(folders):
            for parent, _, names in os.walk(self.root / folder):
                prefix = os.path.relpath(parent, self.root)
                found += [(os.path.join(prefix, name), label) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        if not found:
            raise UserError(f"image folder {self.root} holds no image ({', '.join(IMG_EXTENSIONS)}), also not in subfolders")
        return sorted(found)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        name, label = self.files[index]
        return read_image(self.root / name, min_size=self.draft_size), label

    def fingerprint(self) -> str:
        """Return a hash of names, labels and file sizes."""
        digest = hashlib.sha256()
        for name, label in self.files:
            digest.update(f"{name} {label} {(self.root / name).stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


class Digits(Dataset[Item]):
    """Scanned handwritten digits, 8x8 pixels, that scikit-learn brings: real images for an offline start.

    Args:
        split: ``train`` (the first 1,437 images) or ``val`` (the last 360).

    Reference:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """

    NUM_TRAIN = 1437
    classes = [str(digit) for digit in range(10)]  # noqa: RUF012

    def __init__(self, split: Literal["train", "val"] = "train") -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        part = slice(None, self.NUM_TRAIN) if split == "train" else slice(self.NUM_TRAIN, None)
        self.split = split
        self.pixels = np.round(data.images[part] * (255 / 16)).astype(np.uint8)
        self.labels = data.target[part].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]

    def __repr__(self) -> str:
        return f"Digits(split={self.split!r})"


class Part(Dataset[Item]):
    """Some images of a source.

    Args:
        source: The source.
        indices: Which of its images.
    """

    def __init__(self, source: Dataset[Item], indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)

    @property
    def classes(self) -> Any:
        """Names of the classes of the source."""
        return getattr(self.source, "classes", [])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.indices[index]]

    def fingerprint(self) -> str:
        """Return a hash of the source and the indices."""
        return hashlib.sha256(f"{source_id(self.source)} {self.indices}".encode()).hexdigest()[:16]


def split_holdout(source: Dataset[Item], share: float) -> tuple[Part, Part]:
    """Split a source into one for training and a held-out ``share``, the same split each time.

    Raises:
        UserError: The share leaves one of the two empty.
    """
    count = length(source)
    held = round(count * share)
    if not 0 < held < count:
        raise UserError(f"data.holdout {share} of {count} images leaves {held} for validation: name data.val, or change holdout")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return Part(source, sorted(order[held:])), Part(source, sorted(order[:held]))


def source_id(source: Dataset[Item]) -> str:
    """Return what identifies the images of a source: its own fingerprint, or what it says of itself."""
    return source.fingerprint() if hasattr(source, "fingerprint") else repr(source)


def length(source: Dataset[Item]) -> int:
    """Return the number of images of a map-style source."""
    return len(source)  # type: ignore[arg-type]
