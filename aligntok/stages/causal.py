"""The first stage of AliTok: a causal decoder makes a bidirectional encoder write tokens that follow from earlier ones.

Reference:
    AliTok: Towards Sequence Modeling Alignment between Tokenizer and Autoregressive Model, arXiv:2506.05289.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import check, check_nonnegative
from aligntok.losses.reconstruction import ReconstructionLoss, Reference, Terms
from aligntok.networks.tokenizer import Tokenizer
from aligntok.stages.optimization import Optimization
from aligntok.stages.tokenizer_stage import COMMITMENT_WEIGHT, TokenizerStage


class CausalTokenization(TokenizerStage):
    """Everything learns: encoder, adapter, quantizer and decoder of a discrete tokenizer.

    A causal decoder has to write the first row of patches from the first few tokens alone. K prefix tokens in front of
    the grid's give these tokens a context. Where the decoder has a ``prefix_head``, the prefix must reconstruct the
    first row of patches: K is then the number of columns, or in AliTok's first version one more, for the first patch
    twice. The loss gains ``prefix_weight * K / (h * w)`` times the mean squared error of that row;
    ``auxiliary: perceptual`` adds the perceptual terms, in their own weights, of the image whose first row comes from
    the prefix and whose other rows are held constant.

    >>> from aligntok.networks import LinearAdapter, QueryEncoder, TokenDecoder, VectorQuantizer
    >>> encoder = QueryEncoder(16, 8, 8, 1, 2, num_prefix=2)
    >>> decoder = TokenDecoder(4, 16, 8, 8, 1, 2, num_prefix=2, causal=True, prefix_head=True)
    >>> tokenizer = Tokenizer(encoder, LinearAdapter(8, 4), decoder, VectorQuantizer(32, 4))
    >>> stage = CausalTokenization(tokenizer, auxiliary="mse")

    Args:
        tokenizer: A discrete one; loss, optimization and kl_weight are those of every tokenizer stage.
        loss: Of the reconstruction.
        optimization: Of tokenizer and discriminator.
        kl_weight: Of the KL divergence.
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
        check_nonnegative(prefix_weight=prefix_weight, commitment_weight=commitment_weight)
        self.auxiliary, self.prefix_weight, self.commitment_weight = auxiliary, prefix_weight, commitment_weight
        self.check_parts()

    def check_parts(self) -> None:
        """Raise a ``UserError`` where tokenizer and losses do not fit each other."""
        spec, has_head = self.tokenizer.spec, getattr(self.tokenizer.decoder, "prefix_head", None) is not None
        text = "CausalTokenization needs tokenizer.quantizer, e.g. aligntok.networks.VectorQuantizer"
        check(self.tokenizer.quantizer is not None, text)
        check(
            has_head == (self.auxiliary != "none"),
            f"auxiliary {self.auxiliary} does not go with a tokenizer.decoder with {'a' if has_head else 'no'}"
            " prefix_head: give both (auxiliary mse or perceptual, prefix_head true) or none",
        )
        columns = spec.grid[1]
        check(
            not has_head or spec.num_prefix in (columns, columns + 1),
            f"num_prefix {spec.num_prefix} of encoder and decoder: with a prefix_head it is {columns}, the patches of"
            f" the first row, or {columns + 1}, the first patch and then the first row",
        )
        missing = self.auxiliary == "perceptual" and not self.loss.perceptual
        check(not missing, "auxiliary perceptual needs a perceptual term of the loss; or set auxiliary mse")

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
