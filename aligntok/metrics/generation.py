"""All measures of generated images in one pass over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.metrics.collected import Collected
from aligntok.metrics.feature_sets import inception_score, kernel_distance, precision_recall
from aligntok.metrics.frechet import FrechetDistance, check_images, extract
from aligntok.metrics.inception import InceptionFeatures, SpatialFeatures
from aligntok.metrics.protocol import FREE, Protocol, find_protocol
from aligntok.metrics.reference import AdmFile, FeatureStatistics, Reference

REFERENCE_SAMPLE = 10_000  # as many reference images as ADM's protocol has for precision and recall


class GenerationMetrics:
    """FID (or the Fréchet distance in other features) and, on request, sFID, IS, precision, recall and KID.

    One pass of the feature network per image. Every image is counted once, by its id; results do not depend on batch
    size or number of ranks. On several ranks every rank must call ``compute``, ``reference`` and ``load_reference``.

    Memory: the Fréchet distance keeps sums only. Score, precision, recall and KID keep the features of all samples,
    8 KB each, and of 10,000 reference images (chosen by a hash of their ids); ``compute`` gathers all on every rank.

    >>> class Colour(nn.Module):
    ...     name, num_features = "colour", 3
    ...     def forward(self, image): return image.mean((2, 3))
    >>> metrics = GenerationMetrics(Colour(), kid=True)
    >>> for real in (True, False): metrics.update(torch.rand(20, 3, 8, 8), torch.arange(20), real=real)
    >>> list(metrics.compute())
    ['fd_colour', 'kid_colour']

    Args:
        features: Feature network as ``FrechetDistance`` takes it; Inception by default.
        sfid: Fréchet distance of Inception's spatial features.
        inception_score: Inception Score, in the order of the ids.
        precision_recall: Precision and recall with 3 neighbours.
        kid: Kernel distance.
        protocol: Name of a protocol (see ``find_protocol``), or one; its conditions are checked.

    Raises:
        UserError: sFID or score of features that are not Inception's; no such protocol, or one of other features.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        sfid: bool = False,
        inception_score: bool = False,
        precision_recall: bool = False,
        kid: bool = False,
        protocol: str | Protocol | None = None,
    ) -> None:
        self.frechet = FrechetDistance(features or InceptionFeatures())
        network: Any = self.frechet.features
        if (sfid or inception_score) and not hasattr(network, "with_spatial"):
            raise UserError(
                f"sFID and the Inception Score are of Inception's features, not of {network.name}: leave them out"
            )
        self.spatial = FrechetDistance(SpatialFeatures(network)) if sfid else None
        self.distances = [self.frechet] if self.spatial is None else [self.frechet, self.spatial]
        self.inception_score, self.precision_recall, self.kid = inception_score, precision_recall, kid
        self.protocol = find_protocol(protocol) if isinstance(protocol, str) else protocol or FREE
        if self.protocol.features not in (None, network.name):
            raise UserError(
                f"protocol {self.protocol.name} wants features {self.protocol.features!r}, these are {network.name!r}"
            )
        width = network.num_features
        self.samples = Collected(width if inception_score or precision_recall or kid else 0)
        self.real = Collected(width if precision_recall or kid else 0, REFERENCE_SAMPLE)
        self.image_size: tuple[int, int] | None = None
        self.given: Reference | None = None
        self.line = ""

    def to(self, device: torch.device | str) -> GenerationMetrics:
        """Measure on this device."""
        for metric in self.distances:
            metric.to(device)
        return self

    def reset(self) -> None:
        """Forget the samples; keep the reference."""
        for metric in self.distances:
            metric.reset()
        self.samples.clear()

    def update(self, image: Tensor, id: Tensor, label: Tensor | None = None, real: bool = False) -> None:
        """Add images.

        Args:
            image: (B, 3, H, W), any float dtype, in [0, 1]; B may be 0.
            id: (B,) int64, a number of its own for each image of the set.
            label: Class of each image, (B,), for the printed line.
            real: Whether they belong to the reference.

        Raises:
            UserError: Images of two sizes, or what ``FrechetDistance.update`` refuses.
        """
        check_images(image, real)
        if not len(image):
            return
        self.check_size((image.shape[-2], image.shape[-1]))
        if self.spatial is None:
            features = extract(self.frechet.network, image)
        else:
            features, spatial = extract(self.frechet.features.with_spatial, image)
            self.spatial.update(image, real, spatial)
        self.frechet.update(image, real, features)
        (self.real if real else self.samples).add(id, label, features)

    def compute(self) -> dict[str, float]:
        """Return all measures of the samples of all ranks by name: ``fid``, ``sfid``, ``is``, ``precision``, ...

        Where the features are not Inception's: ``fd_<features>``, ``precision_<features>``, ``recall_<features>``,
        ``kid_<features>``.

        Raises:
            UserError: Too few images, one id twice, or something that the protocol does not allow.
        """
        ids, labels, features = self.samples.gather(self.frechet.device)
        self.protocol.check_count(len(ids))
        reference, network = self.given or self.reference(), self.frechet.features
        suffix = "" if network.name == "inception" else f"_{network.name}"
        values = {metric.metric_name: metric.compute().item() for metric in self.distances}
        if self.inception_score:
            values["is"] = inception_score(network.logits(features))
        if self.real.width:
            assert reference.sample is not None  # checked in set_reference
            sample = reference.sample.to(features)
            if self.precision_recall:
                values[f"precision{suffix}"], values[f"recall{suffix}"] = precision_recall(sample, features)
            if self.kid:
                values[f"kid{suffix}"] = kernel_distance(sample, features)
        self.line = self.protocol.describe(len(ids), self.image_size, labels, reference)
        return values

    def describe(self) -> str:
        """Return one line on the conditions of the last ``compute``, to be printed and stored beside the numbers."""
        return self.line

    def reference(self, source: str = "") -> Reference:
        """Return the reference: the one that was set, or the measured real images of all ranks.

        Args:
            source: Id of the real images, to be kept in the file.

        Raises:
            UserError: There are fewer than 2.
        """
        if self.given is not None:
            return self.given
        sample = self.real.gather(self.frechet.device)[2] if self.real.width else None
        spatial = None if self.spatial is None else self.spatial.reference(source)
        statistics = vars(self.frechet.reference(source))
        reference = Reference(**statistics, spatial=spatial, sample=sample, image_size=self.image_size)
        self.protocol.check_reference(reference)
        return reference

    def set_reference(self, reference: FeatureStatistics) -> None:
        """Compare with this from now on; real images given before are forgotten. Every rank must do so.

        Raises:
            UserError: It is of other features or images of another size, lacks what the measures need, or is not the
                protocol's.
        """
        if not isinstance(reference, Reference):
            reference = Reference(**vars(reference))
        origin = reference.source or "unnamed source"
        self.protocol.check_reference(reference)
        if self.spatial is not None:
            if reference.spatial is None:
                raise UserError(f"the reference ({origin}) has no statistics for sFID: measure it anew with sfid")
            self.spatial.set_reference(reference.spatial)
        if self.real.width and reference.sample is None:
            raise UserError(
                f"the reference ({origin}) has no features for precision, recall and KID: measure it anew with them"
            )
        self.frechet.set_reference(reference)
        if reference.image_size is not None:
            self.check_size(reference.image_size)
        self.real.clear()
        self.given = reference

    def load_reference(self, path: str | Path, batch_size: int = 64) -> None:
        """Compare with a file: ``.safetensors`` that ``Reference.save`` wrote, or an ``.npz`` as ADM's evaluator takes.

        Of an ``.npz`` the stored statistics are used where the features are Inception's, and its images where features
        are wanted, or other statistics; the ranks share this work.

        Raises:
            UserError: No such file, another kind of file, or a reference that ``set_reference`` refuses.
        """
        suffix = Path(path).suffix
        if suffix not in (".safetensors", ".npz"):
            raise UserError(f"reference {path} is neither .npz (as ADM's) nor .safetensors (as Reference.save writes)")
        self.set_reference(Reference.load(path) if suffix != ".npz" else self.read_adm(AdmFile(path), batch_size))

    def read_adm(self, file: AdmFile, batch_size: int) -> Reference:
        """Return the stored statistics, and of the images what is not stored."""
        source, reference = file.source, None
        if self.frechet.features.name == "inception" and "mu" in file.entries:
            spatial = file.statistics("inception_spatial", "_s", source) if self.spatial is not None else None
            reference = Reference(**vars(file.statistics("inception", source=source)), spatial=spatial)
        if reference is None or self.real.width:
            sfid = reference is None and self.spatial is not None
            measured = GenerationMetrics(self.frechet.features, sfid=sfid, precision_recall=self.real.width > 0)
            measured.to(self.frechet.device)
            rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            for number, image in enumerate(file.images(batch_size)):
                if number % ranks == rank:
                    ids = torch.arange(len(image)) + number * batch_size
                    measured.update(image.to(self.frechet.device), ids, real=True)
            found = measured.reference(source)
            reference = replace(reference, sample=found.sample) if reference else found
        return replace(reference, image_size=file.image_size)

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images of two sizes: the Fréchet distance between them would measure the resize."""
        if self.image_size not in (None, size):
            raise UserError(
                f"images of {size[0]}x{size[1]} pixels after images (or a reference) of "
                f"{self.image_size[0]}x{self.image_size[1]}: samples and reference must have the same size"
            )
        self.image_size = size
