"""Semantic preservation: the distance of the current latent from that of a frozen snapshot of encoder and adapter.

Reference:
    AlignTok, arXiv:2509.25162, section 3: L_sp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from aligntok.schedule import Schedule

Distance = Literal["l2", "cosine"]


@dataclass(frozen=True)
class SemanticPreservation:
    """Weight, distance and place of the loss that keeps the latent near the snapshot's.

    >>> import torch
    >>> term = SemanticPreservation(weight=0.5, distance="cosine")
    >>> semantic_preservation(torch.ones(1, 4, 2, 2), 3 * torch.ones(1, 4, 2, 2), term.distance)
    tensor(0.)

    Args:
        weight: w_sp, over the steps; 1 in the paper, and 0 gives its ablation without the loss.
        distance: ``l2`` or ``cosine``.
        before_adapter: Compare the encoder's features instead of the latents (an ablation that loses).
    """

    weight: Schedule = 1.0
    distance: Distance = "l2"
    before_adapter: bool = False


def semantic_preservation(latent: Tensor, anchor: Tensor, distance: Distance = "l2") -> Tensor:
    """Return the mean distance () between the current latent and the frozen snapshot's.

    The paper does not say in which unit its l2 is taken. Here both latents are normalised by the snapshot's mean and
    standard deviation per channel, so that ``w_sp`` means the same for every encoder, adapter and latent size.

    Args:
        latent: Normalised latent of the network in training, (B, C, h, w).
        anchor: Normalised latent of the snapshot on the same image, (B, C, h, w).
        distance: ``l2``, the mean squared difference, or ``cosine``, one minus the cosine along the channels.
    """
    if distance == "cosine":
        return (1 - F.cosine_similarity(latent.float(), anchor.float(), dim=1)).mean()
    return F.mse_loss(latent.float(), anchor.float())
