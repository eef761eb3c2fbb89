"""Fréchet distance of two sets of features (FID, when they are Inception's).

Reference:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from aligntok.errors import check


class FeatureSums:
    """Number, sum and sum of outer products of features, in float64: all that their mean and covariance need.

    With a 1 in front of each feature vector, one matrix (1 + D, 1 + D) holds all three.

    >>> sums = FeatureSums(2)
    >>> sums.add(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    >>> sums.moments("toy")[1]
    tensor([1., 2.], dtype=torch.float64)

    Args:
        width: Dimensions of the features, D.
    """

    def __init__(self, width: int) -> None:
        self.products = torch.zeros(width + 1, width + 1, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (B, D)."""
        rows = torch.cat([features.new_ones(len(features), 1), features], dim=1).double()  # (B, 1 + D)
        self.products = self.products.to(rows.device) + rows.T @ rows

    def moments(self, images: str, device: torch.device | None = None) -> tuple[int, Tensor, Tensor]:
        """Return number, mean (D,) and covariance (D, D) of the features of all ranks, float64.

        Args:
            images: Which images these are features of, for the messages.
            device: Where to compute; on several ranks, that of the process group.

        Raises:
            UserError: Fewer than 2 images, or features that are not finite.
        """
        products = self.products.to(device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(products)
        count = int(products[0, 0])
        check(count >= 2, f"a Fréchet distance needs 2 (better: thousands of) {images} images or more, got {count}")
        check(bool(products.isfinite().all()), f"features of the {images} images contain NaN or infinity")
        mean = products[0, 1:] / count
        cov = (products[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1)
        return count, mean, cov


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Return the squared Fréchet (2-Wasserstein) distance () of two Gaussians, float64, never below 0.

    ``|mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))``. With ``cov = A A^T`` the last trace is the
    sum of the singular values of ``A1^T A2``: more exact than a matrix square root or unsymmetric eigenvalues where
    there are fewer images than features.

    >>> one = torch.ones(3).double()
    >>> round(frechet_distance(0 * one, one.diag(), one, 4 * one.diag()).item(), 9)  # 3 (1 - 0)^2 + 3 (2 - 1)^2
    6.0

    Args:
        mean1: (D,) float64.
        cov1: (D, D) float64, symmetric, positive up to rounding.
        mean2: (D,) float64.
        cov2: (D, D) float64, as ``cov1``.

    Reference:
        Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982.
    """
    shift = (mean1 - mean2).square().sum()
    overlap = torch.linalg.svdvals(factor_of(cov1).T @ factor_of(cov2)).sum()
    distance: Tensor = shift + cov1.trace() + cov2.trace() - 2 * overlap
    return distance.clamp_min(0)


def factor_of(cov: Tensor) -> Tensor:
    """Return A (D, rank) with ``cov = A A^T``; eigenvalues that are rounding error, negative ones included, are 0."""
    values, vectors = torch.linalg.eigh(cov)
    tolerance = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)  # the rule of matrix_rank
    keep = values > tolerance
    factor: Tensor = vectors[:, keep] * values[keep].sqrt()
    return factor
