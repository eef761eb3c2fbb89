"""What the tokenizer stages share: frozen parts, the way of an image through the tokenizer, the loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from aligntok.cache import channel_statistics
from aligntok.errors import UserError, check, check_nonnegative
from aligntok.losses.perceptual import LPIPS
from aligntok.losses.reconstruction import ReconstructionLoss, Reference, Terms, weighted_sum
from aligntok.networks.adapters import GaussianAdapter
from aligntok.networks.frozen import load_frozen
from aligntok.networks.lora import DOWN, UP, merge_lora
from aligntok.networks.token_decoder import TokenDecoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasCache, HasCalibration, offered_data
from aligntok.stages.chain import PARTS, Chain
from aligntok.stages.optimization import Optimization, ParameterGroup
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import load_strictly, part_of
from aligntok.weights.migration import CHAIN_KEY, STAGE_KEY

COMMITMENT_WEIGHT = 0.25  # van den Oord et al., arXiv:1711.00937, section 3.2


class TokenizerStage(Stage):
    """Trains some parts of a tokenizer to reconstruct images; a subclass says which, and adds its terms.

    Batches are dicts with ``image`` (B, 3, H, W) in [0, 1]; with a cached ``latent`` (B, C, h, w) beside it, the
    encoder does not run. To the loss of the reconstruction come the stage's own terms and, where a quantizer learns,
    its commitment and codebook terms. One optimizer has a group for the tokenizer and one for the discriminator;
    ``ReconstructionLoss`` says how both learn from one backward pass.

    >>> from aligntok.networks import ConvDecoder, ConvEncoder
    >>> encoder = ConvEncoder(4, 8, (1, 2), num_blocks=1, image_size=16, num_groups=4)
    >>> decoder = ConvDecoder(4, 8, (1, 2), num_blocks=1, num_groups=4)
    >>> stage = TokenizerStage(Tokenizer(encoder, GaussianAdapter(encoder.width, 4), decoder), kl_weight=1e-6)
    >>> stage.predict_step({"image": torch.rand(2, 3, 16, 16)}, 0).shape
    torch.Size([2, 4, 8, 8])

    Args:
        tokenizer: Encoder, adapter, quantizer if it is a discrete one, decoder.
        loss: Of the reconstruction: pixel term, perceptual terms, adversarial term; by default the l1 alone.
        optimization: Of the tokenizer, and of the discriminator but for its learning rate.
        kl_weight: Of the KL divergence, averaged over the image's pixels (an ablation); needs a ``GaussianAdapter``.
    """

    trains: tuple[str, ...] = PARTS
    """Which parts of the tokenizer learn; the others stay in eval mode, bit for bit."""

    measures_latents = False
    """Whether the stage measures the latents of the tokenizer that it is given, before its first step."""

    commitment_weight = COMMITMENT_WEIGHT
    """Of the term that draws the latent to its codes, where a quantizer learns."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: ReconstructionLoss | None = None,
        optimization: Optimization = Optimization(1e-4),
        kl_weight: float = 0.0,
    ) -> None:
        super().__init__(optimization)
        self.tokenizer = tokenizer
        measured = not tokenizer.latent_mean.is_meta and tokenizer.is_measured  # it came with its weights
        self.previous = Chain([], measured, causal=False)  # of the tokenizer before this stage
        self.loss = ReconstructionLoss() if loss is None else loss
        check_nonnegative(kl_weight=kl_weight)
        gaussian = isinstance(tokenizer.adapter, GaussianAdapter)
        check(gaussian or not kl_weight, "kl_weight needs tokenizer.adapter to be an aligntok.networks.GaussianAdapter")
        if gaussian and not kl_weight:
            tokenizer.adapter.project_log_variance.requires_grad_(False)  # unused: distributed training would refuse it
        self.kl_weight = kl_weight
        for network in self.frozen_parts():
            network.requires_grad_(False)

    def frozen_parts(self) -> list[nn.Module]:
        """Return the parts of the tokenizer that do not learn."""
        parts = [getattr(self.tokenizer, part) for part in PARTS if part not in self.trains]
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> TokenizerStage:
        """Set the mode, but leave the frozen parts in eval mode, and the batch norms of a pretrained encoder always.

        Their running statistics belong to the pretrained features: with those of a batch, the latents of stage 2 would
        differ from those of stage 1 before the first step, and depend on the batch size of a device.
        """
        super().train(mode)
        for module in self.tokenizer.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for network in self.frozen_parts():
            network.eval()
        return self

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Return the generator's parameters and, if there is one, the discriminator's."""
        rate, adversarial = self.optimization.learning_rate, self.loss.adversarial
        learning = {name: p for name, p in self.tokenizer.named_parameters() if p.requires_grad}
        groups = {"generator": ParameterGroup(learning, rate)}
        if adversarial is not None:
            own = rate if adversarial.learning_rate is None else adversarial.learning_rate
            groups["discriminator"] = ParameterGroup(dict(adversarial.discriminator.named_parameters()), own)
        return groups

    def idle_groups(self) -> Sequence[str]:
        """The discriminator rests until its start step."""
        adversarial = self.loss.adversarial
        return () if adversarial is None or adversarial.active(self.global_step) else ("discriminator",)

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch; its gradients are those of all terms, each for the parts it concerns."""
        image: Tensor = batch["image"]
        if self.global_step == 0:
            check_range(image)
        latent, terms = (batch["latent"], {}) if "latent" in batch else self.encode(batch)
        reference = Reference(image)
        reconstruction, more_terms = self.decode(latent, reference)
        terms |= more_terms
        result = self.loss(reference, reconstruction, self.global_step, self.tokenizer.decoder.last_layer)
        loss: Tensor = result.value + weighted_sum(terms, like=latent)
        logs = {name: value.detach() for name, (_, value) in terms.items()} | result.terms | {"loss": loss.detach()}
        self.log_terms(logs, len(image))
        return loss

    def encode(self, batch: dict[str, Any]) -> tuple[Tensor, Terms]:
        """Return the latent (B, C, h, w) that the decoder gets of images (B, 3, H, W), and the terms on the way."""
        image = batch["image"]
        features = self.tokenizer.encoder(image)
        latent, terms = self.adapt(features, batch)
        terms |= self.latent_terms(image, features, latent)
        latent, more_terms = self.quantize(latent, batch)
        return latent, terms | more_terms

    def adapt(self, features: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Terms]:
        """Return the normalised latent (B, C, h, w) of features (B, width, h, w), sampled if there is a KL term."""
        if not self.kl_weight:
            return self.tokenizer.normalize(self.tokenizer.adapter(features)), {}
        noise = self.normal(batch, "latent", self.tokenizer.spec.latent_shape)
        latent, divergence = self.tokenizer.adapter.sample(features, noise)
        pixels = 3 * self.tokenizer.spec.image_size[0] * self.tokenizer.spec.image_size[1]
        return self.tokenizer.normalize(latent), {"kl": (self.kl_weight, divergence.mean() / pixels)}

    def quantize(self, latent: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Terms]:
        """Return the codes nearest to a latent (B, C, h, w), and the quantizer's terms if it learns."""
        if self.tokenizer.quantizer is None:
            return latent, {}
        quantized = self.tokenizer.quantizer(latent, self.ids_of(batch))
        if "quantizer" not in self.trains:
            return quantized.latent, {}
        terms = {"commitment": (self.commitment_weight, quantized.commitment), "codebook": (1.0, quantized.codebook)}
        return quantized.latent, terms

    def decode(self, latent: Tensor, reference: Reference) -> tuple[Tensor, Terms]:
        """Return the reconstruction of a latent (B, C, h, w), not clamped, and terms on what else the decoder gives."""
        return self.tokenizer.decode_latent(latent, clamp=False), {}

    def latent_terms(self, image: Tensor, features: Tensor, latent: Tensor) -> Terms:
        """Return the stage's own terms on features (B, width, h, w) and latent (B, C, h, w)."""
        return {}

    # Validation, prediction

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return ``latent`` (B, C, h, w), ``reconstruction`` (B, 3, H, W) in [0, 1] and any ``tokens`` (B, N)."""
        code = batch["latent"] if "latent" in batch else self.tokenizer.encode(batch["image"])
        latent = self.tokenizer.latent(code)  # of tokens: their codes
        reconstruction = self.tokenizer.decode_latent(latent)
        reference = Reference(batch["image"])
        if self.trainer.sanity_checking:
            self.loss.try_out(reference, reconstruction.float())
        # ReconstructionQuality is the one that measures LPIPS, of images as PNG files hold them
        terms = self.loss.terms(reference, reconstruction.float(), self.global_step, without=(LPIPS,))
        self.log_mean({f"{self.split}/{name}": value for name, (_, value) in terms.items()}, len(latent))
        outputs = {"latent": latent, "reconstruction": reconstruction}
        return outputs if self.tokenizer.quantizer is None else outputs | {"tokens": code}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the normalised latent (B, C, h, w), or the tokens (B, N)."""
        return self.tokenizer.encode(batch["image"])

    # Before the first step

    def setup(self, stage: str) -> None:
        """Fetch the perceptual weights, so that a missing file does not stop the run later, and look at the data."""
        super().setup(stage)
        if stage == "fit":
            load_frozen(self.loss)
            offered_data(self.trainer, HasCalibration)
        data = offered_data(self.trainer, HasCache)
        if stage == "predict" or data is None or not data.has_latents:
            return
        name, trained = type(self).__name__, [part for part in self.trains if getattr(self.tokenizer, part) is not None]
        text = f"{name} trains the {' and '.join(trained)}: cached latents leave these out, train on images"
        check(set(self.trains) == {"decoder"}, text)
        data.check_latents(self.tokenizer.spec.latent_shape, None, "tokenizer")
        text = f"{name} needs the images beside the cached latents: name them in the cache, LatentShards(images=...)"
        check(data.has_images, text)

    def on_fit_start(self) -> None:
        """Measure the latents before the first step, unless the run goes on from a checkpoint.

        Cached latents are in the units of the tokenizer that wrote them: then its statistics stay, and so do those of
        a tokenizer that came with its own, as from ``load_vae``. ``setup`` is too early: Lightning loads the weights
        of ``--ckpt_path``, statistics among them, after it.
        """
        cached = self.check_cache()
        needed = self.measures_latents and self.tokenizer.quantizer is None and not self.previous.measured
        if cached or self.resumed or not needed:
            return
        data = offered_data(self.trainer, HasCalibration)
        if data is not None:
            self.measure_latents(batch["image"] for batch in data.calibration_dataloader())
        check(
            self.tokenizer.is_measured,
            f"{type(self).__name__} needs the statistics of the latents: call stage.measure_latents(images) before fit,"
            " or give a data module with calibration_dataloader()",
        )

    def on_validation_start(self) -> None:
        """Refuse cached latents of another tokenizer; in ``fit`` that is done before the first step."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.check_cache()

    on_test_start = on_validation_start

    def check_cache(self) -> bool:
        """Return whether the data hold cached latents; a ``UserError`` where another tokenizer wrote them."""
        data = offered_data(self.trainer, HasCache)
        if data is None or not data.has_latents:
            return False
        data.check_latents(self.tokenizer.spec.latent_shape, self.tokenizer, "tokenizer")
        return True

    @torch.no_grad()
    def measure_latents(self, images: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation per channel of the raw latents and put them into the tokenizer.

        Args:
            images: Batches (B, 3, H, W) in [0, 1], without augmentation; on several ranks, each rank's share.
        """
        training = self.training
        self.eval()
        raw_latents = (self.tokenizer.adapter(self.tokenizer.encoder(image.to(self.device))) for image in images)
        mean, std = channel_statistics(raw_latents, self.tokenizer.latent_mean.numel(), self.device)
        self.train(training)
        self.tokenizer.set_latent_statistics(mean, std)

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the tokenizer; where its decoder was causal and this one is not, what of it fits.

        Raises:
            UserError: There is no tokenizer, parts of other sizes, or a decoder that is not causal as this one is.
        """
        state = merge_lora(self.held("tokenizer", checkpoint, path))
        updates = {key: value for key, value in self.tokenizer.state_dict().items() if key.endswith((UP, DOWN))}
        self.previous = Chain(**checkpoint[CHAIN_KEY])
        text = f"--init_from {path} is of stage {checkpoint.get(STAGE_KEY)}, whose decoder is not causal"
        check(self.previous.causal or not self.causal, f"{text}, but {type(self).__name__} has one that is")
        if self.previous.causal and not self.causal and isinstance(self.tokenizer.decoder, TokenDecoder):
            carried = self.tokenizer.decoder.carried_over(part_of(state, "decoder"))
            state = {key: value for key, value in state.items() if not key.startswith("decoder.")}
            state |= {f"decoder.{key}": value for key, value in carried.items()}
        load_strictly(self.tokenizer, state | updates, f"--init_from {path}")

    @property
    def causal(self) -> bool:
        """Whether the decoder sees, for each token, only those before it."""
        return isinstance(self.tokenizer.decoder, TokenDecoder) and self.tokenizer.decoder.causal

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the tokenizer has become."""
        super().on_save_checkpoint(checkpoint)
        trained = {part for part in self.trains if getattr(self.tokenizer, part) is not None}
        learned = [part for part in PARTS if part in trained | set(self.previous.learned)]
        measured = trained <= {"decoder"} and self.tokenizer.is_measured
        checkpoint[CHAIN_KEY] = asdict(Chain(learned, measured, self.causal))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know what the tokenizer was before the run that goes on."""
        super().on_load_checkpoint(checkpoint)
        self.previous = Chain(**checkpoint[CHAIN_KEY])


def tokenizer_is_loaded(model: Any) -> bool:
    """Whether, by its config, a tokenizer's stage gets it with its weights, as from ``load_vae``: it may start so."""
    tokenizer, kind = model.get("init_args.tokenizer"), locate(model.class_path)
    of_tokenizer = inspect.isclass(kind) and issubclass(kind, TokenizerStage)
    return of_tokenizer and tokenizer is not None and not inspect.isclass(locate(tokenizer.class_path))


def check_range(image: Tensor) -> None:
    """Refuse images that are not floats in [0, 1]."""
    if not image.is_floating_point() or image.amin() < 0 or image.amax() > 1:
        raise UserError(
            f"images must be floats in [0, 1], got {image.dtype} from {image.amin().item():.3g} to"
            f" {image.amax().item():.3g}: divide bytes by 255, undo a mean/std normalisation"
        )
