"""The first stage of AliTok: a causal decoder teaches a bidirectional encoder to write tokens that depend forwards.

Reference:
    AliTok: Towards Sequence Modeling Alignment between Tokenizer and Autoregressive Model, arXiv:2506.05289.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError
from aligntok.losses.reconstruction import ReconstructionLoss, Reference, Terms
from aligntok.networks.tokenizer import Tokenizer
from aligntok.stages.optimization import Optimization
from aligntok.stages.tokenizer_stage import COMMITMENT_WEIGHT, TokenizerStage


class CausalTokenization(TokenizerStage):
    """Everything learns: encoder, adapter, quantizer and decoder of a discrete tokenizer.

    The first tokens have nothing before them, and rows below lean on the first one: prefix tokens in front carry that
    load. Where the decoder has a head for them, they must give the first row of patches, in its second version; in
    the first one, with a token more, the first patch and then that row. The loss gains ``prefix_weight`` times that
    row's share of the image (K tokens of h * w) times its mean squared error; ``auxiliary: perceptual`` adds the
    perceptual terms, in their own weights, of the whole image with the first row from the prefix and the other rows
    held constant.

    Args:
        tokenizer: A discrete one, e.g. ``QueryEncoder``, ``LinearAdapter``, ``VectorQuantizer``, ``TokenDecoder``.
        loss: As for every tokenizer stage.
        optimization: As for every tokenizer stage.
        kl_weight: As for every tokenizer stage.
        auxiliary: Loss of the prefix: ``none``; ``mse``, AliTok's first version; ``perceptual``, its second.
        prefix_weight: Of the mean squared error of the prefix; 10 in the published code.
        commitment_weight: Of the term that draws the latent to its codes.

    Raises:
        UserError: Parts of the tokenizer that do not go with the loss; says what to change.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: ReconstructionLoss | None = None,
        optimization: Optimization = Optimization(1e-4),
        kl_weight: float = 0.0,
        auxiliary: Literal["none", "mse", "perceptual"] = "none",
        prefix_weight: float = 10.0,
        commitment_weight: float = COMMITMENT_WEIGHT,
    ) -> None:
        super().__init__(tokenizer, loss, optimization, kl_weight)
        self.auxiliary, self.prefix_weight, self.commitment_weight = auxiliary, prefix_weight, commitment_weight
        self.check_parts()

    def check_parts(self) -> None:
        """Raise a ``UserError`` where tokenizer and losses do not fit each other."""
        decoder, spec = self.tokenizer.decoder, self.tokenizer.spec
        if self.tokenizer.quantizer is None:
            raise UserError("CausalTokenization needs tokenizer.quantizer, e.g. aligntok.networks.VectorQuantizer")
        has_head = getattr(decoder, "prefix_head", None) is not None
        if has_head != (self.auxiliary != "none"):
            head = "a prefix_head" if has_head else "no prefix_head"
            raise UserError(
                f"auxiliary {self.auxiliary} does not go with a tokenizer.decoder with {head}: give both"
                " (auxiliary mse or perceptual, prefix_head true) or none"
            )
        columns = spec.grid[1]
        if has_head and spec.num_prefix not in (columns, columns + 1):
            raise UserError(
                f"num_prefix {spec.num_prefix} of encoder and decoder: with a prefix_head it is {columns}, the patches"
                f" of the first row, or {columns + 1}, the first patch and then the first row"
            )
        if self.auxiliary == "perceptual" and not self.loss.perceptual:
            raise UserError("auxiliary perceptual needs a perceptual term of the loss; or set auxiliary mse")

    def decode(self, latent: Tensor, reference: Reference) -> tuple[Tensor, Terms]:
        """Return the reconstruction of a latent (B, C, 1, N), and the terms on what the prefix gives."""
        if self.auxiliary == "none":
            return super().decode(latent, reference)
        reconstruction, prefix = self.tokenizer.decoder.with_prefix(latent)
        return reconstruction, self.prefix_terms(reference, reconstruction.float(), prefix.float())

    def prefix_terms(self, reference: Reference, reconstruction: Tensor, prefix: Tensor) -> Terms:
        """Return the auxiliary terms, whose gradient goes into the prefix alone.

        Args:
            reference: The images, (B, 3, H, W) in [0, 1].
            reconstruction: (B, 3, H, W).
            prefix: Patches of the prefix side by side, (B, 3, patch, K * patch).
        """
        image, spec = reference.image, self.tokenizer.spec
        share = spec.num_prefix / (spec.grid[0] * spec.grid[1])
        target = prefix_target(image, spec.downsampling, spec.num_prefix)
        terms: Terms = {"prefix_mse": (self.prefix_weight * share, F.mse_loss(prefix, target))}
        if self.auxiliary == "perceptual":
            row, rows = prefix[..., -image.shape[-1] :], reconstruction[..., spec.downsampling :, :]
            judged = self.loss.perceptual_terms(reference, torch.cat((row, rows.detach()), dim=-2), self.global_step)
            terms |= {f"prefix_{name}": term for name, term in judged.items()}
        return terms


def prefix_target(image: Tensor, patch: int, num_prefix: int) -> Tensor:
    """Return what the prefix must give: the first row of patches, after the first patch if there is one more token.

    Args:
        image: (B, 3, H, W).
        patch: Side of a patch in pixels.
        num_prefix: Prefix tokens, W / patch or one more.

    Returns:
        Patches side by side, (B, 3, patch, num_prefix * patch).
    """
    row = image[..., :patch, :]
    extra = num_prefix * patch - row.shape[-1]
    return torch.cat((row[..., :extra], row), dim=-1)
