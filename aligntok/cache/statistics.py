"""Mean and standard deviation of latents, and how often codes are used: by sums, so that any number streams by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aligntok.cache.shards import Shard
from aligntok.errors import check

STATISTICS_COUNT = 10_000  # LightningDiT: at most so many latents give mean and standard deviation


def channel_statistics(
    latents: Iterable[Tensor], channels: int, exchange: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation per channel, (C,) float32 each; the sums are float64.

    >>> mean, std = channel_statistics([torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]])], channels=1)
    >>> mean, std.square()
    (tensor([2.5000]), tensor([1.6667]))

    Args:
        latents: Batches (B, C, h, w).
        channels: C.
        exchange: Where several ranks, each with its share, add up their sums; by default this process is alone.

    Raises:
        UserError: There are no latents.
    """
    sums = torch.zeros(3, channels, dtype=torch.float64)  # values, squares, how many
    for latent in latents:
        values = latent.double().cpu().transpose(0, 1).flatten(1)  # (C, B * h * w)
        sums += torch.stack([values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])])
    if exchange is not None and dist.is_available() and dist.is_initialized():
        sums = sums.to(exchange)
        dist.all_reduce(sums)
        sums = sums.cpu()
    total, square, count = sums
    check(bool(count[0] > 0), "there are no images to measure the latents on")
    variance = (square - total.square() / count) / (count - 1).clamp_min(1)
    return (total / count).float(), variance.clamp_min(0).sqrt().float()


def latent_statistics(shards: Sequence[Shard]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation (C,) of up to 10,000 latents from all over the shards, fp32."""
    starts = np.cumsum([0] + [shard.shape[0] for shard in shards])
    step = max(1, math.ceil(starts[-1] / STATISTICS_COUNT))
    pairs = zip(shards, starts, strict=False)
    latents = (part for shard, start in pairs for part in parts(shard, slice(-start % step, None, step)))
    return channel_statistics(latents, shards[0].shape[1])


def code_counts(shards: Sequence[Shard], codebook_size: int) -> Tensor:
    """Return how often the first views of all images use each code, (codebook_size,) int64."""
    counts = torch.zeros(codebook_size, dtype=torch.int64)
    for shard in shards:
        for tokens in parts(shard):
            counts += torch.bincount(tokens.long().flatten(), minlength=codebook_size)
    return counts


def parts(shard: Shard, rows: slice = slice(None)) -> Iterator[Tensor]:
    """Yield the first views of some images of a shard, 256 at a time."""
    shard.check_whole()
    start, size = shard.starts[0], shard.row_size
    chosen = range(start, start + shard.shape[0] * shard.stride, shard.stride)[rows]
    for first in range(0, len(chosen), 256):
        yield shard.tensor([shard.content[begin : begin + size] for begin in chosen[first : first + 256]])
