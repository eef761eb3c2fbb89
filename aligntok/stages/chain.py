"""What a checkpoint says of the tokenizer in it, so that a next stage needs to know no other stage's name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aligntok.weights.checkpoint import STAGE_KEY

KEY = "tokenizer_chain"  # of a checkpoint
PARTS = ("encoder", "adapter", "quantizer", "decoder")


@dataclass
class Chain:
    """How a tokenizer came to be.

    Attributes:
        learned: Its parts that have learned, in this run or one before it.
        measured: Whether its latent statistics are those of its encoder and adapter as they are now.
        causal: Whether its decoder sees, for each token, only those before it.
    """

    learned: list[str]
    measured: bool
    causal: bool

    @staticmethod
    def of(checkpoint: dict[str, Any]) -> Chain:
        """Return what a checkpoint says; files of earlier versions say no more than the name of their stage."""
        if KEY in checkpoint:
            return Chain(**checkpoint[KEY])
        stage = checkpoint.get(STAGE_KEY)
        learned = [part for part in PARTS if part != "encoder" or stage != "LatentAlignment"]
        return Chain(learned, stage == "DecoderRefinement", stage == "CausalTokenization")

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write it into a checkpoint."""
        checkpoint[KEY] = asdict(self)
