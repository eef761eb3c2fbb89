"""All measures of a set of images in one pass over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check
from aligntok.metrics.collected import Collected, rank_and_number
from aligntok.metrics.feature_sets import inception_score, kernel_distance, monge_distance, precision_recall
from aligntok.metrics.frechet import FeatureSums, frechet_distance
from aligntok.metrics.inception import InceptionFeatures
from aligntok.metrics.protocol import FREE, Protocol, find_protocol
from aligntok.metrics.reference import AdmFile, Reference
from aligntok.networks.frozen import Frozen

T = TypeVar("T")
REFERENCE_SAMPLE = 10_000  # as many reference images as ADM's protocol has for precision and recall


class GenerationMetrics:
    """FID (or the Fréchet distance in other features) and, on request, sFID, IS, precision, recall, KID and MIND.

    Measures samples, or reconstructions, against real images or a reference from a file, with one pass of the feature
    network per image, in float32, of images as PNG files would hold them (clamped to [0, 1], rounded to 8 bits).
    Results do not depend on batch size or number of ranks. Every rank must call ``compute``, ``reference`` and
    ``load_reference``.

    Memory: the Fréchet distance keeps sums only. Score, precision, recall, KID and MIND keep the features of all
    samples, 8 KB each, and of 10,000 reference images (chosen by a hash of their ids); ``compute`` gathers all on every
    rank.

    >>> class Colour(nn.Module):
    ...     name, num_features = "colour", 3
    ...     def forward(self, image): return image.mean((2, 3))
    >>> metrics = GenerationMetrics(Colour(), kid=True)
    >>> for real in (True, False): metrics.update(torch.rand(20, 3, 8, 8), torch.arange(20), real=real)
    >>> list(metrics.compute())
    ['fd_colour', 'kid_colour']

    Args:
        features: Network from images (B, 3, H, W), float32 in [0, 1], to features (B, D), with the attributes
            ``name: str``, which is compared with that of a reference, and ``num_features: int``, D; Inception by
            default.
        sfid: Fréchet distance of Inception's spatial features.
        inception_score: Inception Score, in the order of the ids.
        precision_recall: Precision and recall with 3 neighbours.
        kid: Kernel distance.
        mind: Monge distance.
        protocol: Name of a protocol (see ``find_protocol``), or one; its conditions are checked.

    Attributes:
        names: Of the Fréchet distances: ``fid`` or ``fd_<features>``, and ``sfid``.
        conditions: One line on the conditions of the last ``compute``, to be printed and stored beside the numbers.

    Raises:
        UserError: A network without these attributes; sFID or score of other features than Inception's; no such
            protocol, or one of other features.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        sfid: bool = False,
        inception_score: bool = False,
        precision_recall: bool = False,
        kid: bool = False,
        mind: bool = False,
        protocol: str | Protocol | None = None,
    ) -> None:
        self.features: Any = features or InceptionFeatures()
        name, width = getattr(self.features, "name", None), getattr(self.features, "num_features", None)
        if not isinstance(name, str) or not isinstance(width, int):
            raise UserError(f"{type(features).__name__} needs attributes `name: str` and `num_features: int`")
        spatial_width = getattr(self.features, "num_spatial", 0)  # of Inception's alone
        if (sfid or inception_score) and not spatial_width:
            raise UserError(f"sFID and the Inception Score are of Inception's features, not of {name}: leave them out")
        self.network = Frozen(self.features)
        self.device = torch.device("cpu")
        self.protocol = find_protocol(protocol) if isinstance(protocol, str) else protocol or FREE
        several = f"protocol {self.protocol.name} takes several feature networks: store samples, and aligntok evaluate"
        check(self.protocol.judges is None, several)
        self.sfid, self.inception_score = sfid, inception_score
        self.precision_recall, self.kid, self.mind = precision_recall, kid, mind or self.protocol.measure == "mind"
        self.needs_sample = precision_recall or kid or self.mind  # of the reference's features
        wanted = self.protocol.features or name
        check(name == wanted, f"protocol {self.protocol.name} wants features {wanted!r}, these are {name!r}")
        self.names = ["fid" if name == "inception" else f"fd_{name}"] + ["sfid"] * sfid
        self.widths = [width, spatial_width] if sfid else [width]
        self.samples = Collected(width if inception_score or self.needs_sample else 0)
        self.real = Collected(width if self.needs_sample else 0, REFERENCE_SAMPLE)
        self.real_sums = [FeatureSums(width) for width in self.widths]
        self.image_size: tuple[int, int] | None = None
        self.given: Reference | None = None
        self.conditions = ""
        self.reset()

    def to(self, device: torch.device | str) -> GenerationMetrics:
        """Measure on this device."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def reset(self) -> None:
        """Forget the samples; keep the reference."""
        self.sums = [FeatureSums(width) for width in self.widths]
        self.samples.clear()

    def update(self, image: Tensor, id: Tensor | None = None, label: Tensor | None = None, real: bool = False) -> None:
        """Add images.

        Args:
            image: (B, 3, H, W), any float dtype, in [0, 1]; samples may overshoot, they are clamped. B may be 0.
            id: (B,) int64, a number of its own for each image of the set; by default in the order they come.
            label: Class of each image, (B,), for the printed line.
            real: Whether they belong to the reference.

        Raises:
            UserError: Images of another type, shape, size or range, features of another shape than (B,
                ``num_features``), or real images where a reference is given.
        """
        check_images(image, real)
        check(not (real and self.given), "real images are given, but a reference was set, which takes their place")
        if not len(image):
            return
        self.check_size((image.shape[-2], image.shape[-1]))
        features = extract(self.features.with_spatial, image) if self.sfid else (extract(self.network, image),)
        for sums, width, values in zip(self.real_sums if real else self.sums, self.widths, features, strict=True):
            expected = (len(image), width)
            check(
                values.shape == expected,
                f"features {self.features.name!r} have shape {tuple(values.shape)}, expected {expected}: correct"
                " `num_features` or flatten the output",
            )
            sums.add(values)
        (self.real if real else self.samples).add(id, label, features[0])

    def compute(self) -> dict[str, float]:
        """Return the measures of all ranks' samples: ``fid``, ``sfid``, ``is``, ``precision``, ``recall``, ``kid``, ...

        Where the features are not Inception's: ``fd_<features>``, ``precision_<features>``, ...

        Raises:
            UserError: Too few images, one id twice, or something that the protocol does not allow.
        """
        ids, labels, features = self.samples.gather(self.device)
        self.protocol.check_count(len(ids))
        reference, values = self.reference(), {}
        for name, sums, (mean, cov) in zip(self.names, self.sums, reference.moments, strict=False):
            _, *ours = sums.moments("generated", self.device)
            values[name] = frechet_distance(mean.to(self.device), cov.to(self.device), *ours).item()
        if self.inception_score:
            values["is"] = inception_score(self.features.logits(features))
        if reference.sample is not None:
            suffix = "" if self.features.name == "inception" else f"_{self.features.name}"
            sample = reference.sample.to(features)
            if self.precision_recall:
                values[f"precision{suffix}"], values[f"recall{suffix}"] = precision_recall(sample, features)
            if self.kid:
                values[f"kid{suffix}"] = kernel_distance(sample, features)
            if self.mind:
                values[f"mind{suffix}"] = monge_distance(sample, features)
        self.conditions = self.protocol.describe(self.image_size, labels, reference)
        return values

    def reference(self, source: str = "") -> Reference:
        """Return the reference that was set, or that of the real images of all ranks, whose id is ``source``.

        Raises:
            UserError: There are fewer than 2, or their features are not finite.
        """
        if self.given is not None:
            return self.given
        (count, mean, cov), *spatial = (sums.moments("real", self.device) for sums in self.real_sums)
        sample = self.real.gather(self.device)[2] if self.needs_sample else None
        reference = Reference(mean, cov, count, source, self.features.name, None, None, sample, self.image_size)
        if spatial:
            reference = replace(reference, spatial_mean=spatial[0][1], spatial_cov=spatial[0][2])
        self.protocol.check_reference(reference)
        return reference

    def set_reference(self, reference: Reference) -> None:
        """Compare with this from now on; real images given before are forgotten. Every rank must do so.

        Raises:
            UserError: It is of other features, another size or 1 image, lacks something, or is not the protocol's.
        """
        self.protocol.check_reference(reference)
        which, name = f"the reference ({reference.source or 'unnamed source'})", self.features.name
        check(
            reference.features == name and len(reference.mean) == self.widths[0],
            f"{which} is of features {reference.features!r} with {len(reference.mean)} dimensions, this metric uses "
            f"{name!r} with {self.widths[0]}: measure the reference with the same network",
        )
        check(reference.count != 1, f"{which} is of 1 image, a covariance needs 2 or more")
        widths = [len(mean) for mean, _ in reference.moments]
        check(self.widths[1:] in ([], widths[1:]), f"{which} has no statistics for sFID: measure it anew with sfid")
        check(
            reference.sample is not None or not self.needs_sample,
            f"{which} has no features for precision, recall, KID and MIND: measure it anew with them",
        )
        if reference.image_size is not None:
            self.check_size(reference.image_size)
        self.real.clear()
        self.given = reference

    def load_reference(self, path: str | Path, batch_size: int = 64) -> None:
        """Compare with a file: ``.safetensors`` that ``Reference.save`` wrote, or an ``.npz`` as ADM's evaluator takes.

        Of an ``.npz`` the stored statistics are used where the features are Inception's, or those that the file is
        called after; what is not stored is measured on its images, by all ranks together.

        Raises:
            UserError: No such file, another kind of file, or a reference that ``set_reference`` refuses.
        """
        suffix = Path(path).suffix
        kinds = ".npz (as ADM's) nor .safetensors (as Reference.save writes)"
        check(suffix in (".safetensors", ".npz"), f"reference {path} is neither {kinds}")
        self.set_reference(Reference.load(path) if suffix != ".npz" else self.read_adm(AdmFile(path), batch_size))

    def read_adm(self, file: AdmFile, batch_size: int) -> Reference:
        """Return the stored statistics, and of the images what is not stored."""
        source, reference, name = file.source, None, self.features.name
        if name in ("inception", file.path.stem) and "mu" in file.entries:
            spatial_mean, spatial_cov = file.statistics("_s") if self.sfid else (None, None)
            reference = Reference(*file.statistics(), 0, source, name, spatial_mean, spatial_cov)
        if reference is None or self.needs_sample:
            sfid = reference is None and self.sfid
            measured = GenerationMetrics(self.features, sfid, precision_recall=self.needs_sample).to(self.device)
            rank, ranks = rank_and_number()
            for number, image in enumerate(file.images(batch_size)):
                if number % ranks == rank:
                    ids = torch.arange(len(image)) + number * batch_size
                    measured.update(image.to(self.device), ids, real=True)
            found = measured.reference(source)
            reference = replace(reference, sample=found.sample) if reference else found
        return replace(reference, image_size=file.image_size)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise a ``UserError`` for a second size: the distance would be that of the resize."""
        first = self.image_size or size
        check(
            size == first,
            f"images of {size[0]}x{size[1]} pixels after images (or a reference) of {first[0]}x{first[1]}: samples and"
            " reference must have the same size",
        )
        self.image_size = size


