"""What the tokenizer stages share: frozen parts, the reconstruction losses and the adversarial step.

The step: ONE optimizer with a group for the generator and one for the discriminator, under automatic optimisation. The
reconstruction is cut off from the decoder; the gradients of the reconstruction terms and of the adversarial term at
the cut are taken once each. Through the decoder's last layer they give the adaptive weight, and their weighted sum is
what goes on into the decoder. The same discriminator pass serves its own loss. One backward, one step: accumulation,
mixed precision, clipping, DDP without unused parameters, and one honest ``global_step`` come from Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.losses import AdversarialLoss
from aligntok.networks.adapters import GaussianAdapter
from aligntok.networks.tokenizer import Tokenizer
from aligntok.schedule import Schedule, check_schedule, value_at
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import load_strictly, tokenizer_state

PARTS = ("encoder", "adapter", "decoder")
Terms = dict[str, tuple[float, Tensor]]  # the loss: name to weight and value ()


class TokenizerStage(Stage):
    """Trains some parts of a tokenizer to reconstruct images; a stage says which, and adds its terms.

    Batches are dicts with ``image`` (B, 3, H, W) in [0, 1]; with a cached ``latent`` (B, C, h, w) beside it, the
    encoder does not run. The loss is
    ``L1 + perceptual_weight * perceptual + adversarial.weight * adaptive weight * adversarial`` (AlignTok, section 3;
    weights as in VA-VAE), each a mean over pixels or images, plus the stage's own terms.

    Args:
        tokenizer: Encoder, adapter, decoder.
        learning_rate: Of the tokenizer, over the optimizer steps.
        perceptual: Distance of two images (B, 3, H, W) in [0, 1] as a scalar, e.g. ``LPIPS`` or ``FeatureDistance``.
        perceptual_weight: Over the steps.
        adversarial: Discriminator and its weight, or null for none.
        discriminator_learning_rate: By default the tokenizer's.
        kl_weight: Of the KL divergence, averaged over the image's pixels; needs a ``GaussianAdapter``. For the
            ablation.
        optimizer: Built with both groups.
        max_nonfinite_steps: So many steps in a row with a gradient that is not finite stop the run.
    """

    trains: tuple[str, ...] = PARTS
    """Which parts of the tokenizer learn; the others stay in eval mode, bit for bit."""

    measures_latents = False
    """Whether the stage measures the latents of the tokenizer that it is given, before its first step."""

    keeps_statistics = False
    """Whether the tokenizer came with statistics that hold, because only its decoder has learned since."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        learning_rate: Schedule = 1e-4,
        perceptual: nn.Module | None = None,
        perceptual_weight: Schedule = 1.0,
        adversarial: AdversarialLoss | None = None,
        discriminator_learning_rate: Schedule | None = None,
        kl_weight: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        max_nonfinite_steps: int = 10,
    ) -> None:
        super().__init__(learning_rate, optimizer, max_nonfinite_steps)
        self.tokenizer = tokenizer
        self.perceptual: Any = perceptual
        self.perceptual_weight = check_schedule("perceptual_weight", perceptual_weight)
        self.adversarial = adversarial
        if discriminator_learning_rate is not None and adversarial is None:
            raise UserError(
                "discriminator_learning_rate has no effect without adversarial: remove it or add a discriminator"
            )
        if discriminator_learning_rate is None:
            discriminator_learning_rate = self.learning_rate
        self.discriminator_learning_rate = check_schedule("discriminator_learning_rate", discriminator_learning_rate)
        if kl_weight and not isinstance(tokenizer.adapter, GaussianAdapter):
            raise UserError("kl_weight needs tokenizer.adapter to be an aligntok.networks.GaussianAdapter")
        if not kl_weight and isinstance(tokenizer.adapter, GaussianAdapter):
            tokenizer.adapter.project_log_variance.requires_grad_(False)  # unused: distributed training would refuse it
        self.kl_weight = kl_weight
        for part in PARTS:
            if part not in self.trains:
                getattr(tokenizer, part).requires_grad_(False)

    def train(self, mode: bool = True) -> TokenizerStage:
        """Set the mode, but leave the frozen parts in eval mode, and the batch norms of a pretrained encoder always.

        Their running statistics belong to the pretrained features: with those of a batch, the latents of stage 2 would
        jump away from the anchor before the first step, and depend on the batch size of a device.
        """
        super().train(mode)
        for module in self.tokenizer.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for part in PARTS:
            if part not in self.trains:
                getattr(self.tokenizer, part).eval()
        return self

    def parameter_groups(self) -> dict[str, tuple[list[nn.Parameter], Schedule]]:
        """Return the generator's parameters and, if there is one, the discriminator's."""
        groups = {"generator": ([p for p in self.tokenizer.parameters() if p.requires_grad], self.learning_rate)}
        if self.adversarial is not None:
            groups["discriminator"] = (
                list(self.adversarial.discriminator.parameters()),
                self.discriminator_learning_rate,
            )
        return groups

    def idle_groups(self) -> Sequence[str]:
        """The discriminator rests until its start step."""
        return () if self.adversarial is None or self.adversarial.active(self.global_step) else ("discriminator",)

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch; its gradients are those of all terms, each for the parts it concerns."""
        image: Tensor = batch["image"]
        if self.global_step == 0:
            check_range(image)
        latent, terms = (batch["latent"], {}) if "latent" in batch else self.encode(image)
        reconstruction = self.tokenizer.decode(latent, clamp=False)
        logs: dict[str, Tensor] = {name: value.detach() for name, (_, value) in terms.items()}
        loss = self.image_loss(image, reconstruction, logs) + weighted_sum(terms, like=latent)
        logs["loss"] = loss.detach()
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(image))
        return loss

    def encode(self, image: Tensor) -> tuple[Tensor, Terms]:
        """Return the normalised latent (B, C, h, w) of an image (B, 3, H, W), and the terms that concern it."""
        features = self.tokenizer.encoder(image)
        latent, terms = self.adapt(features)
        return latent, terms | self.latent_terms(image, features, latent)

    def adapt(self, features: Tensor) -> tuple[Tensor, Terms]:
        """Return the normalised latent (B, C, h, w) of features (B, width, h, w), sampled if there is a KL term."""
        if not self.kl_weight:
            return self.tokenizer.normalize(self.tokenizer.adapter(features)), {}
        latent, divergence = self.tokenizer.adapter.sample(features)
        pixels = 3 * self.tokenizer.spec.image_size[0] * self.tokenizer.spec.image_size[1]
        return self.tokenizer.normalize(latent), {"kl": (self.kl_weight, divergence.mean() / pixels)}

    def latent_terms(self, image: Tensor, features: Tensor, latent: Tensor) -> Terms:
        """Return the stage's own terms on features (B, width, h, w) and latent (B, C, h, w)."""
        return {}

    def reconstruction_terms(self, image: Tensor, reconstruction: Tensor) -> Terms:
        """Return the reconstruction terms, in fp32."""
        terms: Terms = {"l1": (1.0, F.l1_loss(reconstruction, image))}
        if self.perceptual is not None:
            weight = value_at(self.perceptual_weight, self.global_step)
            with torch.autocast(image.device.type, enabled=False):
                terms["perceptual"] = (weight, self.perceptual(reconstruction, image))
        return terms

    def image_loss(self, image: Tensor, reconstruction: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """Return the loss in pixel space, generator and discriminator together, and add its terms to the log.

        Args:
            image: (B, 3, H, W) in [0, 1].
            reconstruction: The decoder's output with its graph, (B, 3, H, W), not clamped.
            logs: Gets each term.
        """
        cut = reconstruction.detach().float().requires_grad_()
        terms = self.reconstruction_terms(image.float(), cut)
        logs |= {name: value.detach() for name, (_, value) in terms.items()}
        total = weighted_sum(terms, like=cut)
        (gradient,) = torch.autograd.grad(total, cut)
        value, discriminator_loss = total.detach(), total.new_zeros(())
        if self.adversarial is not None:
            step_gradient, generator_value, discriminator_loss = self.adversarial_step(
                self.adversarial, image, cut, reconstruction, gradient, logs
            )
            gradient, value = gradient + step_gradient, value + generator_value
        onward = (reconstruction.float() * gradient).sum()  # its gradient at the decoder's output is `gradient`
        return onward - onward.detach() + value + discriminator_loss

    def adversarial_step(
        self,
        adversarial: AdversarialLoss,
        image: Tensor,
        cut: Tensor,
        reconstruction: Tensor,
        gradient: Tensor,
        logs: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the adversarial gradient at the cut, the generator's value and the discriminator's loss."""
        zero = gradient.new_zeros(())
        weight = adversarial.weight_at(self.global_step)
        if not adversarial.active(self.global_step):
            return zero, zero, adversarial.idle()
        if not weight:
            cut = cut.detach()
        terms = adversarial(image, cut)
        logs |= {f"gan_{name}": value for name, value in terms.health.items()}
        logs["gan_discriminator"] = terms.discriminator.detach()
        if not weight:
            return zero, zero, terms.discriminator
        (adversarial_gradient,) = torch.autograd.grad(terms.generator, cut, retain_graph=True)
        scale = adversarial.adaptive_weight(
            reconstruction, gradient, adversarial_gradient, self.tokenizer.decoder.last_layer
        )
        logs |= {"gan_generator": terms.generator.detach(), "gan_adaptive_weight": scale}
        return weight * scale * adversarial_gradient, (weight * scale * terms.generator).detach(), terms.discriminator

    # Validation, prediction

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return latent (B, C, h, w) and reconstruction (B, 3, H, W) in [0, 1]; the callbacks measure them."""
        latent = batch["latent"] if "latent" in batch else self.tokenizer.encode(batch["image"])
        reconstruction = self.tokenizer.decode(latent)
        terms = self.reconstruction_terms(batch["image"], reconstruction.float())
        prefix = "test" if self.trainer.testing else "val"
        logs = {f"{prefix}/{name}": value for name, (_, value) in terms.items()}
        self.log_mean(logs, len(latent))
        return {"latent": latent, "reconstruction": reconstruction}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Measure on the test images what validation measures."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the normalised latent (B, C, h, w)."""
        return self.tokenizer.encode(batch["image"])

    # Before the first step

    def setup(self, stage: str) -> None:
        """Fetch the perceptual weights now, so that a missing file does not stop the run later."""
        if stage == "fit" and hasattr(self.perceptual, "load"):
            self.perceptual.load()

    def on_fit_start(self) -> None:
        """Measure the latents of the tokenizer that came, unless the run goes on from a checkpoint.

        Cached latents are in the units of the tokenizer that wrote them: then its statistics stay.
        """
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "has_latents", False):
            self.check_cache(data)
            return
        if not self.measures_latents or self.resumed or self.keeps_statistics:
            return
        if hasattr(data, "calibration_dataloader"):
            self.measure_latents(batch["image"] for batch in data.calibration_dataloader())
        elif not self.tokenizer.is_measured:
            raise UserError(
                f"{type(self).__name__} needs the statistics of the latents: call stage.measure_latents(images) before"
                " fit, or use aligntok's LatentDataModule"
            )

    def on_validation_start(self) -> None:
        """Refuse cached latents of another tokenizer."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.trainer.state.fn != TrainerFn.FITTING and getattr(data, "has_latents", False):  # else it is done
            self.check_cache(data)

    def on_test_start(self) -> None:
        """Refuse cached latents of another tokenizer."""
        self.on_validation_start()

    def check_cache(self, data: Any) -> None:
        """Raise a ``UserError`` where this stage cannot work on the cached latents of the data."""
        name = type(self).__name__
        if set(self.trains) != {"decoder"}:
            raise UserError(
                f"{name} trains the {' and '.join(self.trains)}: cached latents leave these out, give data.train images"
            )
        data.check_latents(self.tokenizer.spec.latent_shape, self.tokenizer, "model.tokenizer")
        if not data.has_images:
            raise UserError(f"{name} needs the images beside the cached latents: set data.train.init_args.images")

    @torch.no_grad()
    def measure_latents(self, images: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation per channel of the raw latents and put them into the tokenizer.

        Args:
            images: Batches (B, 3, H, W) in [0, 1], without augmentation; on several ranks, each rank's share.
        """
        channels = self.tokenizer.latent_mean.numel()
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64)  # sum, sum of squares, count
        training = self.training
        self.eval()
        for image in images:
            latent = self.tokenizer.adapter(self.tokenizer.encoder(image.to(self.device))).double().cpu()
            values = latent.transpose(0, 1).flatten(1)
            count = sums.new_tensor([values.shape[1]])
            sums += torch.cat([values.sum(1), values.square().sum(1), count])
        self.train(training)
        if dist.is_available() and dist.is_initialized():
            sums = sums.to(self.device)
            dist.all_reduce(sums)
            sums = sums.cpu()
        total, square, count = sums[:channels], sums[channels:-1], sums[-1]
        if count < 2:
            raise UserError("there are no images to measure the latents on")
        variance = (square - total.square() / count) / (count - 1)
        self.tokenizer.set_latent_statistics((total / count).float(), variance.clamp_min(0).sqrt().float())

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the previous stage's tokenizer (its EMA, where it kept one)."""
        load_strictly(self.tokenizer, tokenizer_state(checkpoint), f"--init_from {path}")


def weighted_sum(terms: Terms, like: Tensor) -> Tensor:
    """Return the sum () of the weighted terms, in fp32 on the device of ``like``."""
    total = torch.zeros((), device=like.device)
    for weight, value in terms.values():
        total = total + weight * value
    return total


def check_range(image: Tensor) -> None:
    """Refuse images that are not floats in [0, 1]."""
    if not image.is_floating_point() or image.amin() < 0 or image.amax() > 1:
        raise UserError(
            f"images must be floats in [0, 1], got {image.dtype} from {image.amin().item():.3g} to"
            f" {image.amax().item():.3g}: divide bytes by 255, undo a mean/std normalisation"
        )
