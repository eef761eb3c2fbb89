"""Cached tokens as a source of the data module."""

from __future__ import annotations

from typing import Any

import torch

from aligntok.cache import TOKEN_LAYOUT
from aligntok.data.batches import Batch
from aligntok.data.shards import Shards
from aligntok.data.sources import Indices
from aligntok.errors import UserError
from aligntok.networks.tokenizer import Tokenizer, TokenizerSpec


class TokenShards(Shards):
    """The tokens that ``aligntok encode --config token_cache.yaml`` cached.

    View 0 is the centre crop of an image, which evaluation takes. In training each access takes a view that is a
    function of (seed, epoch, id): of ten crops any, or, without ``augmentation.flip``, any of the five that are not
    mirrored.

    >>> TokenShards("runs/tokens")  # the folder is opened at the first use
    TokenShards(...runs/tokens...)

    Args:
        folder: Where the shards are.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).

    Raises:
        UserError: At the first use: no cache, an unfinished one, broken shards.
    """

    layout = TOKEN_LAYOUT

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return ``tokens`` (B, L) int64 and ``label`` (B,)."""
        tokens, label = self.opened.read(ids, views)
        return {"tokens": tokens.to(torch.int64), "label": label}

    @property
    def spec(self) -> TokenizerSpec:
        """Of the tokenizer that wrote these tokens."""
        if self.manifest is None:
            raise UserError(f"{self.folder} has no manifest: nothing says what these tokens mean, write them again")
        entry: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in self.manifest.tokenizer.items()
        }
        del entry["fingerprint"]
        return TokenizerSpec(**entry)

    def check_tokens(self, sizes: dict[str, Any], tokenizer: Tokenizer | None, data_key: str) -> None:
        """See ``Shards``."""
        for name, expected in sizes.items():
            found = getattr(self.spec, name)
            if found != expected:
                raise UserError(
                    f"{data_key} {self.folder} holds tokens of {name} {found}, but network.{name} is {expected}:"
                    " change one of the two"
                )
        if tokenizer is not None:
            self.check_tokenizer(tokenizer, data_key)
