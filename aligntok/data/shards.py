"""Caches of latents and of tokens as sources of the data module."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.cache import LATENT_LAYOUT, TOKEN_LAYOUT, CacheReader, Layout, Manifest, latent_statistics
from aligntok.data.images import center_crop, to_rgb
from aligntok.data.order import Indices
from aligntok.data.sources import Batch, BatchSource, Item, crop_id, read_item
from aligntok.errors import UserError, check
from aligntok.networks.text import TextEncoder
from aligntok.networks.tokenizer import Tokenizer, TokenizerSpec
from aligntok.weights.checkpoint import read_file

STATISTICS = "latents_stats.pt"  # LightningDiT's
MAX_SHIFT = 0.1  # of a tokenizer's statistics from those of LightningDiT's latents, in standard deviations


class Shards(BatchSource):
    """Base of the caches that ``aligntok encode`` writes: rows gathered from mapped memory, in any order over all.

    Args:
        folder: Where the shards are.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).
        verify: At the first use read every shard in full and compare its hash; else a changed byte is not noticed.

    Raises:
        UserError: At the first use: no cache, an unfinished one, broken shards.
    """

    layout: Layout

    def __init__(self, folder: str, on_bad_shard: Literal["raise", "skip"] = "raise", verify: bool = False) -> None:
        self.folder, self.on_bad_shard, self.verify = Path(folder).expanduser(), on_bad_shard, verify

    def __len__(self) -> int:
        return len(self.opened.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped memory: a spawned process maps it for itself."""
        return {key: value for key, value in vars(self).items() if key != "opened"}

    @cached_property
    def opened(self) -> CacheReader:
        """The folder, opened at the first use."""
        reader = CacheReader(self.folder, self.layout, self.on_bad_shard, self.verify)
        self.check_images(reader.manifest)
        return reader

    def check_images(self, manifest: Manifest | None) -> None:
        """Raise a ``UserError`` where images beside the rows are not those that were encoded."""

    @property
    def manifest(self) -> Manifest | None:
        """What the cache says of itself; LightningDiT's says nothing."""
        return self.opened.manifest

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the classes; where the cache has none, as LightningDiT's, the numbers up to the largest label."""
        if self.manifest and self.manifest.text:
            return []
        names = self.manifest.images["classes"] if self.manifest else []
        return [str(name) for name in names or range(int(self.opened.labels.max(initial=-1)) + 1)]

    @property
    def num_images(self) -> int:
        """Images of the source, those included that could not be read."""
        return len(self) if self.manifest is None else self.manifest.count

    def num_views(self, flip: bool) -> int:
        """See ``BatchSource``."""
        count = len(self.opened.views)
        has_mirrored = self.manifest.flips if self.manifest else count > 1
        check(has_mirrored or not flip, f"{self} has no mirrored images: set augmentation.flip false, or encode some")
        return count // 2 if has_mirrored and not flip else count

    def fingerprint(self) -> str:
        """Return the hash of the images that were encoded; of LightningDiT's folders, one of names and sizes."""
        if self.manifest is not None:
            return str(self.manifest.images["source"])
        text = "\n".join(f"{shard.path.name} {shard.path.stat().st_size}" for shard in self.opened.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @abstractmethod
    def size(self, name: str) -> Any:
        """Return a size of the rows by its name in a ``TokenizerSpec``."""

    def check_rows(
        self, where: str, kind: str, sizes: Mapping[str, tuple[str, Any]], tokenizer: Tokenizer | None
    ) -> None:
        """Raise a ``UserError`` where these are not the rows that a model learns.

        Args:
            where: Name of this source, for the message: ``train``, ``val`` or ``test``.
            kind: ``latents`` or ``tokens``.
            sizes: Of a row, by name: what the model calls it, for the message, and what it expects.
            tokenizer: Encodes and decodes them; none if the model has none.
        """
        ours = f"{where} {self.folder}"
        check(kind == self.layout.name, f"{ours} holds {self.layout.name}, but this model learns {kind}: change one")
        for name, (key, expected) in sizes.items():
            found = self.size(name)
            same = f"{ours} holds {kind} of {name} {found}, but {key} is {expected}: change one of the two"
            check(found == expected, same)
        if tokenizer is not None:
            self.check_tokenizer(tokenizer, ours)

    def check_tokenizer(self, tokenizer: Tokenizer, ours: str) -> None:
        """Raise a ``UserError`` where another tokenizer than a model's wrote our cache."""
        assert self.manifest is not None
        theirs, kind, name = self.manifest.tokenizer, tokenizer.spec.kind, self.layout.name
        what = f"{ours} holds {theirs['kind']} {name}, the tokenizer makes {kind} ones: change one"
        check(theirs["kind"] == kind, what)
        fingerprint = tokenizer.fingerprint()
        check(
            theirs["fingerprint"] == fingerprint,
            f"{ours} was written by tokenizer {theirs['fingerprint']}, but the model's is {fingerprint}: use the"
            f" checkpoint that wrote the cache, or write a cache with this one ({self.layout.write})",
        )

    def check_text(self, where: str, encoder: TextEncoder) -> None:
        """Raise a ``UserError`` where these rows have no texts, or those of another text encoder than a model's."""
        ours, text = f"{where} {self.folder}", self.manifest.text if self.manifest else None
        if text is None:
            raise UserError(f"{ours} holds no texts: write it from captioned images, with --text_encoder")
        theirs, fingerprint = text["fingerprint"], encoder.fingerprint()
        check(
            theirs == fingerprint,
            f"{ours} was written by text encoder {theirs}, but the model's is {fingerprint}: use the same class, files"
            " and max_tokens, or encode the images again with this one",
        )


class LatentShards(Shards):
    """The latents that ``aligntok encode`` cached, or those of a folder that LightningDiT wrote.

    Our caches hold normalised latents and are served as they are; LightningDiT's are normalised here with its
    ``latents_stats.pt``, or with the statistics of up to 10,000 latents where it is missing.

    >>> LatentShards("runs/latents")  # the folder is opened at the first use
    LatentShards(...runs/latents...)

    Args:
        folder: Where the shards are.
        images: The images that were encoded, to serve ``image`` beside ``latent``: the same centre crop, mirrored
            where the latent is.
        on_bad_shard: See ``Shards``.
        verify: See ``Shards``.

    Raises:
        UserError: At the first use: see ``Shards``, or other images.
    """

    layout = LATENT_LAYOUT

    def __init__(
        self,
        folder: str,
        images: Dataset | None = None,  # type: ignore[type-arg]  # jsonargparse takes any subclass of the bare class
        on_bad_shard: Literal["raise", "skip"] = "raise",
        verify: bool = False,
    ) -> None:
        super().__init__(folder, on_bad_shard, verify)
        self.images: Dataset[Item] | None = images

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return ``latent`` (B, C, h, w), normalised, ``label`` (B,) and, if there are images, ``image`` in bytes.

        Of captioned images there is no label, but ``text_ids`` (B, L) int32, padded with -1, and ``text_features``
        (B, L, W) bfloat16, if they were encoded.
        """
        latent, label = self.opened.read(ids, views)
        if self.normalisation is not None:
            mean, std = self.normalisation
            latent = latent.float().sub_(mean).div_(std)
        batch = {"latent": latent, **(self.opened.read_texts(ids) or {"label": label})}
        if self.images is not None:
            pixels = [self.image(index, bool(view)) for index, view in zip(ids.tolist(), views.tolist(), strict=True)]
            batch["image"] = torch.stack(pixels).permute(0, 3, 1, 2)
        return batch

    def image(self, index: int, mirrored: bool) -> Tensor:
        """Return the image of a latent, bytes (H, W, 3)."""
        assert self.images is not None
        assert self.manifest is not None
        image, _ = read_item(self.images, int(self.opened.image_ids[index]))
        pixels = np.array(center_crop(to_rgb(image), tuple(self.manifest.tokenizer["image_size"])))
        return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels)

    def check_images(self, manifest: Manifest | None) -> None:
        """See ``Shards``."""
        if self.images is None:
            return
        if manifest is None:
            raise UserError(f"{self.folder} has no manifest: nothing says which images these latents belong to")
        ours, theirs = crop_id(self.images, tuple(manifest.tokenizer["image_size"])), manifest.images["source"]
        what = f"images of the cache {self.folder} are {ours}, but {theirs} were encoded ({manifest.count} images)"
        check(ours == theirs, f"{what}: name the same ones")

    def size(self, name: str) -> Any:
        """Return the ``latent_shape`` (C, h, w)."""
        return {"latent_shape": self.opened.shards[0].row_shape}[name]

    def check_tokenizer(self, tokenizer: Tokenizer, ours: str) -> None:
        """See ``Shards``; LightningDiT's statistics must be those of the tokenizer."""
        if self.normalisation is None:
            super().check_tokenizer(tokenizer, ours)
            return
        mean, std = self.normalisation
        shift = (tokenizer.latent_mean.cpu() - mean).abs() / std
        stretch = (tokenizer.latent_std.cpu() / std).log().abs()
        worst = max(shift.max().item(), stretch.max().item())
        check(
            worst <= MAX_SHIFT,
            f"{ours} is normalised with other statistics than the tokenizer's (a channel differs by {worst:.2f}"
            " standard deviations): samples would be decoded wrongly; name the tokenizer that encoded these latents",
        )

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (C, 1, 1) that are still to be applied; none for our own caches."""
        if self.manifest is not None:
            return None
        path = self.folder / STATISTICS
        if path.is_file():
            try:
                content = read_file(path)
                mean, std = (content[key].float().flatten() for key in ("mean", "std"))
            except (UserError, RuntimeError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is no dict of mean and std: remove it, to have them measured") from error
        else:
            mean, std = latent_statistics(self.opened.shards)
        channels = self.size("latent_shape")[0]
        good = len(mean) == len(std) == channels and bool((std > 0).all() and mean.isfinite().all())
        words = f"must be {channels} finite means and positive standard deviations"
        check(good, f"the statistics of {self.folder} ({path.name}, or measured where there is none) {words}")
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)


class TokenShards(Shards):
    """The tokens that ``aligntok encode --config token_cache.yaml`` cached.

    View 0 is the centre crop of an image, which evaluation takes. In training each access takes a view that is a
    function of (seed, epoch, id): of ten crops any, or, without ``augmentation.flip``, any of the five that are not
    mirrored.

    >>> TokenShards("runs/tokens")  # the folder is opened at the first use
    TokenShards(...runs/tokens...)
    """

    layout = TOKEN_LAYOUT

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return ``tokens`` (B, L) int64 and ``label`` (B,)."""
        tokens, label = self.opened.read(ids, views)
        return {"tokens": tokens.to(torch.int64), "label": label}

    def size(self, name: str) -> Any:
        """Return a size of the tokenizer that wrote these tokens."""
        return getattr(self.spec, name)

    @property
    def spec(self) -> TokenizerSpec:
        """Of the tokenizer that wrote these tokens."""
        if self.manifest is None:
            raise UserError(f"{self.folder} has no manifest: nothing says what these tokens mean, write them again")
        entry: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in self.manifest.tokenizer.items()
        }
        del entry["fingerprint"]
        return TokenizerSpec(**entry)
