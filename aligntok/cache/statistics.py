"""What is measured over all rows of a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aligntok.cache.shards import Shard

STATISTICS_COUNT = 10_000  # LightningDiT: at most so many latents give mean and standard deviation


def latent_statistics(shards: Sequence[Shard]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation (C,) of up to 10,000 latents from all over the shards, fp32."""
    starts = np.cumsum([0] + [shard.shape[0] for shard in shards])
    step = max(1, math.ceil(starts[-1] / STATISTICS_COUNT))
    channels = shards[0].shape[1]
    total, square, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for shard, start in zip(shards, starts, strict=False):
        rows = list(shard.map()[0].bytes[-start % step :: step])
        for first in range(0, len(rows), 256):
            values = shard.tensor(rows[first : first + 256]).double().transpose(0, 1).flatten(1)
            total, square, count = total + values.sum(1), square + values.square().sum(1), count + values.shape[1]
    variance = (square - total.square() / count) / max(1, count - 1)
    return (total / count).float(), variance.clamp_min(0).sqrt().float()


def code_counts(shards: Sequence[Shard], codebook_size: int) -> Tensor:
    """Return how often the first views of all images use each code, (codebook_size,) int64."""
    counts = torch.zeros(codebook_size, dtype=torch.int64)
    for shard in shards:
        rows = shard.map()[0].bytes
        for first in range(0, len(rows), 4096):
            tokens = shard.tensor(list(rows[first : first + 4096])).long().flatten()
            counts += torch.bincount(tokens, minlength=codebook_size)
    return counts
