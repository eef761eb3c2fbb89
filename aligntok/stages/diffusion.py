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

from aligntok.errors import UserError, check
from aligntok.flow import Euler, FlowMatching, Guidance, Sampler, sample_path
from aligntok.losses.representation import RepresentationAlignment
from aligntok.networks.dit import DiT
from aligntok.networks.frozen import Frozen
from aligntok.networks.text import Condition
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

    >>> network = DiT(latent_shape=(4, 2, 2), num_classes=3, width=16, depth=1, num_heads=2)
    >>> stage = LatentDiffusion(network, sampler=Euler(10), guidance=Guidance(scale=1.5))
    >>> stage.sample(ids=torch.arange(2), label=torch.tensor([0, 2])).shape
    torch.Size([2, 4, 2, 2])

    Raises:
        UserError: Network, tokenizer, guide and guidance that do not fit each other; both values are named.
    """

    guide_keys: tuple[str, ...] = ("latent_shape", "num_classes")
    """What a guide network must share with the network."""

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
        self.check_parts()

    def check_parts(self) -> None:
        """Raise a ``UserError`` where the parts do not fit each other: now, not at the first samples."""
        super().check_parts()
        network, alignment, shape = self.network, self.representation_alignment, list(self.network.latent_shape)
        if self.tokenizer is not None:
            spec, needed = self.tokenizer.spec, "a diffusion generator needs a continuous tokenizer"
            check(spec.kind == "continuous", f"tokenizer is {spec.kind}, but {needed}")
            check(
                shape == list(spec.latent_shape),
                f"network.latent_shape {shape} differs from the latents of tokenizer {list(spec.latent_shape)}"
                " (channels, height, width): set the first to the second",
            )
        for key in self.guide_keys:
            ours = getattr(network, key)
            theirs = ours if self.guide is None else getattr(self.guide.network, key, None)
            text = f"guide.{key} {theirs} differs from network.{key} {ours}: the guide must be a network"
            check(theirs == ours, f"{text} for the same latents and classes")
        if alignment is not None:
            text = f"representation_alignment.width {alignment.width} differs from network.width {network.width}"
            check(alignment.width == network.width, f"{text}: set the first to the second")
        try:
            self.guidance.check(network)
        except UserError as error:
            raise UserError(f"guidance: {error}") from error

    def init_from(self, path: str | Path) -> None:
        """Start from the weights of another run, or of a checkpoint that LightningDiT wrote."""
        if is_lightningdit(path):
            self.load_official(path)
        else:
            super().init_from(path)

    def load_official(self, path: str | Path) -> None:
        """Take the weights of a checkpoint that LightningDiT wrote."""
        load_lightningdit(path, self.network)

    def check_data(self, data: HasCache) -> None:
        """Refuse latents of another tokenizer, shape or scale."""
        data.check_latents(self.network.latent_shape, self.tokenizer, "network.latent_shape")
        check(
            self.tokenizer is None or data.has_latents or self.tokenizer.is_measured,
            "the latents of tokenizer were never measured, so they would be learned unscaled: stages 2 and 3 measure"
            " them, name the checkpoint of one of these",
        )

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the flow matching loss of one batch."""
        latent = self.code_of(batch).float()  # (B, C, h, w)
        noise = self.normal(batch, "noise", latent.shape[1:]).to(latent)  # (B, C, h, w)
        t = self.objective.times(self.global_step)(self.normal(batch, "time")).to(latent)  # (B,)
        point, velocity = sample_path(noise, latent, t)
        condition, alignment = self.drop(batch), self.representation_alignment
        if alignment is None:
            terms = self.objective(self.network(point, t, condition), velocity)
        else:
            check("image" in batch, "representation_alignment needs images: train on images, or on a cache with images")
            prediction, tokens = self.network.forward_with_tokens(point, t, condition, alignment.block)
            terms = self.objective(prediction, velocity)
        loss = terms["loss"].mean()
        logs = {name: value.detach().mean() for name, value in terms.items()}
        if alignment is not None:
            value = alignment(tokens, batch["image"])
            loss, logs["representation"] = loss + alignment.weight * value, value.detach()
        self.log_terms(logs | {"loss": loss.detach()}, len(latent))
        self.fill_bins("train", t, terms["mse"].detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the error per time bin since the last line of the log, in the very step that is written."""
        trainer: Any = self.trainer
        if trainer.log_every_n_steps and (self.global_step + 1) % trainer.log_every_n_steps == 0:
            self.log_sums("train")

    # Validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Log the loss at times and noise that are a function of the image's id: the same at every validation."""
        latent, ids = self.code_of(batch).float(), batch["id"]  # (B, C, h, w), (B,)
        noise = noise_like_ids(ids, tuple(latent.shape[1:]), self.seed).to(latent)  # (B, C, h, w)
        t = ((ids + 1).double() * GOLDEN_RATIO % 1).to(latent)  # (B,)
        point, velocity = sample_path(noise, latent, t)
        terms = self.objective(self.network(point, t, self.condition(batch)), velocity)
        self.log_mean({f"{self.split}/{name}": terms[name].mean() for name in ("loss", "mse")}, len(latent))
        self.fill_bins(self.split, t, terms["mse"])
        return {"latent": latent}

    def fill_bins(self, split: str, t: Tensor, error: Tensor) -> None:
        """Add errors (B,) at times (B,) to the sums per bin."""
        index = (t * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        sums = self.sums.setdefault(split, torch.zeros(2, NUM_BINS, device=t.device))
        sums[0].index_add_(0, index, error.float())
        sums[1].index_add_(0, index, torch.ones_like(error, dtype=torch.float32))

    def log_sums(self, split: str) -> None:
        """Log the mean error of each bin of all ranks: ``train/mse_t0.3`` is for t in [0.3, 0.4)."""
        sums = self.total(split)
        if sums is not None:
            pairs = enumerate(sums.T.tolist())
            means = {f"{split}/mse_t{i / NUM_BINS}": error / count for i, (error, count) in pairs if count}
            self.log_dict(means, sync_dist=split != "train")  # the mean of equal values: without it, Lightning warns

    # Sampling

    @torch.no_grad()
    def sample(self, ids: Tensor, label: Condition, sampler: Sampler | None = None) -> Tensor:
        """Return normalised latents (B, C, h, w): each a function of its id (B,), its label (B,) and the seed alone."""
        self.network.check_condition(label)
        noise = noise_like_ids(ids, tuple(self.network.latent_shape), self.seed).to(self.device)
        return (sampler or self.sampler)(self.guidance.velocity(self.network, label.to(self.device)), noise)

    def sampling(self) -> dict[str, Any]:
        """Return sampler and guidance."""
        return {"sampler": self.sampler, "guidance": self.guidance}
