"""Callbacks that measure reconstructions on every rank and log under ``val/`` or ``test/``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
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
from aligntok.metrics.collected import Collected
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import Batch, HasCalibration, HasFingerprint, needed_data, offered_data

Outputs = dict[str, Tensor]
T = TypeVar("T")


@contextmanager
def evaluation(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Run networks as Lightning runs a validation step: in eval mode, without gradients, in the trainer's precision."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        module.train(training)


def on_first_rank(trainer: pl.Trainer, function: Callable[[], T]) -> T:
    """Return on all ranks what a function returns on the first one: whether a file is there may differ between nodes.

    Raises:
        UserError: On all ranks, where the function raises one.
    """
    result: Any = None
    if trainer.is_global_zero:
        try:
            result = function()
        except UserError as error:
            result = error
    result = trainer.strategy.broadcast(result)
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[no-any-return]


def tokenizer_of(module: pl.LightningModule, who: str) -> Tokenizer:
    """Return the tokenizer of a stage.

    Raises:
        UserError: It has none.
    """
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{who} needs a stage with a tokenizer, {type(module).__name__} has none: remove the callback")
    return tokenizer


class Measurement(pl.Callback):
    """Base: ``prepare`` before the run, then the same three moments in validation and test, not in the sanity check.

    The values of ``finish`` are logged as ``val/<name>`` or ``test/<name>``; they must be the same on all ranks.
    """

    needs: tuple[str, ...] = ("reconstruction",)
    """What the module's ``validation_step`` must return: ``reconstruction`` (B, 3, H, W) in [0, 1], ``latent`` (B, C,
    h, w), ``tokens`` (B, N)."""

    started = False

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the first step: refuse what cannot be measured, and load what will be needed."""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the first batch; averaged weights are in place."""

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """After each batch that has images."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """After the last batch: return what to log."""
        return {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare, where something will be measured."""
        if stage in ("validate", "test") or (stage == "fit" and trainer.limit_val_batches):
            self.prepare(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start at the first batch: only then have all callbacks swapped in what they average."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self.started = True
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
        """Pass on what is measured."""
        if trainer.sanity_checking or not self.needs:
            return
        lacking = [name for name in self.needs if not isinstance(outputs, dict) or name not in outputs]
        if lacking:
            raise UserError(
                f"{type(self).__name__}: validation_step of {type(pl_module).__name__} returns no"
                f" {' and no '.join(lacking)}: return it in a dict, or remove the callback"
            )
        if len(batch["image"]):
            self.update(batch, outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        if not self.started:
            return
        self.started = False
        prefix = "test" if trainer.testing else "val"
        values = {
            f"{prefix}/{name}": torch.as_tensor(value, dtype=torch.float32, device=pl_module.device)
            for name, value in self.finish(trainer, pl_module).items()
        }
        pl_module.log_dict(values, sync_dist=True)  # the mean of equal values: without it, Lightning warns

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

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Load LPIPS, or take the one that the loss has."""
        self.lpips = next((part for part in module.modules() if isinstance(part, LPIPS)), None)
        if self.lpips is None and on_first_rank(trainer, lambda: lpips_weights() is not None):
            self.lpips = LPIPS()
        if self.lpips is not None:
            self.lpips.load()

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the metrics anew."""
        self.metrics = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3)).to(module.device),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0).to(module.device),
        }
        if self.lpips is not None:
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

    The statistics of the real images are measured once and kept in a file, with a hash of the images and their crop.

    Args:
        features: Inception by default; or any module with ``name``, ``num_features`` and images in [0, 1] to (B, D).
        reference: File of the real images' statistics: read if it is there (a wrong source is an error), else
            written. By default a file in the run's folder that carries the hash in its name.
    """

    def __init__(self, features: nn.Module | None = None, reference: str | None = None) -> None:
        self.metric = FrechetDistance(features or InceptionFeatures(), reset_real_features=False)
        self.reference = reference
        self.measured_split = ""
        self.path: Path | None = None
        self.source = ""

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Load the feature network."""
        self.metric.load()
        if self.reference is not None:
            remedy = "leave out `reference`: the images are then measured in each run"
            needed_data(trainer, HasFingerprint, "ReconstructionFID with a reference file", remedy)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the reference, once."""
        split = "test" if trainer.testing else "val"
        if split != self.measured_split:
            self.metric.forget()
            self.find_reference(trainer, split)
        self.metric.to(module.device)
        self.metric.reset()
        self.measured_split = split

    def find_reference(self, trainer: pl.Trainer, split: str) -> None:
        """Read the statistics of a split's images, if they were kept and are those of these images."""
        self.path, self.source = None, ""
        limit = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
        data = offered_data(trainer, HasFingerprint)
        if limit != 1.0 or data is None:
            return  # a part of the images, or images that we know nothing of: nothing to keep
        self.source = data.fingerprint(split)
        name = f"{self.metric.features.name}_{self.source}.safetensors"
        path = Path(self.reference or Path(trainer.default_root_dir) / "reference" / name)
        self.path = path
        statistics = on_first_rank(trainer, lambda: FeatureStatistics.load(path) if path.is_file() else None)
        if statistics is None:
            return
        if statistics.source != self.source:
            raise UserError(
                f"reference {path} is of images {statistics.source}, these are {self.source}: other files or crop."
                " Name another reference file; it will be written"
            )
        self.metric.set_reference(statistics)

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Add images and reconstructions."""
        if self.metric.given is None:
            self.metric.update(batch["image"], real=True)
        self.metric.update(outputs["reconstruction"], real=False)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return the distance; keep the reference if it is new."""
        if self.metric.given is None:
            statistics = self.metric.reference(self.source)
            if self.path is not None and trainer.is_global_zero:
                statistics.save(self.path)
            self.metric.set_reference(statistics)
        return {f"r{self.metric.metric_name}": self.metric.compute()}


