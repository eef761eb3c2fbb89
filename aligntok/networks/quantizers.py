"""Vector quantisation: a latent vector becomes the nearest of a codebook's vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a latent.

    Attributes:
        latent: The nearest codes, (B, C, h, w), with the gradient estimator of the quantizer.
        tokens: Their numbers, (B, h * w) int64.
        commitment: Mean squared distance that pulls the encoder, ().
        codebook: Mean squared distance that pulls the codes, ().
    """

    latent: Tensor
    tokens: Tensor
    commitment: Tensor
    codebook: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code of a codebook."""
