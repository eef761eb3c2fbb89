"""The latent cache: what a continuous tokenizer makes of images, written once, for generators and the last decoder."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aligntok.cache import LATENT_LAYOUT, LATENTS, MIRRORED, Shard, latent_statistics
from aligntok.callbacks.cache_writer import CacheWriter
from aligntok.errors import UserError
from aligntok.networks.tokenizer import Tokenizer


class LatentWriter(CacheWriter):
    """Writes the latents of ``data.predict`` as safetensors shards in LightningDiT's layout, with a manifest.

    See ``CacheWriter`` for how it goes on where it was cut off, repairs and checks itself.

    Args:
        shard_size: Images of a shard; 10,000 in LightningDiT.
        batch_size: Images of a batch on one device.
        dtype: Of the latents in the files.
        flips: Encode the mirrored images too; by default where ``data.flip`` is on.
        min_psnr: Decibels that decoded latents must reach on average. The default is about what one flat colour in
            place of the image reaches: below it, nothing of the images is left.
    """

    layout = LATENT_LAYOUT
    kind, counted = "continuous", "{:,} latents"

    def __init__(
        self,
        shard_size: int = 10_000,
        batch_size: int = 50,
        dtype: Literal["float32", "bfloat16"] = "float32",
        flips: bool | None = None,
        min_psnr: float = 10.0,
    ) -> None:
        super().__init__(shard_size, batch_size, dtype, flips, min_psnr)

    def rows(self, codes: list[Tensor]) -> dict[str, Tensor]:
        """Return ``latents`` and, of mirrored images, ``latents_flip``."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return {key: code.to(dtype) for key, code in zip((LATENTS, MIRRORED), codes, strict=False)}

    def statistics(self, shards: list[Shard], tokenizer: Tokenizer) -> tuple[dict[str, list[float]], str]:
        """Return mean and standard deviation per channel."""
        mean, std = latent_statistics(shards)
        values = {key: [round(x, 6) for x in value.tolist()] for key, value in (("mean", mean), ("std", std))}
        return values, (
            f"channels with mean {mean.min():.2f} to {mean.max():.2f} and std {std.min():.2f} to {std.max():.2f}"
        )

    def view_name(self, view: int) -> str:
        """Return the key in the shards."""
        return (LATENTS, MIRRORED)[view]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse latents that were never measured."""
        if not tokenizer.is_measured:
            raise UserError(
                "the latents of this tokenizer were never measured, so they would be cached unscaled: stages 2 and 3"
                " measure them; run one, e.g. aligntok fit --config stage3.yaml --init_from CHECKPOINT"
            )