class LinearProbe(Measurement):
    """Top-1 accuracy of a linear classifier on frozen latents, flattened (``probe``) and averaged (``probe_pooled``).

    Trained on the data module's calibration images (training images, centre crop), tested on the validation images. The
    protocol is in ``aligntok.metrics.linear_probe``; it has no randomness. Images of one class alone are not measured.

    Args:
        weight_decay: Of the classifier.
    """

    needs = ("latent",)

    def __init__(self, weight_decay: float = 1e-4) -> None:
        self.weight_decay = weight_decay

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the tokenizer and the training images."""
        tokenizer_of(module, "LinearProbe")
        needed_data(trainer, HasCalibration, "LinearProbe", "remove the callback")

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Encode the training images, where their latents are not cached."""
        tokenizer = tokenizer_of(module, "LinearProbe")
        data = needed_data(trainer, HasCalibration, "LinearProbe", "remove the callback")
        self.shape = tokenizer.spec.latent_shape
        self.train, self.test = (Collected(math.prod(self.shape)) for _ in range(2))
        with evaluation(trainer, module):
            for batch in data.calibration_dataloader():
                code = batch["latent"] if "latent" in batch else tokenizer.encode(batch["image"].to(module.device))
                self.train.add(batch["id"], batch["label"], tokenizer.latent(code.to(module.device)).flatten(1))

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Keep the latents of validation images."""
        self.test.add(batch["id"], batch["label"], outputs["latent"].flatten(1))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return both accuracies, the same on any number of ranks: images are ordered by their ids."""
        (_, labels, latents), (_, test_labels, test_latents) = (
            x.gather(module.device) for x in (self.train, self.test)
        )
        del self.train, self.test  # hundreds of MB
        if bool((labels == labels[0]).all()):
            return {}
        latents, test_latents = (x.view(len(x), *self.shape) for x in (latents, test_latents))  # (N, C, h, w)
        results = {}
        for name, view in (("probe", flatten_latent), ("probe_pooled", pool_latent)):
            result = linear_probe(
                view(latents), labels, view(test_latents), test_labels, weight_decay=self.weight_decay
            )
            results[name] = result.accuracy
        return results


def quantize(image: Tensor) -> Tensor:
    """Round an image in [0, 1] to 8 bits, in fp32."""
    return image.float().clamp(0, 1).mul(255).round().div(255)
