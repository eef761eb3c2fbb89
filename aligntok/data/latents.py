"""Cached latents as a source of the data module."""

from __future__ import annotations

import pickle
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.cache import LATENT_LAYOUT, Manifest, latent_statistics
from aligntok.data.batches import Batch
from aligntok.data.images import center_crop, to_rgb
from aligntok.data.shards import Shards
from aligntok.data.sources import Indices, Item, crop_id, read_item
from aligntok.errors import UserError
from aligntok.networks.tokenizer import Tokenizer

STATISTICS = "latents_stats.pt"  # LightningDiT's
MAX_SHIFT = 0.1  # of a tokenizer's statistics from those of LightningDiT's latents, in standard deviations


class LatentShards(Shards):
    """The latents that ``aligntok encode`` cached, or those of a folder that LightningDiT wrote.

    Rows are gathered from mapped memory, in any order over all shards. Our caches hold normalised latents and are
    served as they are; LightningDiT's are normalised here with its ``latents_stats.pt``, or with the statistics of
    up to 10,000 latents where it is missing.

    >>> LatentShards("runs/latents")  # the folder is opened at the first use
    LatentShards(...runs/latents...)

    Args:
        folder: Where the shards are.
        images: The images that were encoded, to serve ``image`` beside ``latent``: the same centre crop, mirrored
            where the latent is.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).

    Raises:
        UserError: At the first use: no cache, an unfinished one, broken shards, other images.
    """

    layout = LATENT_LAYOUT

    def __init__(
        self,
        folder: str,
        images: Dataset | None = None,  # type: ignore[type-arg]  # jsonargparse takes any subclass of the bare class
        on_bad_shard: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(folder, on_bad_shard)
        self.images: Dataset[Item] | None = images

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return ``latent`` (B, C, h, w), normalised, ``label`` (B,) and, if there are images, ``image`` in bytes."""
        latent, label = self.opened.read(ids, views)
        if self.normalisation is not None:
            mean, std = self.normalisation
            latent = latent.float().sub_(mean).div_(std)
        batch = {"latent": latent, "label": label}
        if self.images is not None:
            pixels = [self.image(index, bool(view)) for index, view in zip(ids.tolist(), views.tolist(), strict=True)]
            batch["image"] = torch.stack(pixels).permute(0, 3, 1, 2)
        return batch

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return self.opened.shards[0].row_shape

    @property
    def needs_processes(self) -> bool:
        """Whether images are read too."""
        return self.images is not None

    def check_latents(
        self, latent_shape: tuple[int, ...], tokenizer: Tokenizer | None, data_key: str, key: str
    ) -> None:
        """See ``Shards``."""
        ours = f"{data_key} {self.folder}"
        if self.latent_shape != tuple(latent_shape):
            raise UserError(
                f"{ours} holds latents {list(self.latent_shape)} (channels, height, width), but {key} is"
                f" {list(latent_shape)}: change one of the two"
            )
        if tokenizer is None:
            return
        if self.manifest is None:
            self.check_statistics(tokenizer, ours)
        else:
            self.check_tokenizer(tokenizer, data_key)

    # LightningDiT's statistics

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (C, 1, 1) that are still to be applied; none for our own caches."""
        if self.manifest is not None:
            return None
        path = self.folder / STATISTICS
        if path.is_file():
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                mean, std = (content[key].float().flatten() for key in ("mean", "std"))
            except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is no dict of mean and std: remove it, to have them measured") from error
        else:
            mean, std = latent_statistics(self.opened.shards)
        channels = self.latent_shape[0]
        if len(mean) != channels or len(std) != channels or not bool((std > 0).all() and mean.isfinite().all()):
            raise UserError(
                f"the statistics of {self.folder} ({path.name}, or measured where there is none) must be {channels}"
                " finite means and positive standard deviations"
            )
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def check_statistics(self, tokenizer: Tokenizer, ours: str) -> None:
        """Raise a ``UserError`` where a tokenizer scales otherwise than LightningDiT's statistics."""
        assert self.normalisation is not None
        mean, std = self.normalisation
        shift = (tokenizer.latent_mean.cpu() - mean).abs() / std
        stretch = (tokenizer.latent_std.cpu() / std).log().abs()
        worst = max(shift.max().item(), stretch.max().item())
        if worst > MAX_SHIFT:
            raise UserError(
                f"{ours} is normalised with other statistics than model.tokenizer's (a channel differs by {worst:.2f}"
                " standard deviations): samples would be decoded wrongly; name the tokenizer that encoded these latents"
            )

    # The images beside the latents

    def check_images(self, manifest: Manifest | None) -> None:
        """Raise a ``UserError`` where the images are not those that were encoded."""
        if self.images is None:
            return
        if manifest is None:
            raise UserError(f"{self.folder} has no manifest: nothing says which images these latents belong to")
        ours = crop_id(self.images, tuple(manifest.tokenizer["image_size"]))
        if ours != manifest.images["source"]:
            raise UserError(
                f"images of the cache {self.folder} are {ours}, but {manifest.images['source']} were encoded"
                f" ({manifest.count} images): name the same ones"
            )

    def image(self, index: int, mirrored: bool) -> Tensor:
        """Return the image of a latent, bytes (H, W, 3)."""
        opened = self.opened
        assert self.images is not None
        assert opened.manifest is not None
        image, _ = read_item(self.images, int(opened.image_ids[index]))
        pixels = np.array(center_crop(to_rgb(image), tuple(opened.manifest.tokenizer["image_size"])))
        return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels)
