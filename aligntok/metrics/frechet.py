"""Fréchet distance between two sets of images, in the features of any network (FID when that network is Inception).

Reference:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.metrics.reference import FeatureStatistics
from aligntok.networks.frozen import Frozen

T = TypeVar("T")


class FeatureSums:
    """Number, sum and sum of outer products of features, in float64: all that their mean and covariance need.

    With a 1 in front of each feature vector, one matrix (1 + D, 1 + D) holds all three.
    """

    def __init__(self, width: int) -> None:
        self.products = torch.zeros(width + 1, width + 1, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (B, D)."""
        rows = torch.cat([features.new_ones(len(features), 1), features], dim=1).double()  # (B, 1 + D)
        self.products = self.products.to(rows.device) + rows.T @ rows

    @property
    def count(self) -> int:
        """Number of images on this rank."""
        return int(self.products[0, 0])


class FrechetDistance:
    """FID with any feature network, exact counts, and statistics that can be kept in a file.

    Images are first made what a PNG would hold (clamped to [0, 1], rounded to 8 bits), so that the number equals the
    one of an offline tool that reads the written files. The network runs in float32 without autocast, frozen and in
    eval mode. Over ranks the sums are added up: every rank must call ``compute`` and ``reference``. The distance comes
    from symmetric eigendecompositions, see ``frechet_distance``.

    >>> class Colour(nn.Module):
    ...     name, num_features = "colour", 3
    ...     def forward(self, image): return image.mean((2, 3))
    >>> metric = FrechetDistance(Colour())
    >>> metric.update(torch.rand(20, 3, 8, 8), real=True)
    >>> metric.update(torch.rand(20, 3, 8, 8), real=False)
    >>> 0 < metric.compute() < 0.1
    tensor(True)

    Args:
        features: Network from image (B, 3, H, W), float32 in [0, 1], to features (B, D). It has the attributes
            ``name: str`` ("inception", "efficientnet_lite0"), an id that is compared with that of reference statistics,
            and ``num_features: int``, which is D. Resizing and pixel statistics are its own business.

    Raises:
        UserError: ``features`` lacks ``name`` or ``num_features``.
    """

    def __init__(self, features: nn.Module) -> None:
        if not isinstance(getattr(features, "name", None), str) or not isinstance(
            getattr(features, "num_features", None), int
        ):
            raise UserError(
                f"the feature network {type(features).__name__} needs the attributes `name: str` and "
                "`num_features: int`: set them in its __init__"
            )
        self.features: Any = features
        self.network = Frozen(features)
        self.device = torch.device("cpu")
        self.forget()

    def forget(self) -> None:
        """Forget all images and the reference."""
        self.real = FeatureSums(self.features.num_features)
        self.given: FeatureStatistics | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the generated images."""
        self.generated = FeatureSums(self.features.num_features)

    def to(self, device: torch.device | str) -> FrechetDistance:
        """Measure on this device."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def load(self) -> None:
        """Fetch the feature network's published weights now, so that a missing file does not stop a run later."""
        load = getattr(self.features, "load", None)  # only networks with published weights have it
        if load is not None:
            load()

    @property
    def metric_name(self) -> str:
        """``fid`` and ``sfid`` for Inception's features, ``fd_<name>`` for others, which papers hardly report."""
        name = str(self.features.name)
        return {"inception": "fid", "inception_spatial": "sfid"}.get(name, f"fd_{name}")

    def update(self, image: Tensor, real: bool, features: Tensor | None = None) -> None:
        """Add images to one of the two sets.

        Args:
            image: (B, 3, H, W), any float dtype, in [0, 1]. Generated images may overshoot, they are clamped. B may be
                0: a rank whose last batch is padding only.
            real: Whether they belong to the reference set.
            features: What ``extract`` gave for these images, (B, D), where it was needed elsewhere too.

        Raises:
            UserError: Integer or NaN images, another shape, a range that is not [0, 1], features of another shape than
                (B, ``num_features``), or real images while reference statistics are set.
        """
        if real and self.given is not None:
            raise UserError(
                "real images given to FrechetDistance while reference statistics are set, which replace them: "
                "leave out these updates, or forget() the reference"
            )
        check_images(image, real)
        if len(image) == 0:
            return
        features = extract(self.network, image) if features is None else features
        if features.shape != (len(image), self.features.num_features):
            raise UserError(
                f"feature network {self.features.name!r} gave {tuple(features.shape)} for {len(image)} images, "
                f"expected {(len(image), self.features.num_features)}: correct its `num_features` or flatten its output"
            )
        (self.real if real else self.generated).add(features)

    def compute(self) -> Tensor:
        """Return the distance between the two sets of all ranks, a float64 scalar >= 0.

        Raises:
            UserError: Fewer than 2 images in a set, or features that are not finite.
        """
        one, two = self.reference(), self.statistics(self.generated, "generated", "")
        return frechet_distance(*(x.to(self.device) for x in (one.mean, one.cov, two.mean, two.cov)))

    def set_reference(self, statistics: FeatureStatistics) -> None:
        """Compare with these statistics from now on, in place of real images; every rank must do so.

        Raises:
            UserError: They are of another feature network or dimension, or of 1 image.
        """
        if statistics.features != self.features.name or len(statistics.mean) != self.features.num_features:
            raise UserError(
                f"the reference statistics ({statistics.source or 'unnamed source'}) are of features "
                f"{statistics.features!r} with {len(statistics.mean)} dimensions, this metric uses "
                f"{self.features.name!r} with {self.features.num_features}: measure the reference with the same network"
            )
        if statistics.count == 1:
            raise UserError("the reference statistics are of 1 image, a covariance needs 2 or more")
        self.real = FeatureSums(self.features.num_features)
        self.given = statistics

    def reference(self, source: str = "") -> FeatureStatistics:
        """Return the statistics of the real images of all ranks, or those that were set.

        Args:
            source: Id of the real images, to be kept with the statistics; "" keeps the id they have.

        Raises:
            UserError: Fewer than 2 real images, or features that are not finite.
        """
        if self.given is not None:
            return replace(self.given, source=source or self.given.source)
        return self.statistics(self.real, "real", source)

    def statistics(self, sums: FeatureSums, word: str, source: str) -> FeatureStatistics:
        """Return mean and covariance of a set of all ranks.

        Raises:
            UserError: Fewer than 2 images, or features that are not finite.
        """
        products = sums.products.to(self.device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(products)
        count = int(products[0, 0])
        if count < 2:
            remedy = ", or set_reference(statistics)" if word == "real" else ""
            raise UserError(
                f"FrechetDistance saw {count} {word} image(s), it needs 2 or more (and many thousands to mean "
                f"anything): call update(image, real={word == 'real'}){remedy}"
            )
        if not products.isfinite().all():
            raise UserError(f"the features {self.features.name!r} of the {word} images contain NaN or infinity")
        mean = products[0, 1:] / count
        cov = (products[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1)
        return FeatureStatistics(mean, cov, count, source, str(self.features.name))


def check_images(image: Tensor, real: bool) -> None:
    """Refuse what is surely no image (B, 3, H, W) in [0, 1], but not what an overshooting decoder gives.

    Raises:
        UserError: As in ``FrechetDistance.update``.
    """
    if not image.is_floating_point():
        raise UserError(f"FrechetDistance takes float images in [0, 1], got {image.dtype}: divide uint8 by 255")
    if image.dim() != 4 or image.shape[1] != 3:
        raise UserError(f"FrechetDistance takes images of shape (B, 3, H, W), got {tuple(image.shape)}")
    if len(image) == 0:
        return
    # One wild pixel of a decoder is clamped like any overshoot; a whole batch beyond 2 is the range 0..255.
    low, high = (x.item() for x in image.aminmax())
    too_high = high > 2 and (real or image.mean(dtype=torch.float32).item() > 2)
    if low != low or too_high or (real and low < -0.5):
        raise UserError(
            f"FrechetDistance takes float images in [0, 1], got {'real' if real else 'generated'} images in "
            f"[{low:.4g}, {high:.4g}]: map -1..1 with (x + 1) / 2, divide 0..255 by 255; for NaN look at the decoder"
        )


def extract(network: Callable[[Tensor], T], image: Tensor) -> T:
    """Apply a feature network to images (B, 3, H, W) as PNG files would hold them, in float32 and without gradients."""
    pixels = image.float().clamp(0, 1).mul(255).round().div(255)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        return network(pixels)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians, never below 0.

    ``|mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))``. With ``cov = A A^T`` the last trace is the
    sum of the singular values of ``A1^T A2``. No matrix square root and no unsymmetric eigenvalues, whose error grows
    with the square root of the rounding error and which depend on the library when there are fewer images than
    features.

    Args:
        mean1: (D,) float64.
        cov1: (D, D) float64, symmetric, positive up to rounding.
        mean2: (D,) float64.
        cov2: (D, D) float64, as ``cov1``.

    Returns:
        Float64 scalar.

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
