"""The text-to-image generator: a velocity network that reads captions, on a tokenizer's latents.

Reference:
    AlignTok, arXiv:2509.25162, compares tokenizers by such generators of 2B parameters; it does not describe them.
    Chen et al., PixArt-alpha, arXiv:2310.00426: cross-attention, and an ImageNet generator as the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from aligntok.errors import UserError, check
from aligntok.flow import FlowMatching, Guidance, Sampler
from aligntok.losses.representation import RepresentationAlignment
from aligntok.networks.dit import DiT
from aligntok.networks.frozen import Frozen
from aligntok.networks.text import Text, TextEncoder
from aligntok.networks.text_dit import TextDiT
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasTexts, offered_data
from aligntok.stages.diffusion import LatentDiffusion
from aligntok.stages.optimization import Optimization
from aligntok.weights.checkpoint import load_strictly
from aligntok.weights.lightningdit import load_lightningdit, num_classes_of

LABELS = "embed_label.weight"


class TextDiffusion(LatentDiffusion):
    """Trains a network to predict the velocity from noise to the latent of a captioned image, and samples with it.

    Batches are those of ``LatentDiffusion``; in place of a label they hold ``caption`` (B strings), their ``text_ids``
    (B, L), padded with -1, or ids and cached ``text_features`` (B, L, width). An empty caption is the null text.

    Args:
        network: Latent, time, text to velocity.
        text_encoder: Captions to features; frozen and in no checkpoint. Null trains on cached features.
        tokenizer: Decodes samples, and encodes images where nothing is cached, as of ``LatentDiffusion``.
        objective: How times are drawn in training, and the weight of the cosine term.
        text_dropout: Share of captions that become the null text, in [0, 1], for classifier-free guidance.
        representation_alignment: REPA's term, needs images beside the latents; or null.
        sampler: From noise to latent.
        guidance: Of the sampler, by the null text or by a guide network.
        seed: Of the noise of samples; a sample is a function of (seed, id, prompt).
        optimization: Optimizer, learning rate, weight decay.

    >>> import torch
    >>> from aligntok.networks import StaticTextEncoder
    >>> network = TextDiT(latent_shape=(4, 2, 2), text_width=256, width=16, depth=1, num_heads=2)
    >>> stage = TextDiffusion(network, StaticTextEncoder(max_tokens=16), guidance=Guidance(scale=4.0))
    >>> stage.sample(torch.arange(2), stage.text(["two foxes", "a pizza"])).shape
    torch.Size([2, 4, 2, 2])

    Raises:
        UserError: Network, encoders, guide and guidance that do not fit each other; both values are named.
    """

    reads_text = True
    dropout_key = "text_dropout"
    guide_keys = ("latent_shape", "num_classes", "text_width")

    def __init__(
        self,
        network: TextDiT,
        text_encoder: TextEncoder | None = None,
        tokenizer: Tokenizer | None = None,
        objective: FlowMatching = FlowMatching(),
        text_dropout: float = 0.1,
        representation_alignment: RepresentationAlignment | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        optimization: Optimization = Optimization(1e-4),
    ) -> None:
        parts = (tokenizer, objective, text_dropout, representation_alignment, sampler, guidance, seed, optimization)
        super().__init__(network, *parts)
        self.frozen_text_encoder = None if text_encoder is None else Frozen(text_encoder)
        width = network.text_width if text_encoder is None else text_encoder.width
        text = f"network.text_width {network.text_width} differs from the width of text_encoder {width}"
        check(width == network.text_width, f"{text}: set the first to the second")
        by_null = self.guidance.scale != 1 and self.guide is None
        check(
            not by_null or text_dropout > 0,
            f"guidance.scale {self.guidance.scale} needs the null text, which is not learned with text_dropout 0",
        )

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The text encoder, if there is one."""
        return None if self.frozen_text_encoder is None else self.frozen_text_encoder.network

    @cached_property
    def text_encoder_fingerprint(self) -> str | None:
        """Hash of what shapes ids and features, which never changes here."""
        return None if self.text_encoder is None else self.text_encoder.fingerprint()

    # Text

    def setup(self, stage: str) -> None:
        """Read the text encoder now, so that a missing file stops the run early; refuse texts of another one."""
        super().setup(stage)
        if self.text_encoder is not None:
            self.text_encoder.load()
            texts = offered_data(self.trainer, HasTexts)
            if texts is not None and stage != "predict":
                texts.check_text(self.text_encoder)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Split captions into tokens on the host."""
        return super().on_before_batch_transfer(self.with_ids(batch), dataloader_idx)

    def with_ids(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with ``text_ids``.

        Raises:
            UserError: It holds no text; or captions, and there is no text encoder.
        """
        if "text_ids" in batch:
            return batch
        check(
            "caption" in batch,
            f"{type(self).__name__} reads captions, and the data have none: give captioned images, or train"
            " aligntok.stages.LatentDiffusion on classes",
        )
        if self.text_encoder is None:
            raise UserError("the data hold captions, no features of them: set text_encoder, or train on a cache")
        return {**batch, "text_ids": self.text_encoder.tokenize(batch["caption"])}

    def condition(self, batch: dict[str, Any]) -> Text:
        """Return the texts of a batch, cached or encoded now."""
        batch = self.with_ids(batch)
        ids = batch["text_ids"].to(self.device)
        if "text_features" in batch:
            return Text(batch["text_features"].to(self.device), ids >= 0)
        if self.text_encoder is None:
            raise UserError("the data hold text_ids, no features of them: set text_encoder, or cache features")
        text: Text = self.text_encoder(ids)
        return text

    def text(self, captions: Sequence[str]) -> Text:
        """Return captions as ``sample`` takes them."""
        return self.condition({"caption": list(captions)})

    # A class-conditional network as the start

    def load_official(self, path: str | Path) -> None:
        """Start from a checkpoint that LightningDiT wrote."""
        before = self.network.without_text(num_classes_of(path))
        load_lightningdit(path, before)
        self.start_from(before, path)

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the network (its EMA, where the run kept one); of a class-conditional one, all but the labels."""
        state = self.held("network", checkpoint, path)
        own = self.network.state_dict()
        if LABELS not in state or state.keys() == own.keys():
            return super().load_previous(checkpoint, path)
        recipe: dict[str, Any] = (checkpoint.get("hyper_parameters") or {}).get("network") or {}
        null_class: bool = recipe.get("init_args", {}).get("null_class", True)
        before = self.network.without_text(len(state[LABELS]) - null_class, null_class)
        load_strictly(before, state, f"--init_from {path}")
        return self.start_from(before, path)

    def start_from(self, network: DiT, path: str | Path) -> None:
        """Take the weights of a class-conditional network, and say so."""
        self.network.start_from(network)
        kept = "the mean class" if network.null_label is None else "the null class"
        print(
            f"--init_from {path} is of {network.num_classes} classes: their table is dropped, {kept} is the start for"
            " all texts",
            flush=True,
        )

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which text encoder this generator reads with."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["text_encoder_fingerprint"] = self.text_encoder_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another text encoder."""
        super().on_load_checkpoint(checkpoint)
        theirs, ours = checkpoint.get("text_encoder_fingerprint"), self.text_encoder_fingerprint
        check(
            theirs is None or ours in (None, theirs),
            f"the generator has learned to read with text encoder {theirs}, but text_encoder is {ours}: name the same"
            " one, with the same layer and max_tokens",
        )
