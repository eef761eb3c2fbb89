"""Measures of reconstructions and latents, on the images of all ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from aligntok.callbacks.measurement import Measurement, Outputs, evaluation, on_first_rank, tokenizer_of
from aligntok.errors import check, check_nonnegative
from aligntok.losses.perceptual import LPIPS, VGG16_URL
from aligntok.metrics import GenerationMetrics, InceptionFeatures, Reference, knn_accuracy, linear_probe, rank_me
from aligntok.metrics.collected import Collected
from aligntok.networks.frozen import load_frozen
from aligntok.protocols import Batch, HasCalibration, HasFingerprint, labels_of, needed_data, offered_data
from aligntok.published import find_published


class ReconstructionQuality(Measurement):
    """PSNR (dB) and SSIM of 8-bit images, averaged over images, and LPIPS where its weights are on this machine.

    >>> ReconstructionQuality().needs  # logs val/psnr, val/ssim and val/lpips
    ('reconstruction',)
    """

    lpips: LPIPS | None = None

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Load LPIPS, or take the one that the loss has."""
        self.lpips = next((part for part in module.modules() if isinstance(part, LPIPS)), None)
        if self.lpips is None and on_first_rank(trainer, lambda: find_published(VGG16_URL) is not None):
            self.lpips = LPIPS()
        if self.lpips is not None:
            load_frozen(self.lpips)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin with empty metrics."""
        metrics: dict[str, Any] = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3)),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
        }
        if self.lpips is not None:
            metrics["lpips"] = MeanMetric()
        self.metrics = {name: metric.to(module.device) for name, metric in metrics.items()}

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Compare what PNG files would hold."""
        image, reconstruction = quantize(batch["image"]), quantize(outputs["reconstruction"])
        self.metrics["psnr"].update(reconstruction, image)
        self.metrics["ssim"].update(reconstruction, image)
        if self.lpips is not None:
            self.metrics["lpips"].update(self.lpips(reconstruction, image), weight=len(image))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return the means."""
        return {name: metric.compute() for name, metric in self.metrics.items()}


class ReconstructionFID(Measurement):
    """Fréchet distance of reconstructions: ``rfid``, or ``rfd_<feature>`` where the features are not Inception's.

    The statistics of the real images are measured once and kept in a file, with a hash of the images and their crop.

    >>> ReconstructionFID().metrics.names  # logs val/rfid
    ['fid']

    Args:
        features: Inception by default; or any module with ``name``, ``num_features`` and images in [0, 1] to (B, D).
        reference: File of the real images' statistics: read if it is there (a wrong source is an error), else
            written. By default a file in the run's folder that carries the hash in its name.
    """

    def __init__(self, features: nn.Module | None = None, reference: str | None = None) -> None:
        self.features = features or InceptionFeatures()
        self.metrics = GenerationMetrics(self.features)
        self.reference = reference
        self.measured_split = ""

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Load the feature network."""
        load_frozen(self.features)
        if self.reference is not None:
            remedy = "leave out `reference`: the images are then measured in each run"
            needed_data(trainer, HasFingerprint, "ReconstructionFID with a reference file", remedy)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the reference, once."""
        split = "test" if trainer.testing else "val"
        if split != self.measured_split:
            self.metrics = GenerationMetrics(self.features)
            self.find_reference(trainer, split)
            self.measured_split = "" if trainer.sanity_checking else split  # what that saw is forgotten
        self.metrics.to(module.device).reset()

    def find_reference(self, trainer: pl.Trainer, split: str) -> None:
        """Read the statistics of a split's images, if they were kept and are those of these images."""
        self.path: Path | None = None
        self.source = ""
        limit = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
        data = offered_data(trainer, HasFingerprint)
        if limit != 1.0 or data is None:
            return  # a subset of the images, or images that we know nothing of: nothing to keep
        self.source = data.fingerprint(split)
        name = f"{self.features.name}_{self.source}.safetensors"
        self.path = path = Path(self.reference or Path(trainer.default_root_dir) / "reference" / name)
        statistics = on_first_rank(trainer, lambda: Reference.load(path) if path.is_file() else None)
        if statistics is not None:
            check(
                statistics.source == self.source,
                f"reference {path} is of images {statistics.source}, these are {self.source}: other files or crop."
                " Name another reference file; it will be written",
            )
            self.metrics.set_reference(statistics)

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Add images and reconstructions."""
        if self.metrics.given is None:
            self.metrics.update(batch["image"], real=True)
        self.metrics.update(outputs["reconstruction"])

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return the distance; keep the reference if it is new."""
        if self.metrics.given is None:
            reference = self.metrics.reference(self.source)
            if self.path is not None and trainer.is_global_zero:
                reference.save(self.path)
            self.metrics.set_reference(reference)
        return {f"r{name}": value for name, value in self.metrics.compute().items()}


