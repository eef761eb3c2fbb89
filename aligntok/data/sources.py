"""Where images come from: map-style datasets whose items are (PIL image, label).

Any torchvision dataset is one too; these are the ones that it lacks.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from aligntok.data.images import read_image
from aligntok.errors import UserError

Item = tuple[Image.Image, int]
Indices = npt.NDArray[np.int64]
NUM_PROBES = 16


class ImageFolder(Dataset[Item]):
    """Images in class folders, or in one flat folder (then every label is 0).

    Class folders are searched to any depth, through links too; hidden files and folders are left out. Classes are
    numbered by sorted name, images sorted by path: the same on every machine.

    >>> root = getfixture("tmp_path")
    >>> (root / "cat").mkdir()
    >>> Image.new("RGB", (8, 8)).save(root / "cat" / "1.png")
    >>> len(ImageFolder(str(root))), ImageFolder(str(root)).classes
    (1, ['cat'])

    Args:
        root: The folder.

    Raises:
        UserError: At the first use, if the folder is missing, holds no image, or holds images both in class folders
            and beside them.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser()
        self.min_size: int | None = None

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes; none for a flat folder."""
        return self.index[0]

    @cached_property
    def index(self) -> tuple[list[str], npt.NDArray[np.bytes_], Indices]:
        """Names of the classes; path below the root, and label, of each image."""
        if not self.root.is_dir():
            raise UserError(
                f"there is no image folder {self.root}: set data.train.init_args.root (and data.val's) to yours"
            )
        entries = visible(self.root)
        folders = [entry.name for entry in entries if entry.is_dir()]
        beside = [entry.name for entry in entries if not entry.is_dir() and is_image(entry.name)]
        found = [(name, label) for label, folder in enumerate(folders) for name in find_images(self.root, folder)]
        if found and beside:
            raise UserError(
                f"image folder {self.root} holds images in folders ({found[0][0]}) and beside them ({beside[0]}): put"
                " every image into a class folder, or all into one folder without subfolders"
            )
        if not found:
            folders, found = [], [(name, 0) for name in beside]
        if not found:
            known = ", ".join(IMG_EXTENSIONS)
            raise UserError(
                f"image folder {self.root} holds no image, also not in subfolders: name another folder ({known})"
            )
        found.sort()
        # arrays, because workers copy every page of a list of a million names, by counting references to them
        names = np.array([os.fsencode(name) for name, _ in found])
        return folders, names, np.array([label for _, label in found])

    def __len__(self) -> int:
        return len(self.index[1])

    def __getitem__(self, index: int) -> Item:
        _, names, labels = self.index
        return read_image(self.root / os.fsdecode(names[index]), self.min_size), int(labels[index])

    def reduced(self, min_size: int) -> ImageFolder:
        """Return the same images, decoded faster and a little coarser where both sides stay above ``min_size``."""
        other = copy.copy(self)
        other.min_size = min_size
        return other

    def fingerprint(self) -> str:
        """Return a hash of names, labels and file sizes, wherever the folder lies."""
        digest = hashlib.sha256()
        root = os.fsencode(self.root)
        for name, label in zip(*self.index[1:], strict=True):
            path = os.path.join(root, name)
            size = os.stat(path).st_size if os.path.exists(path) else -1  # a broken link is a bad image like others
            digest.update(b"%s %d %d\n" % (name, label, size))
        return digest.hexdigest()[:16]


class Digits(Dataset[Item]):
    """Scanned handwritten digits, 8x8 pixels, that scikit-learn brings: real images for an offline start.

    >>> digits = Digits("val")
    >>> len(digits), digits[0][0].size
    (360, (8, 8))

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


class Subset(Dataset[Item]):
    """Some images of a source.

    Args:
        source: The source.
        indices: Which of its images.
    """

    def __init__(self, source: Dataset[Item], indices: Sequence[int] | Indices) -> None:
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)

    @property
    def classes(self) -> Any:
        """Names of the classes of the source."""
        return getattr(self.source, "classes", [])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.indices[index])]

    def batch(self, ids: Indices, views: Indices) -> dict[str, torch.Tensor]:
        """Return a batch of the source, where that is a ``BatchSource``."""
        batch: dict[str, torch.Tensor] = self.source.batch(self.indices[ids], views)  # type: ignore[attr-defined]
        return batch

    def reduced(self, min_size: int) -> Subset:
        """Return the same images of the reduced source."""
        return Subset(reduced(self.source, min_size), self.indices)

    def fingerprint(self) -> str:
        """Return a hash of the source and the indices."""
        return hashlib.sha256(source_id(self.source).encode() + self.indices.tobytes()).hexdigest()[:16]


