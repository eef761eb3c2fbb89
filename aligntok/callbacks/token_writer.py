"""The token cache: what a discrete tokenizer makes of images, written once, for autoregressive generators."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from aligntok.cache import CROPS, TOKEN_LAYOUT, TOKENS, Shard, code_counts
from aligntok.callbacks.blocks import Block
from aligntok.callbacks.cache_writer import CacheWriter
from aligntok.errors import UserError
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.networks.tokenizer import Tokenizer

MAX_CODES = 1 << 16  # that uint16 can name
ENLARGED = 1.1  # of the image that the ten crops are cut from: arXiv:2406.06525, arXiv:2506.05289
PLACES = ("centre", "top left", "top right", "bottom left", "bottom right")


class TokenWriter(CacheWriter):
    """Writes the tokens of ``data.predict`` as safetensors shards, ``tokens`` (N, V, L) uint16, with a manifest.

    The V views of an image are its centre crop and, with ``flips``, the tokens of the mirrored crop; or ten crops: of
    the image at 1.1 times the size (ADM's centre crop) the centre and the four corners, then the same mirrored. View 0,
    the centre, is the one that evaluation takes. See ``CacheWriter`` for how it goes on where it was cut off, repairs
    and checks itself.

    Args:
        shard_size: Images of a shard.
        batch_size: Images of a batch on one device; each view is a batch of its own.
        crops: ``center`` or ``ten`` (half of them mirrored: needs ``flips``, else they are five).
        flips: Encode the mirrored images too; by default where ``data.flip`` is on.
        min_psnr: Decibels that decoded tokens must reach on average, see ``LatentWriter``.

    Reference:
        Sun et al., LlamaGen, arXiv:2406.06525, the ten crops of ``extract_codes_c2i.py``; AliTok, arXiv:2506.05289.
    """

    layout = TOKEN_LAYOUT
    kind, counted = "discrete", "tokens of {:,} images"

    def __init__(
        self,
        shard_size: int = 10_000,
        batch_size: int = 50,
        crops: Literal["center", "ten"] = "center",
        flips: bool | None = None,
        min_psnr: float = 10.0,
    ) -> None:
        super().__init__(shard_size, batch_size, "uint16", flips, min_psnr)
        self.crops = crops
        self.image_size = (0, 0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the data give the images that the crops are cut from."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        tokenizer: Any = pl_module.tokenizer
        self.image_size = tokenizer.spec.image_size
        if self.crops == "ten":
            height, width = self.image_size
            self.data.enlarge_predicted((int(height * ENLARGED), int(width * ENLARGED)))

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the module encode the first view of an enlarged image; ``add`` encodes the others."""
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        batch["whole"] = batch["image"]
        batch["image"] = self.cut(batch["image"])[0]

    def add(self, block: Block, outputs: Any, batch: Any, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep a batch."""
        super().add(block, outputs, {**batch, "image": batch["whole"]}, trainer, module)

    def cut(self, image: Tensor) -> list[Tensor]:
        """Return the centre, and of ten crops the corners too."""
        if self.crops == "center":
            return [image]
        (h, w), down, right = self.image_size, image.shape[2] - self.image_size[0], image.shape[3] - self.image_size[1]
        corners = ((round(down / 2), round(right / 2)), (0, 0), (0, right), (down, 0), (down, right))
        return [image[:, :, top : top + h, left : left + w] for top, left in corners]

    def rows(self, codes: list[Tensor]) -> dict[str, Tensor]:
        """Return ``tokens``, (B, V, L)."""
        return {TOKENS: torch.stack(codes, 1).to(torch.uint16)}

    def statistics(self, shards: list[Shard], tokenizer: Tokenizer) -> tuple[dict[str, list[float]], str]:
        """Return which share of the codes is used, and their perplexity."""
        size = tokenizer.spec.codebook_size
        assert size is not None
        health = VectorQuantizer.health(code_counts(shards, size))
        words = f"{health['usage']:.1%} of {size:,} codes used, perplexity {health['perplexity']:.1f}"
        return {key: [round(health[key], 6)] for key in ("usage", "perplexity")}, words

    def view_name(self, view: int) -> str:
        """Return tokens and, in brackets, the crop."""
        turned, place = divmod(view, CROPS[self.crops])
        return f"{TOKENS} ({PLACES[place]}{', mirrored' * turned})"

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a codebook that uint16 cannot name."""
        size = tokenizer.spec.codebook_size
        if size is None or size > MAX_CODES:
            raise UserError(
                f"model.tokenizer.quantizer.codebook_size {size}: the cache holds 16-bit tokens, at most {MAX_CODES:,}"
                " codes; train on images instead"
            )
