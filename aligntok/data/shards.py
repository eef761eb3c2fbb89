"""What caches of latents and of tokens share as sources of the data module."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from aligntok.cache import CacheReader, Layout, Manifest
from aligntok.data.batches import Batch, BatchSource
from aligntok.data.sources import Indices, Item
from aligntok.errors import UserError
from aligntok.networks.tokenizer import Tokenizer


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

    @property
    def manifest(self) -> Manifest | None:
        """What the cache says of itself; LightningDiT's says nothing."""
        return self.opened.manifest

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the classes; where the cache has none, as LightningDiT's, the numbers up to the largest label."""
        names = self.manifest.images["classes"] if self.manifest else []
        return [str(name) for name in names or range(int(self.opened.labels.max(initial=-1)) + 1)]

    @property
    def num_images(self) -> int:
        """Images of the source, those included that could not be read."""
        return len(self) if self.manifest is None else self.manifest.count

    @property
    def num_views(self) -> int:
        """Views of an image, mirrored ones included."""
        return len(self.opened.views)

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
    def opened(self) -> CacheReader:
        """The folder, opened at the first use."""
        reader = CacheReader(self.folder, self.layout, self.on_bad_shard)
        self.check_images(reader.manifest)
        return reader

    def check_images(self, manifest: Manifest | None) -> None:
        """Raise a ``UserError`` where images beside the rows are not those that were encoded."""

    def verify(self) -> None:
        """Read every shard in full; raise a ``UserError`` that names those which are not what was written."""
        CacheReader(self.folder, self.layout, verify=True)
