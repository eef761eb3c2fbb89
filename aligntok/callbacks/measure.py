"""Callbacks that measure reconstructions on every rank and log under ``val/`` or ``test/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from aligntok.errors import UserError
from aligntok.losses.perceptual import LPIPS, lpips_weights
from aligntok.metrics import (
    FeatureStatistics,
    FrechetDistance,
    InceptionFeatures,
    flatten_latent,
    linear_probe,
    pool_latent,
)

Batch = dict[str, Any]
Outputs = dict[str, Tensor]


class Measurement(pl.Callback):
    """Base: the same three moments in validation and test, never in Lightning's sanity check.

    The module's ``validation_step`` returns a dict with ``reconstruction`` (B, 3, H, W) in [0, 1] and ``latent`` (B,
    C, h, w); a module that returns something else is not measured.
    """

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the first batch; averaged weights are in place."""

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """After each batch."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """After the last batch: return what to log."""
        return {}

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start at the first batch: only then have all callbacks swapped in what they average."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self.seen = False
            self.start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pass on what can be measured."""
        if trainer.sanity_checking or not isinstance(outputs, dict) or "reconstruction" not in outputs:
            return
        self.seen = True
        if len(batch["image"]):
            self.update(batch, outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        if trainer.sanity_checking or not getattr(self, "seen", False):
            return
        prefix = "test" if trainer.testing else "val"
        values = self.finish(trainer, pl_module)
        pl_module.log_dict({f"{prefix}/{name}": torch.as_tensor(v, dtype=torch.float32) for name, v in values.items()})

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """As in validation."""
        self.on_validation_batch_start(*args, **kwargs)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """As in validation."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_test_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """As in validation."""
        self.on_validation_epoch_end(*args, **kwargs)


class ReconstructionQuality(Measurement):
    """PSNR (dB) and SSIM of 8-bit images, averaged over images, and LPIPS where its weights are on this machine."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.lpips: LPIPS | None = None

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the metrics anew."""
        self.metrics = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3)).to(module.device),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0).to(module.device),
        }
        if lpips_weights() is not None:
            from torchmetrics import MeanMetric

            self.lpips = self.lpips or LPIPS()
            self.metrics["lpips"] = MeanMetric().to(module.device)

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Compare what PNG files would hold."""
        image, reconstruction = quantize(batch["image"]), quantize(outputs["reconstruction"])
        for name in ("psnr", "ssim"):
            self.metrics[name].update(reconstruction, image)
        if self.lpips is not None:
            self.metrics["lpips"].update(self.lpips(reconstruction, image), weight=len(image))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return the means."""
        return {name: metric.compute() for name, metric in self.metrics.items()}


class ReconstructionFID(Measurement):
    """Fréchet distance of reconstructions: ``rfid``, or ``rfd_<feature>`` where the features are not Inception's.

    The statistics of the real images are computed once and kept in a file, with a hash of the images and their crop.

    Args:
        features: Inception by default; or any module with ``name``, ``num_features`` and images in [0, 1] to (B, D).
        reference: File of the real images' statistics: read if it is there (a wrong source is an error), else
            written. By default a file in the run's folder that carries the hash in its name.
    """

    def __init__(self, features: nn.Module | None = None, reference: str | None = None) -> None:
        self.metric = FrechetDistance(features or InceptionFeatures(), reset_real_features=False)
        self.reference = reference
        self.has_reference = False
        self.path: Path | None = None
        self.source = ""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the reference, once."""
        self.metric.to(module.device)
        self.metric.reset()
        if self.has_reference:
            return
        split = "test" if trainer.testing else "val"
        limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
        data: Any = getattr(trainer, "datamodule", None)
        if limit != 1.0 or not hasattr(data, "fingerprint"):
            return  # a part of the images, or images that we know nothing of: nothing to keep
        self.source = data.fingerprint(split)
        default = (
            Path(trainer.default_root_dir) / "reference" / f"{self.metric.features.name}_{self.source}.safetensors"
        )
        self.path = Path(self.reference) if self.reference else default
        if not self.path.is_file():
            return
        statistics = FeatureStatistics.load(self.path)
        if statistics.source != self.source:
            raise UserError(
                f"reference {self.path} is of images {statistics.source}, these are {self.source}: other files or crop."
                " Name another reference file; it will be written"
            )
        self.metric.set_reference(statistics)
        self.has_reference = True

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Add images and reconstructions."""
        if not self.has_reference:
            self.metric.update(batch["image"], real=True)
        self.metric.update(outputs["reconstruction"], real=False)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return the distance; keep the reference if it is new."""
        value = self.metric.compute()
        if not self.has_reference:
            statistics = self.metric.reference(self.source)
            if self.path is not None and trainer.is_global_zero:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                statistics.save(self.path)
            self.metric.set_reference(statistics)
            self.has_reference = True
        return {f"r{self.metric.metric_name}": value}


class LinearProbe(Measurement):
    """Top-1 accuracy of a linear classifier on frozen latents, flattened (``probe``) and averaged (``probe_pooled``).

    Trained on the data module's calibration images (training images, centre crop), tested on the validation images. The
    protocol is in ``aligntok.metrics.linear_probe``; it has no randomness.

    Args:
        weight_decay: Of the classifier.
    """

    def __init__(self, weight_decay: float = 1e-4) -> None:
        self.weight_decay = weight_decay

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Encode the training images, where their latents are not cached."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "calibration_dataloader"):
            raise UserError(
                "LinearProbe needs training images: use aligntok's LatentDataModule, or remove the callback"
            )
        tokenizer: Any = getattr(module, "tokenizer", None)
        self.train: list[tuple[Tensor, ...]] = []
        self.test: list[tuple[Tensor, ...]] = []
        if tokenizer is None:
            return
        for batch in data.calibration_dataloader():
            cached = batch.get("latent")
            code = tokenizer.encode(batch["image"].to(module.device)) if cached is None else cached
            latent = tokenizer.latent(code)
            self.train.append((latent.float(), batch["label"], batch["id"]))

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Keep a validation latent."""
        self.test.append((outputs["latent"].float(), batch["label"], batch["id"]))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return both accuracies."""
        latents, labels = gather(self.train, module)
        test_latents, test_labels = gather(self.test, module)
        if bool((labels == labels[0]).all()):
            return {}
        results = {}
        for name, view in (("probe", flatten_latent), ("probe_pooled", pool_latent)):
            result = linear_probe(
                view(latents), labels, view(test_latents), test_labels, weight_decay=self.weight_decay
            )
            results[name] = result.accuracy
        return results


def gather(parts: list[tuple[Tensor, ...]], module: pl.LightningModule) -> tuple[Tensor, Tensor]:
    """Return latents and labels of all ranks, ordered by image id, so that the number of ranks changes nothing."""
    latents, labels, ids = (torch.cat(column).to(module.device) for column in zip(*parts, strict=True))
    if module.trainer.world_size > 1:
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (latents.cpu(), labels.cpu(), ids.cpu()))
        latents, labels, ids = (torch.cat(column).to(module.device) for column in zip(*everyone, strict=True))
    order = ids.argsort()
    return latents[order], labels[order]


def quantize(image: Tensor) -> Tensor:
    """Round an image in [0, 1] to 8 bits, in fp32."""
    return image.float().clamp(0, 1).mul(255).round().div(255)
