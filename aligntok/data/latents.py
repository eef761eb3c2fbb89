"""Cached latents as a source of the data module."""

from __future__ import annotations

import errno
import hashlib
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.cache import (
    LATENTS,
    MIRRORED,
    WRITE,
    Manifest,
    Rows,
    Shard,
    hash_file,
    latent_statistics,
    open_shards,
)
from aligntok.data.batches import Batch, BatchSource, Flags
from aligntok.data.images import center_crop, to_rgb
from aligntok.data.sources import Indices, Item, crop_id, read_item
from aligntok.errors import UserError
from aligntok.networks.tokenizer import Tokenizer

STATISTICS = "latents_stats.pt"  # LightningDiT's
REPAIR = "`aligntok repair {folder}` encodes again what is broken, and only that"
MAX_SHIFT = 0.1  # of a tokenizer's statistics from those of LightningDiT's latents, in standard deviations


class LatentShards(BatchSource):
    """The latents that ``aligntok predict`` cached, or those of a folder that LightningDiT wrote.

    Rows are gathered from mapped memory, in any order over all shards. Our caches hold normalised latents and are
    served as they are; LightningDiT's are normalised here with its ``latents_stats.pt``, or with the statistics of
    up to 10,000 latents where it is missing.

    Args:
        folder: Where the shards are.
        images: The images that were encoded, to serve ``image`` beside ``latent``: the same centre crop, mirrored
            where the latent is.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).

    Raises:
        UserError: At the first use: no cache, an unfinished one, broken shards, other images.
    """

    def __init__(
        self,
        folder: str,
        images: Dataset | None = None,  # type: ignore[type-arg]  # jsonargparse takes any subclass of the bare class
        on_bad_shard: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.images: Dataset[Item] | None = images
        self.on_bad_shard = on_bad_shard

    def __len__(self) -> int:
        return len(self.opened.labels)

    def __repr__(self) -> str:
        return f"LatentShards({str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped memory: a spawned process maps it for itself."""
        return {key: value for key, value in vars(self).items() if key != "opened"}

    # What the data module asks

    def batch(self, ids: Indices, mirrored: Flags) -> Batch:
        """Return ``latent`` (B, C, h, w), normalised, ``label`` (B,) and, if there are images, ``image`` in bytes."""
        opened = self.opened
        shards = np.searchsorted(opened.starts, ids, "right") - 1
        places = zip(mirrored.tolist(), shards.tolist(), (ids - opened.starts[shards]).tolist(), strict=True)
        rows = [(opened.maps[flag][shard], row) for flag, shard, row in places]
        for shard, row in rows:
            shard.announce(row)
        latent = opened.shards[0].tensor([shard.bytes[row] for shard, row in rows])
        if self.normalisation is not None:
            mean, std = self.normalisation
            latent = latent.float().sub_(mean).div_(std)
        batch = {"latent": latent, "label": torch.from_numpy(opened.labels[ids])}
        if self.images is not None:
            pixels = [self.image(*pair) for pair in zip(ids.tolist(), mirrored.tolist(), strict=True)]
            batch["image"] = torch.stack(pixels).permute(0, 3, 1, 2)
        return batch

    @property
    def manifest(self) -> Manifest | None:
        """What the cache says of itself; LightningDiT's says nothing."""
        return self.opened.manifest

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the classes; none for LightningDiT's folders."""
        return [str(name) for name in self.manifest.images["classes"]] if self.manifest else []

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return self.opened.shards[0].shape[1:]

    @property
    def has_mirrored(self) -> bool:
        """Whether the mirrored images were encoded too."""
        return bool(self.opened.maps[True])

    @property
    def needs_processes(self) -> bool:
        """Whether images are read too."""
        return self.images is not None

    def fingerprint(self) -> str:
        """Return the hash of the images that were encoded; of LightningDiT's folders, one of names and sizes."""
        if self.manifest is not None:
            return str(self.manifest.images["source"])
        text = "\n".join(f"{shard.path.name} {shard.path.stat().st_size}" for shard in self.opened.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
        ours = f"{data_key} {self.folder}"
        if self.latent_shape != tuple(latent_shape):
            raise UserError(
                f"{ours} holds latents {list(self.latent_shape)} (channels, height, width), but {key} is"
                f" {list(latent_shape)}: change one of the two"
            )
        if tokenizer is None:
            return
        if self.manifest is None:
            return self.check_statistics(tokenizer, ours)
        theirs = self.manifest.tokenizer
        if theirs["kind"] != tokenizer.spec.kind:
            raise UserError(
                f"{ours} holds {theirs['kind']} latents, model.tokenizer makes {tokenizer.spec.kind} ones: change one"
            )
        fingerprint = tokenizer.fingerprint()
        if theirs["fingerprint"] != fingerprint:
            raise UserError(
                f"{ours} was written by tokenizer {theirs['fingerprint']}, but model.tokenizer is {fingerprint}: use"
                f" the checkpoint that wrote the cache, or write a cache with this one ({WRITE})"
            )

    # The files

    @cached_property
    def opened(self) -> Opened:
        """Open the folder: sizes and headers are checked, labels read, latents mapped."""
        if not self.folder.is_dir():
            raise UserError(f"there is no latent cache {self.folder}: write it with {WRITE}")
        manifest = Manifest.read(self.folder)
        if manifest is not None and manifest.statistics is None:
            raise UserError(
                f"the latent cache {self.folder} is unfinished: the same `aligntok predict` goes on with it, or"
                f" `aligntok repair {self.folder}`"
            )
        shards, problems = open_shards(self.folder, manifest)
        if problems:
            text = brief(problems)
            if self.on_bad_shard == "raise" or not shards:
                remedy = REPAIR.format(folder=self.folder) if manifest else "extract the latents again"
                raise UserError(f"{text}. {remedy}")
            print(f"aligntok: shards skipped: {text}", file=sys.stderr, flush=True)
        if self.images is not None:
            self.check_images(manifest)
        try:
            return Opened(manifest, shards)
        except OSError as error:
            few = f": its {len(shards)} shards are more than `ulimit -n` allows" if error.errno == errno.EMFILE else ""
            raise UserError(f"cannot map the shards of {self.folder} ({error}){few}") from error

    def verify(self) -> None:
        """Read every shard in full.

        Raises:
            UserError: Some are not what was written; they are named.
        """
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise UserError(f"{self.folder} has no manifest with hashes to verify its shards by")
        shards, problems = open_shards(self.folder, manifest)
        hashes = {record.file: record.sha256 for record in manifest.shards}
        with ThreadPoolExecutor() as pool:
            for shard, value in zip(shards, pool.map(lambda shard: hash_file(shard.path), shards), strict=True):
                if value != hashes[shard.path.name]:
                    problems[shard.path.name] = f"{shard.path} is altered: its hash is not that of the manifest"
        if problems:
            raise UserError(f"{brief(problems)}. {REPAIR.format(folder=self.folder)}")

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
        if manifest is None:
            raise UserError(f"{self.folder} has no manifest: nothing says which images these latents belong to")
        assert self.images is not None
        ours = crop_id(self.images, tuple(manifest.tokenizer["image_size"]))
        if ours != manifest.images["source"]:
            raise UserError(
                f"images of the cache {self.folder} are {ours}, but {manifest.images['source']} were encoded"
                f" ({manifest.count} images, data.{manifest.images['split']} then): name the same ones"
            )

    def image(self, index: int, mirrored: bool) -> Tensor:
        """Return the image of a latent, bytes (H, W, 3)."""
        opened = self.opened
        assert self.images is not None
        assert opened.manifest is not None
        image, _ = read_item(self.images, int(opened.image_ids[index]))
        pixels = np.array(center_crop(to_rgb(image), tuple(opened.manifest.tokenizer["image_size"])))
        return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels)


def brief(problems: dict[str, str]) -> str:
    """Return the first problem, and the names of the other shards that have one."""
    first, *others = problems
    shown = f"; also {', '.join(others[:3])}" if others else ""
    return f"{problems[first]}{shown}" + (f" and {len(others) - 3} more" if len(others) > 3 else "")


@dataclass
class Opened:
    """Mapped shards."""

    manifest: Manifest | None
    shards: list[Shard]

    def __post_init__(self) -> None:
        maps = [shard.map() for shard in self.shards]
        self.maps: tuple[list[Rows], list[Rows]] = (
            [content[LATENTS] for content in maps],
            [content[MIRRORED] for content in maps if MIRRORED in content],
        )
        self.labels: Indices = np.concatenate([shard.labels() for shard in self.shards])
        self.starts: Indices = np.cumsum([0] + [shard.shape[0] for shard in self.shards])[:-1]

    @cached_property
    def image_ids(self) -> Indices:
        """Index of each latent's image in its source."""
        assert self.manifest is not None
        records = {record.file: record for record in self.manifest.shards}
        parts = [records[shard.path.name] for shard in self.shards]
        return np.concatenate(
            [np.setdiff1d(np.arange(r.first, r.first + r.count + len(r.missing)), r.missing) for r in parts]
        )
