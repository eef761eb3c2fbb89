"""Shards: safetensors files of rows, read through mapped memory.

A shard of latents is in LightningDiT's layout: ``latents`` (N, C, h, w), ``latents_flip`` (the same of the mirrored
images, where there are any) and ``labels`` (N,) int64. A shard of tokens holds ``tokens`` (N, V, L) uint16, a row for
each of V views of an image, and ``labels``.

Reference:
    ``extract_features.py`` of LightningDiT, arXiv:2501.01423: names and keys.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aligntok.errors import UserError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

LATENTS, MIRRORED, TOKENS, LABELS = "latents", "latents_flip", "tokens", "labels"
MAX_HEADER = 1 << 20  # bytes; that of a shard has a few hundred
WRITE = "aligntok encode --config {}cache.yaml --tokenizer CHECKPOINT --output FOLDER"


@dataclass(frozen=True)
class Layout:
    """What the shards of a kind of cache look like.

    Attributes:
        name: Of the tensor that holds the rows; the files are called after it.
        dtypes: That it may have, by safetensors' names.
        num_axes: Of the tensor.
        write: The command that writes such a cache.
    """

    name: str
    dtypes: dict[str, torch.dtype]
    num_axes: int
    write: str


LATENT_LAYOUT = Layout(LATENTS, {"F32": torch.float32, "BF16": torch.bfloat16}, 4, WRITE.format(""))
TOKEN_LAYOUT = Layout(TOKENS, {"U16": torch.uint16}, 3, WRITE.format("token_"))


@dataclass(frozen=True)
class Shard:
    """One file of latents or tokens, by its header.

    Attributes:
        path: The file.
        layout: Of the cache.
        dtype: Of the rows.
        shape: (N, C, h, w) of latents, (N, V, L) of tokens.
        offsets: Where the tensor of each key begins in the file, in bytes.
    """

    path: Path
    layout: Layout
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: dict[str, int]

    @classmethod
    def open(cls, path: Path, layout: Layout) -> Shard:
        """Read and check the header; the rows stay on disk.

        Raises:
            UserError: The file is missing, truncated, or no shard of this layout.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length)) if 8 + length <= size and length < MAX_HEADER else {}
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error
        try:
            ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
            if not ends or size != whole:
                raise UserError(f"{path} is truncated or altered: it has {size:,} bytes, its header says {whole:,}")
            rows = entries[layout.name]
            dtype, shape = layout.dtypes.get(rows["dtype"]), tuple(rows["shape"])
            known = {layout.name: shape, MIRRORED: shape, LABELS: shape[:1]}
            fitting = all(tuple(entries[key]["shape"]) == known[key] for key in known if key in entries)
            if dtype is None or len(shape) != layout.num_axes or not fitting or entries[LABELS]["dtype"] != "I64":
                types = " or ".join(str(dtype).removeprefix("torch.") for dtype in layout.dtypes.values())
                raise UserError(f"{path} is no shard of {layout.name} in {types} with as many labels (int64)")
            offsets = {key: 8 + length + entries[key]["data_offsets"][0] for key in known if key in entries}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path} is no shard of {layout.name}: its header is altered, or lacks {error}") from error
        return cls(path, layout, dtype, shape, offsets)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one view of one image: (C, h, w) of latents, (L,) of tokens."""
        return self.shape[1:] if self.layout is LATENT_LAYOUT else self.shape[2:]

    @property
    def num_views(self) -> int:
        """Views of an image."""
        return 1 + (MIRRORED in self.offsets) if self.layout is LATENT_LAYOUT else self.shape[1]

    @cached_property
    def memory(self) -> mmap.mmap:
        """The mapped file."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def views(self) -> list[View]:
        """The rows of each view; those of the image as it is come before mirrored ones."""
        count, size = self.shape[0], math.prod(self.row_shape) * self.dtype.itemsize
        if self.layout is LATENT_LAYOUT:
            starts, stride = [self.offsets[key] for key in (LATENTS, MIRRORED) if key in self.offsets], size
        else:
            starts, stride = (
                [self.offsets[TOKENS] + view * size for view in range(self.num_views)],
                size * self.num_views,
            )
        return [
            View(self.memory, np.ndarray((count, size), np.uint8, self.memory, at, (stride, 1)), at) for at in starts
        ]

    def labels(self) -> Indices:
        """Read the labels, (N,)."""
        return np.fromfile(self.path, np.int64, self.shape[0], offset=self.offsets[LABELS])

    def tensor(self, rows: Sequence[Bytes]) -> Tensor:
        """Copy mapped rows into latents (B, C, h, w) or tokens (B, L)."""
        return torch.from_numpy(np.concatenate(rows)).view(self.dtype).view(len(rows), *self.row_shape)


class View(NamedTuple):
    """One view of all images of a shard: ``rows[i]`` (N, size) are the bytes of image i, which begin at ``start``."""

    memory: mmap.mmap
    rows: Bytes
    start: int

    def prefetch(self, row: int) -> None:
        """Let the disk read a row, without waiting for it.

        Rows of a batch lie anywhere: touched one after the other, each would be waited for, with its surroundings.
        """
        start = self.start + row * self.rows.strides[0]
        aligned = start - start % mmap.PAGESIZE
        self.memory.madvise(mmap.MADV_WILLNEED, aligned, start + self.rows.shape[1] - aligned)


def shard_name(number: int, layout: Layout = LATENT_LAYOUT) -> str:
    """Return the name of a shard of ours; what it holds does not depend on the rank that wrote it."""
    return f"{layout.name}_rank00_shard{number:03d}.safetensors"


def numbered_shards(folder: Path, layout: Layout) -> list[Path]:
    """Return the shards of a folder without manifest, which LightningDiT wrote, by rank and number.

    Raises:
        UserError: There is none, or one is missing between others.
    """
    pattern = re.compile(layout.name + r"_rank(\d+)_shard(\d+)\.safetensors")
    found = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    if not found:
        raise UserError(f"{folder} holds no {layout.name} ({shard_name(0, layout)}): write them with {layout.write}")
    for rank, number in found:
        before = (rank, number - 1) if number else (max(0, rank - 1), 0)
        if before not in found:
            name = "{}_rank{:02d}_shard{:03d}.safetensors".format(layout.name, *before)
            raise UserError(f"{folder / name} is missing: extract the {layout.name} again")
    return [found[key] for key in sorted(found)]
