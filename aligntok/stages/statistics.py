"""Mean and standard deviation of latents, over all images of all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from aligntok.errors import UserError


def channel_statistics(latents: Iterable[Tensor], channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation per channel, (C,) float32 each.

    Args:
        latents: Batches (B, C, h, w); on several ranks, each rank's share.
        channels: C.
        device: Where the ranks exchange their sums.

    Raises:
        UserError: There are no latents.
    """
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64)  # sum, sum of squares, count
    for latent in latents:
        values = latent.double().cpu().transpose(0, 1).flatten(1)
        sums += torch.cat([values.sum(1), values.square().sum(1), sums.new_tensor([values.shape[1]])])
    if dist.is_available() and dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    total, square, count = sums[:channels], sums[channels:-1], sums[-1]
    if count < 2:
        raise UserError("there are no images to measure the latents on")
    variance = (square - total.square() / count) / (count - 1)
    return (total / count).float(), variance.clamp_min(0).sqrt().float()
