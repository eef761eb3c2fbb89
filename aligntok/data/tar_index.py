"""Where in a tar the images and their texts are: an index that is built once, so that rows are read at random.

A tar is not compressed: a member is a range of bytes. The index is a safetensors file with ``members`` (N, 1 + S, 2),
the offset and size of the image of each of N rows and of its S texts, by the suffixes in its header; offset 0 is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torchvision.datasets.folder import IMG_EXTENSIONS

from aligntok.data.images import printable
from aligntok.data.order import Indices
from aligntok.errors import UserError, check, words_of
from aligntok.files import misfit, write_atomically

FORMAT = "1"
SUFFIX = ".index"  # of the index, after the name of the tar
HEADER = {"size": int, "mtime": int, "suffixes": [str], "problem": str}
BLOCK = 512
FILES = (b"0", b"\0", b"7")  # types of members that are files
LONG_NAME, LONG_LINK, PAX = (b"L",), (b"K",), (b"x", b"X")
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: whatever size they state


@dataclass(frozen=True)
class TarIndex:
    """The index of a tar, whose rows stay on disk.

    Attributes:
        path: The file.
        count: Number of images.
        suffixes: Of the texts.
        problem: What is wrong with the tar, in words; nothing where it is whole.
    """

    path: Path
    count: int
    suffixes: list[str]
    problem: str

    @classmethod
    def read(cls, path: Path, tar: Path) -> TarIndex | None:
        """Return an index, or ``None`` where there is none, or none of the tar as it is now."""
        try:
            with safe_open(path, "numpy") as file:
                about = file.metadata() or {}
                shape = file.get_slice("members").get_shape()
            header = json.loads(about.get("index", ""))
        except (OSError, SafetensorError, ValueError):
            return None
        if about.get("format") != FORMAT or misfit(header, HEADER) or shape[1:] != [1 + len(header["suffixes"]), 2]:
            return None
        current = (header["size"], header["mtime"]) == state_of(tar)
        return cls(path, shape[0], header["suffixes"], header["problem"]) if current else None

    @classmethod
    def build(cls, path: Path, tar: Path) -> None:
        """Write the index of a tar, atomically.

        Raises:
            UserError: The tar cannot be read, or the index cannot be written.
        """
        size, mtime = state_of(tar)
        members, suffixes, problem = rows_of(tar)
        header = json.dumps({"size": size, "mtime": mtime, "suffixes": suffixes, "problem": problem})
        content = save({"members": members}, {"format": FORMAT, "index": header})
        write_atomically(path, lambda temporary: temporary.write_bytes(content))


def state_of(tar: Path) -> tuple[int, int]:
    """Return size in bytes and time of the last change in nanoseconds, which an index is bound to.

    Raises:
        UserError: The tar is gone.
    """
    try:
        status = os.stat(tar)
    except OSError as error:
        raise UserError(f"cannot read tar {printable(str(tar))}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def rows_of(tar: Path) -> tuple[Indices, list[str], str]:
    """Return the members of each row, (N, 1 + S, 2) int64, the S suffixes of texts, and what is wrong with the tar.

    Rows are in the order of their images. ``a.b.jpg`` has its texts in ``a.b.txt``, ``a.b.json``, ``a.b.long.txt``,
    wherever in the tar; of members of one name the last is taken, as by ``tar``. Hidden members are left out.
    """
    images: dict[bytes, tuple[int, int]] = {}
    others: dict[bytes, tuple[int, int]] = {}
    problem = ""
    try:
        with tar.open("rb", buffering=0) as file:
            for name, offset, size in members_of(file.fileno(), os.fstat(file.fileno()).st_size):
                stem, suffix = os.path.splitext(name)
                if not os.path.basename(name).startswith(b"."):
                    is_image = os.fsdecode(suffix).lower() in IMG_EXTENSIONS
                    (images if is_image else others).update({stem if is_image else name: (offset, size)})
    except (OSError, UserError) as error:
        problem = words_of(error)
    rows = {stem: row for row, stem in enumerate(images)}
    texts: dict[str, list[tuple[int, int, int]]] = {}
    for name, (offset, size) in others.items():
        stem, ending = name, ""
        while stem not in rows and b"." in os.path.basename(stem):
            stem, _, end = stem.rpartition(b".")
            ending = f"{os.fsdecode(end).lower()}.{ending}".rstrip(".")
        if stem in rows:
            texts.setdefault(ending, []).append((rows[stem], offset, size))
    members = np.zeros((len(rows), 1 + len(texts), 2), np.int64)
    if rows:
        members[:, 0] = list(images.values())
    for column, found in enumerate(texts.values(), start=1):
        row, *place = np.array(found).T
        members[row, column] = np.stack(place, axis=1)
    return members, list(texts), problem


def members_of(file: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset and size of the files in a tar, in order.

    Args:
        file: Its descriptor.
        end: Its size in bytes.

    Raises:
        UserError: At a header that is broken, or a member that goes beyond the end.

    References:
        POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar, "Basic Tar Format".
    """
    at, name, length = 0, b"", None  # name and length of the next member, where a header of its own gives them
    while len(block := os.pread(file, BLOCK, at)) == BLOCK and block.count(0) < BLOCK:
        kind, size = block[156:157], number(block[124:136]) if length is None else length
        good = sum(block) - sum(block[148:156]) + 8 * 32 == number(block[148:156]) and size >= 0
        check(good, f"the header at byte {at:,} is broken")
        begin = at + BLOCK
        at = begin if kind in NO_DATA else begin + -(-size // BLOCK) * BLOCK
        check(begin + size <= end or kind in NO_DATA, f"the member at byte {begin:,} is cut off")
        if kind in (*LONG_NAME, *PAX):
            data = os.pread(file, size, begin)
            records = pax_records(data) if kind in PAX else {b"path": data.rstrip(b"\0")}
            name = records.get(b"path", name)
            length = int(records[b"size"]) if b"size" in records else length
            continue
        if kind in FILES:
            prefix, own = (part.split(b"\0", 1)[0] for part in (block[345:500], block[:100]))
            yield name or (prefix + b"/" + own if prefix else own), begin, size
        if kind not in LONG_LINK:
            name, length = b"", None
    check(at < end, f"it ends at byte {end:,}, before its end is marked")


def number(field: bytes) -> int:
    """Return a number of a header: in octal digits, or, of great ones, in base 256; -1 for what is none."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=False) if field[0] == 0x80 else -1
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def pax_records(data: bytes) -> dict[bytes, bytes]:
    r"""Return what a pax header says: records ``length key=value``, each ended by a line break.

    >>> pax_records(b"14 path=a.jpg\n")
    {b'path': b'a.jpg'}
    """
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        end = int(length) if length.isdigit() else 0
        key, equals, value = data[len(length) + 1 : end - 1].partition(b"=")
        check(end > 0 and bool(equals), "a pax header is broken")
        records[key], data = value, data[end:]
    return records
