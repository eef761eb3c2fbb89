"""The diffusion generator: a velocity network on a tokenizer's latents, trained by flow matching.

Reference:
    Yao et al., LightningDiT, arXiv:2501.01423; Liu et al., Rectified Flow, arXiv:2209.03003. AlignTok, section 4,
    trains the same network with the same recipe on its latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.flow import Euler, FlowMatching, Guidance, Sampler, Velocity, sample_path
from aligntok.losses.representation import RepresentationAlignment
from aligntok.networks.dit import DiT
from aligntok.networks.frozen import Frozen
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasCache
from aligntok.randomness import noise_like_ids
from aligntok.stages.generator import GeneratorStage
from aligntok.stages.optimization import Optimization
from aligntok.weights.lightningdit import is_lightningdit, load_lightningdit

NUM_BINS = 10  # of time, for the logs
GOLDEN_RATIO = 0.6180339887498949  # its multiples fill [0, 1) evenly: times of the validation images


class LatentDiffusion(GeneratorStage):
    """Trains a network to predict the velocity from noise to latent, and samples with it.

    Batches hold ``latent`` (B, C, h, w), normalised, from the cache, or ``image`` (B, 3, H, W), which the tokenizer
    encodes; ``label`` (B,); and, in validation, ``id`` (B,), a number of its own for each image. The loss is the mean
    squared error of the velocity plus ``objective.cosine_weight`` times one minus its cosine along channels, in fp32.

    Args:
        network: Latent, time, label to velocity.
        tokenizer: Decodes samples, and encodes images where nothing is cached; from a checkpoint:
            ``class_path: aligntok.weights.load_tokenizer``. Null trains on a cache that has none here.
        objective: How times are drawn in training, and the weight of the cosine term.
        label_dropout: Share of labels that become the null class, in [0, 1], for classifier-free guidance.
        representation_alignment: REPA's term, needs images beside the latents; or null.
        sampler: From noise to latent.
        guidance: Of the sampler, by the null class or by a guide network.
        seed: Of the noise of samples; a sample is a function of (seed, id, label).
        optimization: Optimizer, learning rate, weight decay.

    Raises:
        UserError: Network, tokenizer, guide and guidance that do not fit each other; both values are named.
    """

    def __init__(
        self,
        network: DiT,
        tokenizer: Tokenizer | None = None,
        objective: FlowMatching = FlowMatching(),
        label_dropout: float = 0.1,
        representation_alignment: RepresentationAlignment | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        optimization: Optimization = Optimization(2e-4),
    ) -> None:
        super().__init__(network, tokenizer, label_dropout, seed, optimization)
        self.objective = objective
        self.representation_alignment = representation_alignment
        self.sampler = sampler or Euler(50)
        self.guidance = guidance or Guidance()
        self.guide = None if self.guidance.guide is None else Frozen(self.guidance.guide)
        self.bins: dict[str, Tensor] = {}
        self.check_parts()

    def check_parts(self) -> None:
        """Raise a ``UserError`` where the parts do not fit each other: now, not at the first samples."""
        super().check_parts()
        network, alignment = self.network, self.representation_alignment
        if self.tokenizer is not None:
            check_fit("network.latent_shape", network, "tokenizer", self.tokenizer)
        for key in ("latent_shape", "num_classes"):
            ours = getattr(network, key)
            theirs = ours if self.guide is None else getattr(self.guide.network, key)
            if theirs != ours:
                raise UserError(
                    f"guide.{key} {theirs} differs from network.{key} {ours}: the guide must be a network"
                    " for the same latents and classes"
                )
        if alignment is not None and alignment.width != network.width:
            raise UserError(
                f"representation_alignment.width {alignment.width} differs from network.width"
                f" {network.width}: set the first to the second"
            )
        try:
            self.guided(torch.zeros(0, dtype=torch.int64))
        except UserError as error:
            raise UserError(f"guidance: {error}") from error

    def init_from(self, path: str | Path) -> None:
        """Start from the weights of another run, or of a checkpoint that LightningDiT wrote."""
        if is_lightningdit(path):
            load_lightningdit(path, self.network)
        else:
            super().init_from(path)

    # Training

    def check_data(self, data: HasCache) -> None:
        """Refuse latents of another tokenizer, shape or scale."""
        data.check_latents(self.network.latent_shape, self.tokenizer, "network.latent_shape")
        if self.tokenizer is not None and not data.has_latents and not self.tokenizer.is_measured:
            raise UserError(
                "the latents of tokenizer were never measured, so they would be learned unscaled: stages 2"
                " and 3 measure them, name the checkpoint of one of these"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the flow matching loss of one batch."""
        latent = self.latent_of(batch)
        noise = self.normal(batch, "noise", latent.shape[1:]).to(latent)  # (B, C, h, w)
        t = self.objective.times(self.global_step)(self.normal(batch, "time")).to(latent)  # (B,)
        point, velocity = sample_path(noise, latent, t)
        label = self.drop(batch)
        logs: dict[str, Tensor] = {}
        extra = latent.new_zeros(())
        if self.representation_alignment is None:
            prediction = self.network(point, t, label)
        else:
            prediction, extra = self.aligned(point, t, label, batch, logs)
        terms = self.objective(prediction, velocity)
        loss = terms["loss"].mean() + extra
        logs |= {name: value.detach().mean() for name, value in terms.items()} | {"loss": loss.detach()}
        self.log_terms(logs, len(latent))
        self.fill_bins("train", t, terms["mse"].detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the error per time bin since the last line of the log, in the very step that is written."""
        trainer: Any = self.trainer
        if trainer.log_every_n_steps and (self.global_step + 1) % trainer.log_every_n_steps == 0:
            self.empty_bins("train")

    def aligned(
        self, point: Tensor, t: Tensor, label: Tensor, batch: dict[str, Any], logs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the predicted velocity and REPA's weighted term."""
        alignment = self.representation_alignment
        assert alignment is not None
        if "image" not in batch:
            raise UserError("representation_alignment needs images: train on images, or on a cache with images")
        prediction, tokens = self.network.forward_with_tokens(point, t, label, alignment.block)
        value = alignment(tokens, batch["image"])
        logs["representation"] = value.detach()
        return prediction, alignment.weight * value

    def latent_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the batch's latents in fp32, cached or encoded now."""
        if "latent" in batch:
            return batch["latent"].float()  # type: ignore[no-any-return]
        if self.tokenizer is None:
            raise UserError("the data holds images, not latents: set tokenizer, or train on a latent cache")
        return self.tokenizer.encode(batch["image"]).float()

    # Validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Log the loss at times and noise that are a function of the image's id: the same at every validation."""
        latent, ids = self.latent_of(batch), batch["id"]
        noise = noise_like_ids(ids, tuple(latent.shape[1:]), self.seed).to(latent)
        t = ((ids + 1).double() * GOLDEN_RATIO % 1).to(latent)
        point, velocity = sample_path(noise, latent, t)
        terms = self.objective(self.network(point, t, batch["label"]), velocity)
        prefix = "test" if self.trainer.testing else "val"
        self.log_mean({f"{prefix}/{name}": terms[name].mean() for name in ("loss", "mse")}, len(latent))
        self.fill_bins(prefix, t, terms["mse"])
        return {"latent": latent}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Measure on the test images what validation measures."""
        return self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the error per time bin."""
        self.empty_bins("val")

    def on_test_epoch_end(self) -> None:
        """Log the error per time bin."""
        self.empty_bins("test")

    def fill_bins(self, prefix: str, t: Tensor, error: Tensor) -> None:
        """Add errors (B,) at times (B,) to the sums per bin."""
        index = (t * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        sums = self.bins.setdefault(prefix, torch.zeros(2, NUM_BINS, device=t.device))
        sums[0].index_add_(0, index, error.float())
        sums[1].index_add_(0, index, torch.ones_like(error, dtype=torch.float32))

    def empty_bins(self, prefix: str) -> None:
        """Log the mean error of each bin of all ranks: ``train/mse_t0.3`` is for t in [0.3, 0.4)."""
        sums = self.bins.pop(prefix, None)
        if sums is None:
            return
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        totals, counts = sums.tolist()
        pairs = zip(totals, counts, strict=True)
        self.log_dict({f"{prefix}/mse_t{i / NUM_BINS}": s / n for i, (s, n) in enumerate(pairs) if n})

    # Sampling

    @torch.no_grad()
    def sample(self, ids: Tensor, label: Tensor, sampler: Sampler | None = None) -> Tensor:
        """Return normalised latents (B, C, h, w): each a function of its id (B,), its label (B,) and the seed alone."""
        self.network.check_labels(label)
        noise = noise_like_ids(ids, tuple(self.network.latent_shape), self.seed).to(self.device)
        return (sampler or self.sampler)(self.guided(label.to(self.device)), noise)

    def guided(self, label: Tensor) -> Velocity:
        """Return the guided velocity of labels (B,)."""
        return self.guidance.velocity(self.network, label)

    def sampling(self) -> dict[str, Any]:
        """Return sampler and guidance."""
        return {"sampler": self.sampler, "guidance": self.guidance}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return ``image`` (B, 3, H, W) in [0, 1] and ``latent`` (B, C, h, w) for each ``id`` and ``label`` (B,)."""
        image, latent = self.decoded(batch)
        return {"image": image, "latent": latent}


def check_fit(key: str, network: DiT, other: str, tokenizer: Tokenizer) -> None:
    """Raise a ``UserError`` where a network's latents are not the tokenizer's."""
    spec = tokenizer.spec
    if spec.kind != "continuous":
        raise UserError(f"{other} is {spec.kind}, but a diffusion generator needs a continuous tokenizer")
    if tuple(network.latent_shape) != tuple(spec.latent_shape):
        raise UserError(
            f"{key} {list(network.latent_shape)} differs from the latents of {other} {list(spec.latent_shape)}"
            " (channels, height, width): set the first to the second"
        )
