"""What a checkpoint says of the tokenizer in it, so that a next stage needs to know no other stage's name."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("encoder", "adapter", "quantizer", "decoder")


@dataclass
class Chain:
    """How a tokenizer came to be; a checkpoint holds these fields as a dict under ``tokenizer_chain``.

    >>> chain = Chain(["adapter", "decoder"], measured=False, causal=False)
    >>> "encoder" in chain.learned
    False

    Attributes:
        learned: Its parts that have learned, in this run or one before it.
        measured: Whether its latent statistics are those of its encoder and adapter as they are now.
        causal: Whether its decoder sees, for each token, only those before it.
    """

    learned: list[str]
    measured: bool
    causal: bool
