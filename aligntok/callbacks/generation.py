"""Measures of a generator's samples while it trains and in ``aligntok validate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from aligntok.callbacks.measurement import Measurement, evaluation, on_first_rank
from aligntok.errors import UserError, check, check_positive
from aligntok.flow import FixedSteps, Sampler
from aligntok.metrics import GenerationMetrics, Reference
from aligntok.networks.frozen import Frozen, load_frozen
from aligntok.progress import Progress
from aligntok.protocols import HasReferenceImages, labels_of, needed_data


class GenerationQuality(Measurement):
    """gFID (``gfid``, or ``gfd_<features>``) and its companions on samples of the generator, drawn at every validation.

    Sample i has the label i modulo the number of classes (0 without classes) and the randomness of id i: every
    validation, batch size and number of ranks measures the same set.

    >>> quality = GenerationQuality(GenerationMetrics(), num_samples=5000)  # logs val/gfid
    >>> quality.values, quality.conditions  # of the last validation
    ({}, '')

    Args:
        metrics: What is measured, in which features, under which protocol.
        num_samples: Over all ranks.
        batch_size: Samples of a batch on one device.
        reference: What samples are compared with: a file (``.npz`` of ADM, or ``.safetensors``), or images, cropped as
            in evaluation and measured once; by default the training images, where the data has them.
        classifier: Image (B, 3, H, W) in [0, 1] to class logits; its agreement with the asked labels becomes
            ``val/class_agreement``.
        sweep: Numbers of sampling steps that ``aligntok validate`` measures too, under ``..._steps<n>``; of a diffusion
            generator.
    """

    needs = ()  # it measures what it draws itself

    def __init__(
        self,
        metrics: GenerationMetrics,
        num_samples: int = 1000,
        batch_size: int = 64,
        reference: Dataset | str | None = None,  # type: ignore[type-arg]
        classifier: nn.Module | None = None,
        sweep: list[int] | None = None,
    ) -> None:
        words = f"GenerationQuality: num_samples {num_samples}, batch_size {batch_size}: give at least 2 and 1"
        check(num_samples >= 2 and batch_size >= 1, words)
        check_positive(**{"least number of steps in sweep": min(sweep or [1])})
        self.metrics, self.num_samples, self.batch_size = metrics, num_samples, batch_size
        self.reference = reference
        self.classifier = None if classifier is None else Frozen(classifier)
        self.sweep = list(sweep or [])
        self.values: dict[str, float] = {}
        self.conditions = ""

    def prepare(self, trainer: pl.Trainer, module: Any) -> None:
        """Refuse what cannot be measured, before the first step."""
        is_generator = getattr(module, "tokenizer", None) is not None and hasattr(module, "sample")
        check(is_generator, "GenerationQuality needs a generator with a tokenizer, which decodes its samples")
        if self.classifier is not None and module.network.num_classes is None:
            raise UserError("GenerationQuality.classifier: the network has no classes to agree with, leave it out")
        if self.sweep and not isinstance(module.sampler, FixedSteps):
            raise UserError("GenerationQuality.sweep needs a sampler with num_steps, such as aligntok.flow.Euler")
        self.metrics.protocol.check_count(self.num_samples)
        if isinstance(self.reference, str):
            words = f"there is no reference {self.reference}: see docs/generators.md on evaluation"
            check(Path(self.reference).is_file(), words)
        else:
            remedy = "name a file as its `reference`"
            self.data = needed_data(trainer, HasReferenceImages, "GenerationQuality", remedy)
        load_frozen(self.metrics.network)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read or measure the reference now: a wrong one should not stop the run at its first validation."""
        if trainer.limit_val_batches:
            self.find_reference(trainer, pl_module)

    def start(self, trainer: pl.Trainer, module: Any) -> None:
        """Draw and measure, while the averaged weights are in the module."""
        self.find_reference(trainer, module)
        if self.classifier is not None:
            self.classifier.to(module.device)
        sampler = module.sampler
        self.values = self.measure(trainer, module, sampler)
        if trainer.sanity_checking:
            return
        self.conditions = f"{self.metrics.conditions}; {', '.join(map(setting, module.sampling().values()))}"
        if trainer.is_global_zero:
            print(f"  {self.conditions}", flush=True)
        for num_steps in [] if trainer.state.fn == "fit" else self.sweep:
            values = self.measure(trainer, module, type(sampler)(num_steps, sampler.shift))
            self.values |= {f"{name}_steps{num_steps}": value for name, value in values.items()}

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return what was measured."""
        return self.values

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, module: Any, sampler: Sampler) -> dict[str, float]:
        """Return all measures of the samples that ``sampler`` draws; the sanity check tries one batch, for nothing."""
        self.metrics.reset()
        agreed = torch.zeros(2, device=module.device)
        for ids, label, image in self.samples(trainer, module, sampler):
            self.metrics.update(image, ids, label)
            if self.classifier is not None:
                agreed[0] += (self.classifier(image).argmax(-1) == label).sum()
                agreed[1] += len(label)
            if trainer.sanity_checking:
                return {}
        values = {f"g{name}" if name[0] == "f" else name: value for name, value in self.metrics.compute().items()}
        if self.classifier is not None:
            agreed = trainer.strategy.reduce(agreed, reduce_op="sum")
            values["class_agreement"] = float(agreed[0] / agreed[1])
        return values

    def samples(self, trainer: pl.Trainer, module: Any, sampler: Sampler) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's ids (B,), labels (B,) and images (B, 3, H, W), and say how far it is."""
        mine = torch.arange(self.num_samples)[trainer.global_rank :: trainer.world_size].to(module.device)
        silent = trainer.sanity_checking or not trainer.is_global_zero
        progress = Progress("samples", self.num_samples, trainer.world_size, silent=silent)
        for ids in torch.split(mine, self.batch_size):
            label = ids % (module.network.num_classes or 1)
            with evaluation(trainer, module):
                image = module.tokenizer.decode(module.sample(ids, label, sampler)).float()
            yield ids, label, image
            progress.add(len(ids))

    def find_reference(self, trainer: pl.Trainer, module: Any) -> None:
        """Read the reference from its file, or measure it and keep it in the run's folder; once."""
        self.metrics.to(module.device)
        if self.metrics.given is not None:
            return
        image_size = module.tokenizer.spec.image_size
        self.metrics.check_size(image_size)
        if isinstance(self.reference, str):
            self.metrics.load_reference(self.reference)
            return
        source, batches = self.data.reference_images(self.reference, image_size)
        parts = {"_sample": self.metrics.needs_sample, "_spatial": self.metrics.sfid}
        suffix = "".join(part for part, wanted in parts.items() if wanted)
        name = f"{self.metrics.features.name}_{source}{suffix}.safetensors"
        path = Path(trainer.default_root_dir) / "reference" / name
        reference = on_first_rank(trainer, lambda: Reference.load(path) if path.is_file() else None)
        if reference is None:
            for batch in batches:
                self.metrics.update(batch["image"].to(module.device), batch["id"], labels_of(batch), real=True)
            reference = self.metrics.reference(source)
            if trainer.is_global_zero:
                reference.save(path)
        self.metrics.set_reference(reference)


def setting(part: object) -> str:
    """Return a class and its plain values; what begins with an underscore is no setting."""
    numbers = {key: value for key, value in vars(part).items() if not isinstance(value, list) and key[0] != "_"}
    return f"{type(part).__name__}({', '.join(f'{key}={value}' for key, value in numbers.items())})"