def source_indices(source: Dataset[Any], ids: Sequence[int]) -> list[int]:
    """Return which images of the whole source the items ``ids`` are, where ``source`` is a part of another."""
    while isinstance(source, (Subset, torch.utils.data.Subset)):
        ids = [int(source.indices[i]) for i in ids]
        source = source.source if isinstance(source, Subset) else source.dataset
    return list(ids)


def split_holdout(
    source: Dataset[Item], share: float, image_ids: Indices | None = None, count: int | None = None
) -> tuple[Subset, Subset]:
    """Split a source into one for training and a held-out ``share``, the same split each time.

    A smaller share is part of a greater one.

    Args:
        source: The images, or a cache.
        share: Of the images, to hold out.
        image_ids: Of a cache, the image of each row: its images are split as their source was.
        count: Images of that source, those included that have no row.

    Raises:
        UserError: The share leaves one of the two empty.
    """
    image_ids = np.arange(length(source)) if image_ids is None else image_ids
    count = len(image_ids) if count is None else count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    is_held = np.isin(image_ids, order[: round(count * share)])
    held = int(is_held.sum())
    if not 0 < held < len(is_held):
        raise UserError(
            f"val={share} of {len(is_held)} images leaves {held} for validation: change the share, or name images"
        )
    return Subset(source, np.flatnonzero(~is_held)), Subset(source, np.flatnonzero(is_held))


def reduced(source: Dataset[Item], min_size: int) -> Dataset[Item]:
    """Return the same images, read faster where the source can, with both sides at least ``min_size``."""
    return source.reduced(min_size) if isinstance(source, (ImageFolder, Subset)) else source


def read_item(source: Dataset[Item], index: int) -> Item:
    """Return image and label.

    Raises:
        UserError: The source gives something else.
    """
    item: Any = source[index]
    name = type(source).__name__
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], Image.Image):
        parts = (
            ", ".join(type(part).__name__ for part in item) if isinstance(item, (tuple, list)) else type(item).__name__
        )
        raise UserError(
            f"{name} gives ({parts}), not (PIL image, label): leave out its transform, aligntok crops and scales itself"
        )
    try:
        return item[0], operator.index(item[1])  # takes tensors and NumPy's numbers too
    except TypeError as error:
        raise UserError(
            f"{name} gives the label {str(item[1])[:40]!r}, not a whole number: give it another target_type or"
            " target_transform"
        ) from error


def source_id(source: Dataset[Item]) -> str:
    """Return what identifies the images of a source: its own fingerprint, or a hash of some of its images."""
    if hasattr(source, "fingerprint"):
        return str(source.fingerprint())
    count = length(source)
    digest = hashlib.sha256(f"{type(source).__name__} {count}".encode())
    for index in spread_over(count, NUM_PROBES):
        try:
            image, label = read_item(source, index)
            digest.update(f"{image.mode} {image.size} {label}".encode() + image.tobytes())
        except (UserError, OSError, SyntaxError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def crop_id(source: Dataset[Item], image_size: tuple[int, ...]) -> str:
    """Return a hash of the images that evaluation sees: their source and their centre crop."""
    return hashlib.sha256(f"{source_id(source)} center crop {image_size}".encode()).hexdigest()[:16]


def spread_over(total: int, count: int) -> list[int]:
    """Return up to ``count`` numbers evenly spread over ``range(total)``."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def length(source: Dataset[Item]) -> int:
    """Return the number of images of a map-style source."""
    return len(source)  # type: ignore[arg-type]


def find_images(root: Path, folder: str) -> Iterator[str]:
    """Yield the paths below ``root`` of the images in one of its folders, to any depth, each real folder once."""
    seen = set()
    todo = [folder]
    while todo:
        folder = todo.pop(0)
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link to a folder that we come or came from
        seen.add((status.st_dev, status.st_ino))
        for entry in visible(root / folder):
            name = f"{folder}/{entry.name}"
            if entry.is_dir():
                todo.append(name)
            elif is_image(entry.name):
                yield name


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, sorted by name, without hidden entries.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read image folder {folder}: {error.strerror}. Check its permissions") from error


def is_image(name: str) -> bool:
    """Tell by the name whether a file is meant to be an image."""
    return name.lower().endswith(IMG_EXTENSIONS)