class LinearProbe(Measurement):
    """How much of the class frozen latents tell, and how many of their channels they use.

    ``probe`` and ``probe_pooled``: top-1 accuracy of a linear classifier on latents, flattened and averaged; ``knn``:
    of the nearest neighbours of flattened ones. They learn from the data module's calibration images (training images,
    centre crop) and are tested on the validation images; images of one class alone are not classified. ``rankme``: the
    effective rank of all cells of the validation images' latents, at most their number of channels. The protocols are
    in ``aligntok.metrics``: ``linear_probe``, ``knn_accuracy``, ``rank_me``; none has any randomness.

    >>> LinearProbe().needs  # logs val/probe, val/probe_pooled, val/knn, val/rankme
    ('latent',)

    Args:
        weight_decay: Of the classifier.
    """

    needs = ("latent",)

    def __init__(self, weight_decay: float = 1e-4) -> None:
        check_nonnegative(weight_decay=weight_decay)
        self.weight_decay = weight_decay

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the tokenizer and the training images."""
        self.tokenizer = tokenizer_of(module, "LinearProbe")
        self.data = needed_data(trainer, HasCalibration, "LinearProbe", "remove the callback")

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Encode the training images, where their latents are not cached."""
        width = math.prod(self.tokenizer.spec.latent_shape)
        self.train, self.test = Collected(width), Collected(width)
        with evaluation(trainer, module):
            for batch in self.data.calibration_dataloader():
                code = batch["latent"] if "latent" in batch else self.tokenizer.encode(batch["image"].to(module.device))
                self.train.add(batch["id"], labels_of(batch), self.tokenizer.latent(code.to(module.device)).flatten(1))
                if trainer.sanity_checking:
                    break

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Keep the latents of validation images."""
        self.test.add(batch["id"], labels_of(batch), outputs["latent"].flatten(1))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return all measures, the same on any number of ranks: images are ordered by their ids."""
        _, labels, latents = self.train.gather(module.device)
        _, test_labels, test_latents = self.test.gather(module.device)
        del self.train, self.test  # hundreds of MB
        grids = [x.view(len(x), *self.tokenizer.spec.latent_shape) for x in (latents, test_latents)]
        results = {"rankme": rank_me(grids[1].movedim(1, -1).flatten(0, -2))}
        if bool((labels == labels[0]).all()):
            return results
        results["knn"] = knn_accuracy(latents, labels, test_latents, test_labels)
        pooled = [grid.mean(dim=(2, 3)) for grid in grids]
        for name, (train, test) in {"probe": (latents, test_latents), "probe_pooled": pooled}.items():
            results[name] = linear_probe(train, labels, test, test_labels, weight_decay=self.weight_decay).accuracy
        return results


def quantize(image: Tensor) -> Tensor:
    """Round an image in [0, 1] to 8 bits, in fp32."""
    return image.float().clamp(0, 1).mul(255).round().div(255)