def check_images(image: Tensor, real: bool) -> None:
    """Raise a ``UserError`` for what is no image (B, 3, H, W) in [0, 1], but let a decoder overshoot."""
    check(image.is_floating_point(), f"give float images in [0, 1], got {image.dtype}: divide uint8 by 255")
    check(image.dim() == 4 and image.shape[1] == 3, f"give images (B, 3, H, W), got {tuple(image.shape)}")
    if len(image) == 0:
        return
    # One outlier of a decoder is clamped like any overshoot; a batch with a mean beyond 2 is in 0..255.
    low, high = (x.item() for x in image.aminmax())
    too_high = high > 2 and (real or image.mean(dtype=torch.float32).item() > 2)
    check(
        low == low and not too_high and not (real and low < -0.5),
        f"give float images in [0, 1], got {'real' if real else 'generated'} images in [{low:.4g}, {high:.4g}]: map "
        "-1..1 with (x + 1) / 2, divide 0..255 by 255; for NaN look at the decoder",
    )


def extract(network: Callable[[Tensor], T], image: Tensor) -> T:
    """Apply a feature network to images (B, 3, H, W) as PNG files would hold them, in float32 and without gradients."""
    pixels = image.float().clamp(0, 1).mul(255).round().div(255)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        return network(pixels)
