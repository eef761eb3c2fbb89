"""What caches of latents and of tokens share as sources of the data module."""

from __future__ import annotations

import errno
import hashlib
import sys
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.cache import Layout, Manifest, Rows, Shard, open_shards
from aligntok.data.batches import Batch, BatchSource
from aligntok.data.sources import Indices, Item
from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.networks.tokenizer import Tokenizer

REPAIR = "`aligntok repair {folder}` encodes again what is broken, and only that"


class Shards(BatchSource):
    """Base of the caches that ``aligntok encode`` writes: rows gathered from mapped memory, in any order over all.

    Args:
        folder: Where the shards are.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).

    Raises:
        UserError: At the first use: no cache, an unfinished one, broken shards.
    """

    layout: Layout
    images: Dataset[Item] | None = None  # served beside the rows

    def __init__(self, folder: str, on_bad_shard: Literal["raise", "skip"] = "raise") -> None:
        self.folder = Path(folder).expanduser()
        self.on_bad_shard = on_bad_shard

    def __len__(self) -> int:
        return len(self.opened.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped memory: a spawned process maps it for itself."""
        return {key: value for key, value in vars(self).items() if key != "opened"}

    # What the data module asks

    @abstractmethod
    def batch(self, ids: Indices, views: Indices) -> Batch:
        """See ``BatchSource``."""

    def rows(self, ids: Indices, views: Indices) -> tuple[Tensor, Tensor]:
        """Return the rows as they are stored, and the labels (B,)."""
        opened = self.opened
        shards = np.searchsorted(opened.starts, ids, "right") - 1
        places = zip(views.tolist(), shards.tolist(), (ids - opened.starts[shards]).tolist(), strict=True)
        rows = [(opened.maps[view][shard], row) for view, shard, row in places]
        for shard, row in rows:
            shard.announce(row)
        stored = opened.shards[0].tensor([shard.bytes[row] for shard, row in rows])
        return stored, torch.from_numpy(opened.labels[ids])

    @property
    def manifest(self) -> Manifest | None:
        """What the cache says of itself; LightningDiT's says nothing."""
        return self.opened.manifest

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the classes; none for LightningDiT's folders."""
        return [str(name) for name in self.manifest.images["classes"]] if self.manifest else []

    @property
    def num_views(self) -> int:
        """Views of an image, mirrored ones included."""
        return len(self.opened.maps)

    @property
    def has_mirrored(self) -> bool:
        """Whether the mirrored images were encoded too."""
        manifest = self.manifest
        return manifest.flips if manifest is not None else self.num_views > 1

    def fingerprint(self) -> str:
        """Return the hash of the images that were encoded; of LightningDiT's folders, one of names and sizes."""
        if self.manifest is not None:
            return str(self.manifest.images["source"])
        text = "\n".join(f"{shard.path.name} {shard.path.stat().st_size}" for shard in self.opened.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # What a model asks

    def check_latents(
        self, latent_shape: tuple[int, ...], tokenizer: Tokenizer | None, data_key: str, key: str
    ) -> None:
        """Raise a ``UserError`` where these are not the latents of a model.

        Args:
            latent_shape: (C, h, w) of the model.
            tokenizer: Encodes and decodes them; none if the model has none.
            data_key: Config key of this source.
            key: Config key of the model's latent shape.
        """
        raise UserError(f"{data_key} {self.folder} holds {self.layout.name}, but this model learns latents: change one")

    def check_tokens(self, sizes: dict[str, Any], tokenizer: Tokenizer | None, data_key: str) -> None:
        """Raise a ``UserError`` where these are not the tokens of a model.

        Args:
            sizes: What the model's network expects of a ``TokenizerSpec``, by name.
            tokenizer: Encodes and decodes them; none if the model has none.
            data_key: Config key of this source.
        """
        raise UserError(f"{data_key} {self.folder} holds {self.layout.name}, but this model learns tokens: change one")

    def check_tokenizer(self, tokenizer: Tokenizer, data_key: str) -> None:
        """Raise a ``UserError`` where another tokenizer than a model's wrote our cache."""
        assert self.manifest is not None
        theirs, ours = self.manifest.tokenizer, f"{data_key} {self.folder}"
        if theirs["kind"] != tokenizer.spec.kind:
            raise UserError(
                f"{ours} holds {theirs['kind']} {self.layout.name}, model.tokenizer makes {tokenizer.spec.kind} ones:"
                " change one"
            )
        fingerprint = tokenizer.fingerprint()
        if theirs["fingerprint"] != fingerprint:
            raise UserError(
                f"{ours} was written by tokenizer {theirs['fingerprint']}, but model.tokenizer is {fingerprint}: use"
                f" the checkpoint that wrote the cache, or write a cache with this one ({self.layout.write})"
            )

    # The files

    @cached_property
    def opened(self) -> Opened:
        """Open the folder: sizes and headers are checked, labels read, rows mapped."""
        name = self.layout.name
        if not self.folder.is_dir():
            raise UserError(f"there is no {name[:-1]} cache {self.folder}: write it with {self.layout.write}")
        manifest = Manifest.read(self.folder)
        if manifest is not None and manifest.layout is not self.layout:
            raise UserError(
                f"{self.folder} holds {manifest.layout.name}, not {name}, which {type(self).__name__} serves"
            )
        if manifest is not None and manifest.statistics is None:
            raise UserError(
                f"the {name[:-1]} cache {self.folder} is unfinished: the same `aligntok encode` goes on with it, or"
                f" `aligntok repair {self.folder}`"
            )
        shards, problems = open_shards(self.folder, manifest, self.layout)
        if problems:
            text = brief(problems)
            if self.on_bad_shard == "raise" or not shards:
                remedy = REPAIR.format(folder=self.folder) if manifest else f"extract the {name} again"
                raise UserError(f"{text}. {remedy}")
            print(f"aligntok: shards skipped: {text}", file=sys.stderr, flush=True)
        self.check_images(manifest)
        try:
            return Opened(manifest, shards)
        except OSError as error:
            few = f": its {len(shards)} shards are more than `ulimit -n` allows" if error.errno == errno.EMFILE else ""
            raise UserError(f"cannot map the shards of {self.folder} ({error}){few}") from error

    def check_images(self, manifest: Manifest | None) -> None:
        """Raise a ``UserError`` where images beside the rows are not those that were encoded."""

    def verify(self) -> None:
        """Read every shard in full.

        Raises:
            UserError: Some are not what was written; they are named.
        """
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise UserError(f"{self.folder} has no manifest with hashes to verify its shards by")
        shards, problems = open_shards(self.folder, manifest, self.layout)
        hashes = {record.file: record.sha256 for record in manifest.shards}
        with ThreadPoolExecutor() as pool:
            for shard, value in zip(shards, pool.map(lambda shard: hash_file(shard.path), shards), strict=True):
                if value != hashes[shard.path.name]:
                    problems[shard.path.name] = f"{shard.path} is altered: its hash is not that of the manifest"
        if problems:
            raise UserError(f"{brief(problems)}. {REPAIR.format(folder=self.folder)}")


@dataclass
class Opened:
    """Mapped shards."""

    manifest: Manifest | None
    shards: list[Shard]

    def __post_init__(self) -> None:
        self.maps: list[tuple[Rows, ...]] = list(zip(*(shard.map() for shard in self.shards), strict=True))
        self.labels: Indices = np.concatenate([shard.labels() for shard in self.shards])
        self.starts: Indices = np.cumsum([0] + [shard.shape[0] for shard in self.shards])[:-1]

    @cached_property
    def image_ids(self) -> Indices:
        """Index of each row's image in its source."""
        assert self.manifest is not None
        records = {record.file: record for record in self.manifest.shards}
        parts = [records[shard.path.name] for shard in self.shards]
        return np.concatenate([record.image_ids for record in parts])


def brief(problems: dict[str, str]) -> str:
    """Return the first problem, and the names of the other shards that have one."""
    first, *others = problems
    shown = f"; also {', '.join(others[:3])}" if others else ""
    return f"{problems[first]}{shown}" + (f" and {len(others) - 3} more" if len(others) > 3 else "")
