"""Images with captions that are at hand: a folder. Any torch dataset of (PIL image, caption or captions) serves too."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aligntok.data.folders import ImageFolder, find_images, say_left_out
from aligntok.data.images import printable, read_image
from aligntok.data.order import Indices
from aligntok.data.sources import Captions, Item, weighted
from aligntok.errors import UserError, check, words_of


def read_captions(wanted: Captions, text: Callable[[str], bytes | None], image: str) -> Captions:
    """Return the captions of an image from its text files, in UTF-8.

    A caption is all that a file holds, without the white space at its ends; an empty file is an empty caption. Of a
    JSON file ``json:caption`` takes what is under this key, a text or a list of texts, which share the weight.

    Args:
        wanted: Suffixes of files, where they are JSON with the key, and their weights.
        text: Returns the file of a suffix, ``None`` where there is none.
        image: What messages call the image.

    Raises:
        UserError: There is no caption, or one cannot be read.
    """
    values: dict[str, Any] = {}
    for name in wanted:
        suffix, _, key = name.partition(":")
        if (content := text(suffix)) is None:
            continue
        try:
            values[name] = json.loads(content).get(key) if key else str(content, "utf-8-sig").strip()
        except (ValueError, RecursionError, AttributeError) as error:
            raise UserError(f"cannot read caption {name} of image {image}: {words_of(error)}") from error
    return captions_of(wanted, values, image)


def captions_of(wanted: Captions, values: Mapping[str, Any], image: str) -> Captions:
    """Return the captions among some values by name, each a text or a list of texts, which share the weight.

    Raises:
        UserError: There is none, or one is something else.
    """
    found: Captions = {}
    for name, weight in wanted.items():
        value = values.get(name)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        check(good, f"caption {name} of image {image} is {value!r:.40}, neither a text nor a list of texts")
        for caption in texts:
            found[caption] = found.get(caption, 0.0) + weight / len(texts)
    check(any(found.values()), f"no caption ({' or '.join(wanted)}) for image {image}")
    return found


class CaptionedFolder(ImageFolder):
    """Images of a folder and its subfolders, to any depth, with the captions in the text files beside them.

    ``cats/1.jpg`` has its caption in ``cats/1.txt``, see ``read_captions``; an image without one is left out as one
    that cannot be read.

    >>> from PIL import Image
    >>> root = getfixture("tmp_path")
    >>> Image.new("RGB", (8, 8)).save(root / "1.png")
    >>> _ = (root / "1.txt").write_text("two foxes on a blue ground")
    >>> CaptionedFolder(str(root))[0][1]
    {'two foxes on a blue ground': 1.0}

    Args:
        root: The folder.
        captions: Suffix of the text files, or of JSON files with the key of the caption: ``json:caption``; or several,
            each with the weight that its caption is chosen by, such as ``{txt: 0.5, long.txt: 0.5}``. Of those an image
            needs one.

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
        captions = read_captions(self.captions, partial(self.text, path), printable(str(path)))
        return read_image(path, self.min_size), captions

    def text(self, path: Path, suffix: str) -> bytes | None:
        """Return a text file beside an image, ``None`` where there is none.

        Raises:
            UserError: It cannot be read.
        """
        name = path.with_suffix(f".{suffix}")
        try:
            return name.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read caption {printable(str(name))}: {error.strerror}") from error

    def fingerprint(self) -> str:
        """Return a hash of names and file sizes of images and captions, wherever the folder lies."""
        digest = hashlib.sha256(super().fingerprint().encode() + str(self.captions).encode())
        for name in self.index[1]:
            stem = os.path.splitext(os.path.join(os.fsencode(self.root), name))[0]
            for wanted in self.captions:
                path = stem + os.fsencode(f".{wanted.partition(':')[0]}")
                digest.update(b"%d\n" % (os.stat(path).st_size if os.path.exists(path) else -1))
        return digest.hexdigest()[:16]
