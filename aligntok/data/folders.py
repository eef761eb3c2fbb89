"""Images that are at hand: in a folder, or with scikit-learn. Any torchvision dataset serves as well."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from aligntok.data.images import printable, read_image
from aligntok.data.order import Indices
from aligntok.data.sources import Item
from aligntok.errors import UserError, check


class ImageFolder(Dataset[Item]):
    """Images in class folders, or in one flat folder (then every label is 0).

    Class folders are searched to any depth, through links too; hidden files and folders are left out, and files with
    another suffix than an image's, which are counted. Classes are numbered by sorted name, images sorted by path: the
    same on every machine.

    >>> root = getfixture("tmp_path")
    >>> (root / "cat").mkdir()
    >>> Image.new("RGB", (8, 8)).save(root / "cat" / "1.png")
    >>> len(ImageFolder(str(root))), ImageFolder(str(root)).classes
    (1, ['cat'])

    Args:
        root: The folder.

    Raises:
        UserError: The root is empty; or, at the first use, if the folder is missing, holds no image, or holds images
            both in class folders and beside them.
    """

    def __init__(self, root: str) -> None:
        check(root != "", "the root of an image folder is empty: give yours, e.g. by --data.train.root (this one: .)")
        self.root = Path(root).expanduser()
        self.min_size: int | None = None  # of ``read_image``

    @property
    def classes(self) -> list[str]:
        """Names of the classes; none for a flat folder."""
        return self.index[0]

    @cached_property
    def index(self) -> tuple[list[str], npt.NDArray[np.bytes_], Indices]:
        """Names of the classes; path below the root, and label, of each image."""
        root = self.root
        self.check_folder()
        entries, others = visible(root), Counter[str]()
        folders = [entry.name for entry in entries if is_folder(entry)]
        beside = [entry.name for entry in entries if not is_folder(entry) and is_image(entry.name, others)]
        found = [(name, label) for label, folder in enumerate(folders) for name in find_images(root, folder, others)]
        if found and beside:
            raise UserError(
                f"image folder {root} holds images in folders ({found[0][0]}) and beside them ({beside[0]}): put every"
                " image into a class folder, or all into one folder without subfolders"
            )
        if not found:
            folders, found = [], [(name, 0) for name in beside]
        self.check_images(bool(found))
        if others:
            say_left_out(str(root), ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)))
        found.sort()
        # arrays, because workers copy every page of a list of a million names, by counting references to them
        names = np.array([os.fsencode(name) for name, _ in found])
        return folders, names, np.array([label for _, label in found])

    def check_folder(self) -> None:
        """Raise a ``UserError`` where there is no such folder."""
        where = f"there is no image folder {self.root}: set its root, e.g. --data.train.root, to yours"
        check(os.path.isdir(self.root), where)

    def check_images(self, found: bool) -> None:
        """Raise a ``UserError`` where no images were found in it."""
        what = f"image folder {self.root} holds no image, also not in subfolders: name another folder"
        check(found, f"{what} ({', '.join(IMG_EXTENSIONS)})")

    def __len__(self) -> int:
        return len(self.index[1])

    def __getitem__(self, index: int) -> Item:
        _, names, labels = self.index
        return read_image(self.root / os.fsdecode(names[index]), self.min_size), int(labels[index])

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


@cache
def say_left_out(folder: str, what: str) -> None:
    """Say, once, which files of a folder are not read."""
    known = ", ".join(IMG_EXTENSIONS)
    print(f"aligntok: {folder}: files left out: {what} (read are {known})", file=sys.stderr, flush=True)


def find_images(root: Path, folder: str, others: Counter[str]) -> Iterator[str]:
    """Yield the paths below ``root`` of the images in one of its folders, to any depth, each real folder once.

    Other files are counted by suffix in ``others``.
    """
    seen = set()
    todo = [folder]
    while todo:
        folder = todo.pop(0)
        entries = visible(root / folder)
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link to a folder that we come or came from
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_folder(entry):
                todo.append(name)
            elif is_image(entry.name, others):
                yield name


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, sorted by name, without hidden entries.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"cannot read image folder {printable(str(folder))}: {error.strerror}. Check its permissions"
        ) from error


def is_image(name: str, others: Counter[str]) -> bool:
    """Tell by the name whether a file is meant to be an image, and count others by suffix."""
    found = name.lower().endswith(IMG_EXTENSIONS)
    if not found:
        others[printable(os.path.splitext(name)[1].lower())[:10] or "without a suffix"] += 1
    return found
