"""Adapters: from the encoder's ``width`` to the ``latent_dim`` channels of the latent, position by position.

Reference:
    AlignTok, arXiv:2509.25162, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearAdapter(nn.Module):
    """One 1x1 convolution, the default.

    >>> LinearAdapter(width=16, latent_dim=4)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.width, self.latent_dim = width, latent_dim
        self.project = nn.Conv2d(width, latent_dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the latent (B, latent_dim, h, w) of features (B, width, h, w)."""
        return self.project(features)  # type: ignore[no-any-return]


class MLPAdapter(LinearAdapter):
    """Two 1x1 convolutions with a GELU between them, where the features have ``hidden_width`` channels.

    >>> MLPAdapter(width=16, latent_dim=4, hidden_width=32)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, width: int, latent_dim: int, hidden_width: int) -> None:
        super().__init__(hidden_width, latent_dim)
        self.width = width
        self.expand = nn.Sequential(nn.Conv2d(width, hidden_width, 1), nn.GELU())

    def forward(self, features: Tensor) -> Tensor:
        """Return the latent (B, latent_dim, h, w) of features (B, width, h, w)."""
        return self.project(self.expand(features))  # type: ignore[no-any-return]


class GaussianAdapter(LinearAdapter):
    """A linear adapter with a second output, the log-variance of a diagonal Gaussian: for the ablation with a KL term.

    The latent is the mean; a stage with ``kl_weight`` samples in training. The paper finds that KL brings nothing.

    >>> latent, divergence = GaussianAdapter(width=16, latent_dim=4).sample(torch.randn(2, 16, 8, 8))
    >>> latent.shape, divergence.shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2]))
    """

    LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in LDM's autoencoder

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__(width, latent_dim)
        self.project_log_variance = nn.Conv2d(width, latent_dim, 1)

    def sample(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a sample (B, latent_dim, h, w) of the posterior and its KL divergence from N(0, 1), a sum (B,).

        Args:
            features: (B, width, h, w).
            noise: Standard normal, of the sample's shape; by default drawn from torch's generator.
        """
        mean = self(features)
        log_variance = self.project_log_variance(features).clamp(*self.LOG_VARIANCE_RANGE)
        latent = mean + torch.exp(0.5 * log_variance) * (torch.randn_like(mean) if noise is None else noise.to(mean))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        return latent, divergence
