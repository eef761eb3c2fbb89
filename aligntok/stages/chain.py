"""What a checkpoint says of the tokenizer in it, so that a next stage needs to know no other stage's name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aligntok.weights.migration import CHAIN_KEY

PARTS = ("encoder", "adapter", "quantizer", "decoder")


@dataclass
class Chain:
    """How a tokenizer came to be.

    >>> checkpoint = {}
    >>> Chain(["adapter", "decoder"], measured=False, causal=False).save(checkpoint)
    >>> "encoder" in Chain.of(checkpoint).learned
    False

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
        """Return what a checkpoint says."""
        return Chain(**checkpoint[CHAIN_KEY])

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write it into a checkpoint."""
        checkpoint[CHAIN_KEY] = asdict(self)
