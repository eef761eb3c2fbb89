"""Images with captions that are at hand: a folder. Any torch dataset of (PIL image, caption or captions) serves too."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aligntok.data.folders import ImageFolder, find_images, say_left_out
from aligntok.data.images import printable, read_image
from aligntok.data.sources import Captions, Indices, Item, weighted
from aligntok.errors import UserError, check, words_of


class CaptionedFolder(ImageFolder):
    """Images of a folder and its subfolders, to any depth, with the captions in the text files beside them.

    ``cats/1.jpg`` has its caption in ``cats/1.txt``, in UTF-8, the whole of it without the white space at its ends. An
    empty file is an empty caption; an image without a file is left out as one that cannot be read.

    >>> root = getfixture("tmp_path")
    >>> Image.new("RGB", (8, 8)).save(root / "1.png")
    >>> _ = (root / "1.txt").write_text("two foxes on a blue ground")
    >>> CaptionedFolder(str(root))[0][1]
    {'two foxes on a blue ground': 1.0}

    Args:
        root: The folder.
        captions: Suffix of the text files; or several, each with the weight that its caption is chosen by, such as
            ``{txt: 0.5, long.txt: 0.5}``. Of those an image needs one.

    Raises:
        UserError: Weights that are negative or all 0; or, at the first use, as ``ImageFolder``.
    """

    classes: list[str] = []  # noqa: RUF012  # of an image folder they are its folders

    def __init__(self, root: str, captions: str | dict[str, float] = "txt") -> None:
        super().__init__(root)
        self.captions = weighted([captions] if isinstance(captions, str) else captions, "captions")

    @cached_property
    def index(self) -> tuple[list[str], npt.NDArray[np.bytes_], Indices]:
        """No classes; path below the root, and 0, of each image."""
        self.check_folder()
        others = Counter[str]()
        names = sorted(find_images(self.root, "", others))
        self.check_images(bool(names))
        left_out = [f"{count} {suffix}" for suffix, count in others.most_common(5) if suffix not in (".txt", ".json")]
        if left_out:
            say_left_out(str(self.root), ", ".join(left_out))
        return [], np.array([os.fsencode(name) for name in names]), np.zeros(len(names), dtype=np.int64)

    def __getitem__(self, index: int) -> Item:
        path = self.root / os.fsdecode(self.index[1][index])
        return read_image(path, self.min_size), self.captions_of(os.fspath(path))

    def captions_of(self, path: str) -> Captions:
        """Return the captions of an image.

        Raises:
            UserError: It has none, or one cannot be read.
        """
        found: Captions = {}
        for suffix, weight in self.captions.items():
            name = f"{os.path.splitext(path)[0]}.{suffix}"
            try:
                with open(name, encoding="utf-8-sig") as file:
                    text = file.read().strip()
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read caption {printable(name)}: {words_of(error)}") from error
            found[text] = found.get(text, 0.0) + weight
        suffixes = " or ".join(self.captions)
        check(any(found.values()), f"no caption ({suffixes}) beside image {printable(path)}")
        return found

    def fingerprint(self) -> str:
        """Return a hash of names and file sizes of images and captions, wherever the folder lies."""
        digest = hashlib.sha256(super().fingerprint().encode() + str(self.captions).encode())
        for name in self.index[1]:
            stem = os.path.splitext(os.path.join(os.fsencode(self.root), name))[0]
            for suffix in self.captions:
                path = stem + os.fsencode(f".{suffix}")
                digest.update(b"%d\n" % (os.stat(path).st_size if os.path.exists(path) else -1))
        return digest.hexdigest()[:16]
