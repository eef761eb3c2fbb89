"""The three stages of AlignTok.

Reference:
    Aligning Visual Foundation Encoders to Tokenizers for Diffusion Models, arXiv:2509.25162, section 3.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligntok.errors import check
from aligntok.losses.reconstruction import ReconstructionLoss, Terms
from aligntok.losses.semantic import SemanticPreservation, semantic_preservation
from aligntok.networks.frozen import Frozen
from aligntok.networks.lora import add_lora, merge_lora
from aligntok.networks.tokenizer import Tokenizer
from aligntok.schedule import check_schedule, value_at
from aligntok.stages.optimization import Optimization
from aligntok.stages.tokenizer_stage import TokenizerStage
from aligntok.weights.checkpoint import load_strictly, part_of
from aligntok.weights.migration import CHAIN_KEY, STAGE_KEY


class LatentAlignment(TokenizerStage):
    """Stage 1: adapter and decoder learn to reconstruct from the frozen encoder; the latent keeps its semantics.

    >>> from aligntok.networks import ConvDecoder, ConvEncoder, LinearAdapter
    >>> encoder, decoder = ConvEncoder(4, 8, (1,), 1, 16, num_groups=4), ConvDecoder(4, 8, (1,), 1, num_groups=4)
    >>> stage = LatentAlignment(Tokenizer(encoder, LinearAdapter(encoder.width, 4), decoder))
    >>> sorted({name.split(".")[0] for name in stage.parameter_groups()["generator"].parameters})
    ['adapter', 'decoder']
    """

    trains = ("adapter", "quantizer", "decoder")


class PerceptualAlignment(TokenizerStage):
    """Stage 2: everything learns and the latent picks up detail; the semantic loss holds it near the latent of stage 1.

    The loss gains ``semantic.weight`` times the distance between the latent and that of a frozen copy of the stage-1
    encoder and adapter on the same image. Both latents are divided by the copy's standard deviation per channel, which
    is measured before the first step; features are compared as the encoder gives them.

    >>> from aligntok.networks import ConvDecoder, ConvEncoder, LinearAdapter
    >>> encoder, decoder = ConvEncoder(4, 8, (1,), 1, 16, num_groups=4), ConvDecoder(4, 8, (1,), 1, num_groups=4)
    >>> tokenizer = Tokenizer(encoder, LinearAdapter(encoder.width, 4), decoder)
    >>> stage = PerceptualAlignment(tokenizer, semantic=SemanticPreservation(weight=0.5))
    >>> stage.init_from("runs/stage1/checkpoints/last.ckpt")  # doctest: +SKIP

    Args:
        tokenizer: As for every tokenizer stage, and so are loss, optimization and kl_weight.
        loss: Of the reconstruction.
        optimization: Of tokenizer and discriminator.
        kl_weight: Of the KL divergence.
        semantic: Weight and kind of the semantic preservation loss.
        lora_rank: Train low-rank updates of the encoder's linear layers instead of the layers (an ablation that loses).
    """

    needs_previous = True
    measures_latents = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: ReconstructionLoss | None = None,
        optimization: Optimization = Optimization(1e-4),
        kl_weight: float = 0.0,
        semantic: SemanticPreservation = SemanticPreservation(),
        lora_rank: int | None = None,
    ) -> None:
        super().__init__(tokenizer, loss, optimization, kl_weight)
        check_schedule("weight of semantic", semantic.weight)
        self.semantic = semantic
        self.anchor = Frozen(nn.Sequential(deepcopy(tokenizer.encoder), deepcopy(tokenizer.adapter)))
        if lora_rank is not None:
            add_lora(tokenizer.encoder, lora_rank)

    def latent_terms(self, image: Tensor, features: Tensor, latent: Tensor) -> Terms:
        """Return the semantic preservation loss."""
        weight = value_at(self.semantic.weight, self.global_step)
        if not weight:
            return {}
        with torch.no_grad():
            anchor_features = self.anchor.network[0](image)
            anchor = self.tokenizer.normalize(self.anchor.network[1](anchor_features))
        pair = (features, anchor_features) if self.semantic.before_adapter else (latent, anchor)
        return {"semantic": (weight, semantic_preservation(pair[0], pair[1], self.semantic.distance))}

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the tokenizer, and a frozen copy of its encoder and adapter.

        Raises:
            UserError: The encoder has learned before: it is no longer where its pretraining put it.
        """
        check(
            "encoder" not in checkpoint[CHAIN_KEY]["learned"],
            f"--init_from {path} is of stage {checkpoint.get(STAGE_KEY)}, whose encoder has learned already, but"
            f" {type(self).__name__} holds the latent near that of the pretrained encoder",
        )
        super().load_previous(checkpoint, path)
        state = merge_lora(self.held("tokenizer", checkpoint, path))
        for module, part in zip(self.anchor.network, ("encoder", "adapter"), strict=True):
            load_strictly(module, part_of(state, part), f"--init_from {path}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen copy: a run resumes without the stage-1 file."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["anchor"] = self.anchor.network.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the frozen copy back."""
        super().on_load_checkpoint(checkpoint)
        load_strictly(self.anchor.network, checkpoint["anchor"], "the checkpoint's anchor")


class DecoderRefinement(TokenizerStage):
    """Stage 3, and the second of AliTok: only the decoder learns, on the final latents.

    The latent space stays as it is, so this stage may also come after a generator was trained. Of a continuous
    tokenizer, mean and standard deviation of the latents are measured first; but on a cache of the previous stage's
    latents with their images (``LatentShards`` with ``images``) the encoder never runs, and the statistics that the
    cache is scaled by stay. Where the decoder before was causal and this one is not, the weights that fit are taken
    over (AliTok, arXiv:2506.05289).

    >>> from aligntok.networks import ConvDecoder, ConvEncoder, LinearAdapter
    >>> encoder, decoder = ConvEncoder(4, 8, (1,), 1, 16, num_groups=4), ConvDecoder(4, 8, (1,), 1, num_groups=4)
    >>> stage = DecoderRefinement(Tokenizer(encoder, LinearAdapter(encoder.width, 4), decoder))
    >>> stage.measure_latents([torch.rand(8, 3, 16, 16)])
    """

    trains = ("decoder",)
    needs_previous = True
    measures_latents = True
