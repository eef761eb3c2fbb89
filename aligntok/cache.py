"""The files of a latent cache: safetensors shards in LightningDiT's layout, and a manifest beside them.

A shard holds ``latents`` (N, C, h, w), ``latents_flip`` (the same of the mirrored images, where there are any) and
``labels`` (N,) int64. LightningDiT writes its folders without a manifest.

Reference:
    ``extract_features.py`` of LightningDiT, arXiv:2501.01423: names and keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.weights.checkpoint import write_text

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
LATENTS, MIRRORED, LABELS = "latents", "latents_flip", "labels"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
MAX_HEADER = 1 << 20  # bytes; that of a shard has a few hundred
STATISTICS_COUNT = 10_000  # LightningDiT: at most so many latents give mean and standard deviation
WRITE = "aligntok predict --config STAGE.yaml --config cache.yaml --ckpt_path CHECKPOINT --output FOLDER"


@dataclass(frozen=True)
class Shard:
    """One file of latents, by its header.

    Attributes:
        path: The file.
        dtype: Of the latents.
        shape: (N, C, h, w) of the latents.
        offsets: Where the tensor of each key begins in the file, in bytes.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: dict[str, int]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read and check the header; the latents stay on disk.

        Raises:
            UserError: The file is missing, truncated, or no shard of latents.
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
            dtype, shape = DTYPES.get(entries[LATENTS]["dtype"]), tuple(entries[LATENTS]["shape"])
            known = {LATENTS: shape, MIRRORED: shape, LABELS: shape[:1]}
            fitting = all(tuple(entries[key]["shape"]) == known[key] for key in known if key in entries)
            if dtype is None or len(shape) != 4 or not fitting or entries[LABELS]["dtype"] != "I64":
                raise UserError(f"{path} is no shard of latents in fp32 or bf16 with as many labels (int64)")
            offsets = {key: 8 + length + entries[key]["data_offsets"][0] for key in known if key in entries}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path} is no shard of latents: its header is altered, or lacks {error}") from error
        return cls(path, dtype, shape, offsets)

    def map(self) -> dict[str, Rows]:
        """Return latents, and mirrored ones where there are any, in mapped memory."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        keys = [key for key in (LATENTS, MIRRORED) if key in self.offsets]
        return {key: Rows(memory, self.offsets[key], self.shape[0], size) for key in keys}

    def labels(self) -> Indices:
        """Read the labels, (N,)."""
        return np.fromfile(self.path, np.int64, self.shape[0], offset=self.offsets[LABELS])

    def tensor(self, rows: Sequence[Bytes]) -> Tensor:
        """Copy mapped rows into latents (B, C, h, w)."""
        return torch.from_numpy(np.concatenate(rows)).view(self.dtype).view(len(rows), *self.shape[1:])


class Rows:
    """Latents of a shard in mapped memory: ``rows.bytes[i]`` are the bytes of latent i.

    Args:
        memory: The mapped file.
        offset: Where they begin.
        count: How many.
        size: Bytes of one.
    """

    def __init__(self, memory: mmap.mmap, offset: int, count: int, size: int) -> None:
        self.memory, self.offset, self.size = memory, offset, size
        self.bytes: Bytes = np.frombuffer(memory, np.uint8, count * size, offset).reshape(count, size)

    def announce(self, row: int) -> None:
        """Let the disk read a row, without waiting for it.

        Rows of a batch lie anywhere: touched one after the other, each would be waited for, with its surroundings.
        """
        start = self.offset + row * self.size
        aligned = start - start % mmap.PAGESIZE
        self.memory.madvise(mmap.MADV_WILLNEED, aligned, start + self.size - aligned)


@dataclass(frozen=True)
class Record:
    """What the manifest says of a shard.

    Attributes:
        file: Its name.
        first: Id of its first image in the source.
        count: Number of its latents.
        missing: Ids of images that could not be read; they have no latent.
        sha256: Of the whole file.
    """

    file: str
    first: int
    count: int
    missing: list[int]
    sha256: str


@dataclass
class Manifest:
    """What a cache holds and where it comes from; without ``statistics`` it is unfinished.

    Attributes:
        tokenizer: ``fingerprint`` and the fields of its ``spec``.
        images: ``source`` (hash of images and crop), ``split``, ``crop``, ``count``, ``classes``.
        dtype: ``float32`` or ``bfloat16``.
        flips: Whether there are latents of the mirrored images.
        shard_size: Images of a shard; shard k begins at image k * shard_size.
        statistics: ``mean`` and ``std`` per channel of the latents as stored (not mirrored).
        shards: In order.
    """

    tokenizer: dict[str, Any]
    images: dict[str, Any]
    dtype: str
    flips: bool
    shard_size: int
    statistics: dict[str, list[float]] | None = None
    shards: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read the manifest of a folder, if there is one.

        Raises:
            UserError: It is damaged, or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            version = content.pop("format")
            if version != FORMAT:
                raise UserError(f"{path} is of format {version}, this aligntok reads {FORMAT}: write the cache again")
            manifest = cls(**{**content, "shards": [Record(**shard) for shard in content["shards"]]})
            _ = manifest.latent_shape, manifest.count
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is no manifest of a latent cache ({error!r}): restore it, or write the cache again"
            ) from error
        return manifest

    def write(self, folder: Path) -> None:
        """Write it, atomically."""
        write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return tuple(self.tokenizer["latent_shape"])

    @property
    def count(self) -> int:
        """Number of images of the source."""
        return int(self.images["count"])

    def difference(self, other: Manifest) -> tuple[str, Any, Any] | None:
        """Return the first thing in which two caches differ, and its two values; results do not count."""
        ours, theirs = asdict(self), asdict(other)
        for part in ("tokenizer", "images"):
            for values in (ours, theirs):
                values |= {f"{part} {key}": value for key, value in values.pop(part).items()}
        for key in ours.keys() - {"statistics", "shards"}:
            if ours[key] != theirs.get(key):
                return key, ours[key], theirs.get(key)
        return None


def shard_name(number: int) -> str:
    """Return the name of a shard of ours; what it holds does not depend on the rank that wrote it."""
    return f"latents_rank00_shard{number:03d}.safetensors"


def lightningdit_shards(folder: Path) -> list[Path]:
    """Return the shards of a folder that LightningDiT wrote, by rank and number.

    Raises:
        UserError: There is none, or one is missing between others.
    """
    found = {}
    for path in folder.iterdir():
        match = SHARD_NAME.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    if not found:
        raise UserError(f"{folder} holds no latents (latents_rank00_shard000.safetensors): write them with {WRITE}")
    for rank, number in found:
        before = (rank, number - 1) if number else (max(0, rank - 1), 0)
        if before not in found:
            name = "latents_rank{:02d}_shard{:03d}.safetensors".format(*before)
            raise UserError(f"{folder / name} is missing: extract the latents again")
    return [found[key] for key in sorted(found)]


def open_shards(folder: Path, manifest: Manifest | None) -> tuple[list[Shard], dict[str, str]]:
    """Return the shards of a cache that are as they should be, and what is wrong with the others, by name.

    Args:
        folder: Of the cache.
        manifest: Its manifest; without one, all shards must be alike.

    Raises:
        UserError: LightningDiT's folder holds none, or one is missing between others.
    """
    records = manifest.shards if manifest else []
    paths = [folder / record.file for record in records] if manifest else lightningdit_shards(folder)
    shards: list[Shard] = []
    problems: dict[str, str] = {}
    for index, path in enumerate(paths):
        try:
            shard = Shard.open(path)
        except UserError as error:
            problems[path.name] = str(error)
            continue
        if manifest:
            shape = (records[index].count, *manifest.latent_shape)
            expected: Any = (shape, f"torch.{manifest.dtype}", manifest.flips)
            found: Any = (shard.shape, str(shard.dtype), MIRRORED in shard.offsets)
        else:
            expected, found = ((s.shape[1:], s.dtype, s.offsets.keys()) for s in ((shards or [shard])[0], shard))
        if found == expected:
            shards.append(shard)
        else:
            problems[path.name] = f"{path} is altered: it holds {found}, not {expected}"
    return shards, problems


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def latent_statistics(shards: Sequence[Shard]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation (C,) of up to 10,000 latents from all over the shards, fp32."""
    starts = np.cumsum([0] + [shard.shape[0] for shard in shards])
    step = max(1, math.ceil(starts[-1] / STATISTICS_COUNT))
    channels = shards[0].shape[1]
    total, square, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for shard, start in zip(shards, starts, strict=False):
        rows = list(shard.map()[LATENTS].bytes[-start % step :: step])
        for first in range(0, len(rows), 256):
            values = shard.tensor(rows[first : first + 256]).double().transpose(0, 1).flatten(1)
            total, square, count = total + values.sum(1), square + values.square().sum(1), count + values.shape[1]
    variance = (square - total.square() / count) / max(1, count - 1)
    return (total / count).float(), variance.clamp_min(0).sqrt().float()
