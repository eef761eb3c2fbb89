"""Shards: safetensors files of rows, read through mapped memory.

A shard of latents is in LightningDiT's layout: ``latents`` (N, C, h, w), ``latents_flip`` (the same of the mirrored
images, where there are any) and ``labels`` (N,) int64. A shard of tokens holds ``tokens`` (N, V, L) uint16, a row for
each of V views of an image, and ``labels``. Of captioned images there are also ``text_ids`` (N, L) int32, padded with
-1, and, where they were encoded, ``text_features`` (N, L, W) bfloat16.

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

from aligntok.errors import UserError, check
from aligntok.files import misfit

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

LATENTS, MIRRORED, TOKENS, LABELS = "latents", "latents_flip", "tokens", "labels"
TEXT_IDS, TEXT_FEATURES = "text_ids", "text_features"
TEXTS = (TEXT_IDS, TEXT_FEATURES)
TEXT_DTYPES = {"I32": torch.int32, "BF16": torch.bfloat16}
MAX_HEADER = 1 << 20  # bytes; that of a shard has a few hundred
ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}  # of a tensor in the header
MAX_CLASSES = 1 << 20  # no data set has so many: a greater label is no label
WRITE = "aligntok encode --config {}cache.yaml --tokenizer CHECKPOINT --output FOLDER"


class Layout(NamedTuple):
    """What the shards of a kind of cache look like.

    >>> LATENT_LAYOUT.name, LATENT_LAYOUT.dtypes["BF16"], TOKEN_LAYOUT.row_axes
    ('latents', torch.bfloat16, 1)

    Attributes:
        name: Of the tensor that holds the rows; the files are called after it.
        dtypes: That it may have, by safetensors' names.
        row_axes: How many of its axes, the last ones, belong to the row of one view of an image.
        write: The command that writes such a cache.
    """

    name: str
    dtypes: dict[str, torch.dtype]
    row_axes: int
    write: str


LATENT_LAYOUT = Layout(LATENTS, {"F32": torch.float32, "BF16": torch.bfloat16}, 3, WRITE.format(""))
TOKEN_LAYOUT = Layout(TOKENS, {"U16": torch.uint16}, 1, WRITE.format("token_"))


@dataclass(frozen=True)
class Shard:
    """One file of latents or tokens, by its header; the rows stay on disk.

    >>> from safetensors.torch import save_file
    >>> path = getfixture("tmp_path") / shard_name(0)
    >>> save_file({"latents": torch.rand(5, 8, 4, 4), "labels": torch.arange(5)}, path)
    >>> Shard.open(path, LATENT_LAYOUT).form
    ((5, 8, 4, 4), 'torch.float32', 1)

    Attributes:
        path: The file.
        dtype: Of the rows.
        shape: (N, C, h, w) of latents, (N, V, L) of tokens.
        row_shape: Of one view of one image: (C, h, w) of latents, (L,) of tokens.
        starts: Where the first row of each view begins in the file, in bytes; mirrored views come last.
        labels_start: Where the labels begin.
        texts: Dtype and shape of the text tensors, by name, as safetensors calls them, and where each begins.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_shape: tuple[int, ...]
    starts: list[int]
    labels_start: int
    texts: dict[str, tuple[str, tuple[int, ...], int]]

    @classmethod
    def open(cls, path: Path, layout: Layout) -> Shard:
        """Read and check the header.

        Raises:
            UserError: The file is missing, truncated, or no shard of this layout.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(header_size, MAX_HEADER)))
            header.pop("__metadata__", None)
            problem = misfit(header, {str: ENTRY}, "header")
            begin = 8 + header_size
            whole = begin + max(entry["data_offsets"][1] for entry in header.values())
            offsets = {key: begin + entry["data_offsets"][0] for key, entry in header.items()}
            shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
            sizes = {key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items()}
            shape, dtype = shapes[layout.name], layout.dtypes[header[layout.name]["dtype"]]
            labelled = shapes[LABELS] == shape[:1] and header[LABELS]["dtype"] == "I64"
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({str(error)[:150]})") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            problem = f"{error!r:.150}"
        check(not problem, f"{path} is no shard of {layout.name}, or its header is altered ({problem})")
        check(size == whole, f"{path} is truncated or altered: it has {size:,} bytes, its header says {whole:,}")
        keys = [key for key in (layout.name, MIRRORED) if key in shapes]
        fitting = labelled and len(shape) > layout.row_axes and all(shapes[key] == shape for key in keys)
        fitting = fitting and min(shape) > 0 and min(offsets.values()) >= begin and sizes[LABELS] == 8 * shape[0]
        fitting = fitting and all(sizes[key] == math.prod(shape) * dtype.itemsize for key in keys)
        texts = {key: (header[key]["dtype"], shapes[key], offsets[key]) for key in TEXTS if key in header}
        for key, (kind, text_shape, _) in texts.items():
            fitting = fitting and kind in TEXT_DTYPES and text_shape[:1] == shape[:1] and min(text_shape) > 0
            fitting = fitting and sizes[key] == math.prod(text_shape) * TEXT_DTYPES[kind].itemsize
        check(fitting, f"{path} is no shard of {layout.name} with as many labels (int64)")
        row_shape = shape[-layout.row_axes :]
        row_size = math.prod(row_shape) * dtype.itemsize
        within = range(math.prod(shape[1 : -layout.row_axes]))  # views of an image that lie side by side
        starts = [offsets[key] + view * row_size for key in keys for view in within]
        return cls(path, dtype, shape, row_shape, starts, offsets[LABELS], texts)

    @property
    def form(self) -> tuple[tuple[int, ...], str, int]:
        """Shape, dtype and number of views of an image."""
        return self.shape, str(self.dtype), len(self.starts)

    @cached_property
    def row_size(self) -> int:
        """Bytes of one view of one image."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @cached_property
    def stride(self) -> int:
        """Bytes from an image's row to the next image's, of the same view."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @cached_property
    def memory(self) -> mmap.mmap:
        """The file, mapped."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def content(self) -> Bytes:
        """The mapped bytes of the file."""
        return np.frombuffer(self.memory, np.uint8)

    def labels(self) -> Indices:
        """Read the labels, (N,).

        Raises:
            UserError: Some are no numbers of classes.
        """
        labels = np.fromfile(self.path, np.int64, self.shape[0], offset=self.labels_start)
        low, high = labels.min(), labels.max()
        check(low >= 0 and high < MAX_CLASSES, f"{self.path} is altered: its labels are in {low} .. {high}")
        return labels

    def tensor(self, rows: Sequence[Bytes]) -> Tensor:
        """Copy mapped rows, ``row_size`` bytes each, into latents (B, C, h, w) or tokens (B, L)."""
        return torch.from_numpy(np.concatenate(rows)).view(self.dtype).view(len(rows), *self.row_shape)

    def text(self, name: str, rows: Indices) -> Tensor:
        """Copy the texts of some rows, (B, L) ids or (B, L, W) features."""
        dtype, shape, start = self.texts[name]
        size = math.prod(shape[1:]) * TEXT_DTYPES[dtype].itemsize
        found = self.content[start : start + shape[0] * size].reshape(shape[0], size)[rows]
        return torch.from_numpy(found).view(TEXT_DTYPES[dtype]).view(len(rows), *shape[1:])

    def check_whole(self) -> None:
        """Raise a ``UserError`` if the file was cut off since it was mapped: to touch what is gone ends the process.

        A file that is cut off in the very moment between this and the reading is not caught; nothing could be, but by
        reading without mapped memory, at twice the cost.
        """
        whole = self.memory.size() >= len(self.memory)
        check(whole, f"{self.path} was cut off while it was in use: `aligntok repair {self.path.parent}`")


def shard_name(number: int, layout: Layout = LATENT_LAYOUT, rank: int = 0) -> str:
    """Return the name of a shard; ours all say rank 0, because what they hold does not depend on the rank.

    >>> shard_name(7)
    'latents_rank00_shard007.safetensors'
    """
    return f"{layout.name}_rank{rank:02d}_shard{number:03d}.safetensors"


def numbered_shards(folder: Path, layout: Layout) -> list[Path]:
    """Return the shards of a folder without manifest, which LightningDiT wrote, by rank and number.

    Raises:
        UserError: There is none, or one is missing between others.
    """
    pattern = re.compile(layout.name + r"_rank(\d+)_shard(\d+)\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    found = {(int(match[1]), int(match[2])) for match in matches if match}
    check(bool(found), f"{folder} holds no {layout.name} ({shard_name(0, layout)}): write them with {layout.write}")
    for rank, number in found:
        rank, number = (rank, number - 1) if number else (max(0, rank - 1), 0)  # that comes before it
        name = shard_name(number, layout, rank)
        check((rank, number) in found, f"{folder / name} is missing: extract the {layout.name} again")
    return [folder / shard_name(number, layout, rank) for rank, number in sorted(found)]
