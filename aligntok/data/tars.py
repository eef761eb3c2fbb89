"""Captioned images in tar shards, as img2dataset and webdataset write them, read in place and in any order."""

from __future__ import annotations

import glob
import hashlib
import os
import random
import sys
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch.utils.data import Dataset

from aligntok.data.captions import read_captions
from aligntok.data.images import decode_image, printable
from aligntok.data.loaders import read_ahead
from aligntok.data.order import Indices
from aligntok.data.sources import Item, weighted
from aligntok.data.tar_index import BLOCK, SUFFIX, TarIndex, state_of
from aligntok.errors import UserError, check
from aligntok.progress import Progress

OPEN_TARS = 128  # at a time in a process; `ulimit -n` is at least 1,024
TARS_AT_ONCE = 8  # are indexed; the time goes by with waiting for the disk


class CaptionedTars(Dataset[Item]):
    """Images and captions in the tars of a folder, which stay as they are; any of them is read alone.

    ``000000007.jpg`` has its captions in ``000000007.txt`` or ``000000007.json`` of the same tar, see
    ``read_captions``. At the first use each tar is read through once, headers only, for an index that is written beside
    it (``00000.tar.index``); ranks that start at the same time share that work. A tar that has changed since is named
    and read through again. A broken tar gives the images before the break, and is named each time.

    >>> import tarfile
    >>> from PIL import Image
    >>> root = getfixture("tmp_path")
    >>> Image.new("RGB", (8, 8)).save(root / "0.png")
    >>> _ = (root / "0.txt").write_text("two foxes")
    >>> with tarfile.open(root / "00000.tar", "w") as tar:
    ...     for name in ("0.png", "0.txt"):
    ...         tar.add(root / name, name)
    >>> CaptionedTars(str(root))[0][1]
    tars 1/1 ...
    {'two foxes': 1.0}

    Args:
        root: The folder, with tars to any depth, or a pattern such as ``laion/0000*.tar``.
        captions: The member with the caption, ``txt`` or, of a JSON member, ``json:caption``; or several, each with the
            weight that its caption is chosen by, such as ``{txt: 0.4, json:long_caption: 0.6}``. Of those an image
            needs one.
        index: Folder for the index, where the tars' own is read-only.

    Raises:
        UserError: Weights that are negative or all 0; or, at the first use: no tar, or one without an image.
    """

    classes = ()

    def __init__(self, root: str, captions: str | dict[str, float] = "txt", index: str | None = None) -> None:
        check(root != "", "the root of the tars is empty: give yours, e.g. by --data.train.root")
        self.root, self.folder = Path(root).expanduser(), None if index is None else Path(index).expanduser()
        self.captions = weighted([captions] if isinstance(captions, str) else captions, "captions")
        self.min_size: int | None = None  # of ``decode_image``

    @cached_property
    def paths(self) -> list[Path]:
        """The tars, sorted by name."""
        pattern = os.path.join(glob.escape(str(self.root)), "**", "*.tar") if self.root.is_dir() else str(self.root)
        found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        check(bool(found), f"there is no tar in {self.root}: name a folder of them, or a pattern such as laion/0*.tar")
        return [Path(path) for path in found]

    @cached_property
    def shards(self) -> list[TarIndex]:
        """The index of each tar."""
        found = {tar: TarIndex.read(self.index_of(tar), tar) for tar in self.paths}
        missing = [tar for tar, index in found.items() if index is None]
        random.Random(os.getpid()).shuffle(missing)  # other ranks begin elsewhere, and find what this one has done
        progress = Progress("tars", len(missing))
        for tar, index in zip(missing, read_ahead(self.indexed, missing, 2 * TARS_AT_ONCE, TARS_AT_ONCE), strict=True):
            found[tar] = index
            progress.add(1)
        shards = [index for index in found.values() if index is not None]
        broken = [(tar, index) for tar, index in zip(self.paths, shards, strict=True) if index.problem]
        for tar, index in broken[:10]:
            say(f"{printable(str(tar))} is broken ({index.problem}): {index.count:,} images before that are read")
        if broken[10:]:
            say(f"{len(broken) - 10} more tars are broken")
        empty = f"no image in the {len(self.paths)} tars of {self.root}"
        check(any(index.count for index in shards), f"{empty}; the first: {shards[0].problem or 'other files'}")
        return shards

    def index_of(self, tar: Path) -> Path:
        """Return the file that a tar's index is in, or will be."""
        if self.folder is None:
            return tar.with_name(tar.name + SUFFIX)
        place = hashlib.sha256(os.fsencode(tar.parent.resolve())).hexdigest()[:8]
        return self.folder / f"{place}_{tar.name}{SUFFIX}"

    def indexed(self, tar: Path) -> TarIndex:
        """Return the index of a tar that had none, written by this process or another."""
        path = self.index_of(tar)
        if path.exists() and (index := TarIndex.read(path, tar)) is not None:
            return index
        if path.exists():
            say(f"{printable(str(tar))} has changed since its index was written: it is indexed again")
        try:
            TarIndex.build(path, tar)
        except UserError as error:
            raise UserError(
                f"{str(error).split('. ')[0]}. Give the tars an index folder: --data.train.index"
            ) from error
        index = TarIndex.read(path, tar)
        check(index is not None, f"{printable(str(tar))} changes while it is read: wait until it is written")
        assert index is not None
        return index

    @cached_property
    def starts(self) -> Indices:
        """Number of the first image of each tar, and of all images."""
        return np.array([0, *accumulate(shard.count for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Item:
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        tar = self.opened(shard)
        members = tar.rows[index - int(self.starts[shard])].reshape(-1, 2).tolist()
        name = f"{tar.path}/{tar.name(members[0][0])}"
        places = dict(zip(self.shards[shard].suffixes, members[1:], strict=True))

        def text(suffix: str) -> bytes | None:
            offset, size = places.get(suffix, (0, 0))
            return tar.read(offset, size) if offset else None

        captions = read_captions(self.captions, text, name)
        return decode_image(tar.read(*members[0]), name, self.min_size), captions

    @cached_property
    def opened(self) -> Any:
        """Opens a tar, of which the last ones stay open."""
        return lru_cache(OPEN_TARS)(lambda shard: OpenTar(self.paths[shard], self.shards[shard]))

    def fingerprint(self) -> str:
        """Return a hash of names and sizes of the tars and of what is read of them."""
        digest = hashlib.sha256(str(self.captions).encode())
        for path, shard in zip(self.paths, self.shards, strict=True):
            digest.update(b"%s %d %d\n" % (os.fsencode(path.name), state_of(path)[0], shard.count))
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out open files."""
        return {key: value for key, value in vars(self).items() if key != "opened"}


class OpenTar:
    """A tar and the rows of its index, open as long as this is kept.

    Raises:
        UserError: The tar is gone, or has changed.
    """

    file = -1

    def __init__(self, path: Path, index: TarIndex) -> None:
        self.path = printable(str(path))
        current = TarIndex.read(index.path, path)
        check(current == index, f"{self.path} has changed since it was opened: start the run again")
        opened: Any = safe_open(index.path, "numpy")
        self.rows = opened.get_slice("members")
        self.file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)

    def read(self, offset: int, size: int) -> bytes:
        """Return a range of bytes; as many as there are where the file was cut off."""
        return os.pread(self.file, size, offset)

    def name(self, offset: int) -> str:
        """Return the name of the member that begins at ``offset``, for a message; of a long name its beginning."""
        return printable(os.fsdecode(self.read(offset - BLOCK, 100).split(b"\0", 1)[0]))


def say(words: str) -> None:
    """Print a line for the user."""
    print(f"aligntok: {words}", file=sys.stderr, flush=True)
