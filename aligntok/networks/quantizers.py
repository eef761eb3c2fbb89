"""Vector quantisation: a latent vector becomes the nearest of a codebook's vectors.

Van den Oord et al., VQ-VAE, arXiv:1711.00937; codes that move by online clustering: Zheng and Vedaldi, CVQ-VAE,
arXiv:2307.15139, as AliTok (arXiv:2506.05289) uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.networks.codebook import all_reduced, kmeans, nearest, nearest_of_all_ranks

CLUSTERING_SHARPNESS, CLUSTERING_SHIFT = 10.0, 1e-3  # CVQ-VAE, equation 4


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a latent.

    Attributes:
        latent: The nearest codes, (B, C, h, w), with the gradient estimator of the quantizer.
        tokens: Their numbers, (B, h * w) int64.
        commitment: Mean squared distance that pulls the encoder, ().
        codebook: Mean squared distance that pulls the codes, ().
    """

    latent: Tensor
    tokens: Tensor
    commitment: Tensor
    codebook: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code of a codebook, in float32 whatever autocast says.

    In training mode each forward pass, after its lookup, moves the codes as `update` says, by the vectors of all ranks:
    the codebook stays the same bit for bit on all of them, and is that of one process with the whole batch. Vectors
    and distances stay on their rank. In eval mode nothing changes.

    Args:
        codebook_size: Number of codes, K.
        latent_dim: Channels of a code, C.
        distance: ``euclidean``, or ``cosine``: vectors and codes are brought to length 1 first, also in the output.
        gradient: How the gradient passes the lookup. ``straight_through`` copies it; ``rotation`` rotates and scales it
            as the vector had to be to become its code (Fifty et al., arXiv:2410.06424).
        update: What moves the codes. ``gradient``: the optimizer alone, by the codebook loss; ``clustering``: that, and
            codes in little use move to the vector nearest to them (CVQ-VAE); ``ema``: each code follows the mean of its
            vectors (VQ-VAE-2, arXiv:1906.00446, appendix A.1), no gradient.
        decay: Share of the running usage, and of the mean for ``ema``, that stays at each step, in [0, 1).
        kmeans_start: Begin with k-means on the first training batch, in place of random codes.
        chunk_size: Vectors that are compared with all codes at once: a bound on memory, chunk_size * codebook_size
            distances of 4 bytes.

    Raises:
        UserError: An argument is out of range.
    """

    codebook: Tensor  # a parameter, or a buffer for ``ema``
    usage: Tensor
    counts: Tensor

    def __init__(
        self,
        codebook_size: int,
        latent_dim: int,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        update: Literal["gradient", "clustering", "ema"] = "clustering",
        decay: float = 0.99,
        kmeans_start: bool = False,
        chunk_size: int = 1024,
    ) -> None:
        super().__init__()
        for key, value in {"codebook_size": codebook_size, "latent_dim": latent_dim, "chunk_size": chunk_size}.items():
            if value < 1:
                raise UserError(f"quantizer.{key}={value}: give at least 1")
        if not 0 <= decay < 1:
            raise UserError(f"quantizer.decay={decay}: give a share in [0, 1), such as 0.99")
        self.codebook_size, self.latent_dim = codebook_size, latent_dim
        self.distance, self.gradient, self.update = distance, gradient, update
        self.decay, self.kmeans_start = decay, kmeans_start
        self.max_distances = chunk_size * codebook_size
        codes = torch.randn(codebook_size, latent_dim)  # far apart: codes that begin alike move to one vector, together
        if update == "ema":
            self.register_buffer("codebook", codes)
        else:
            self.codebook = nn.Parameter(codes)
        self.register_buffer("usage", torch.zeros(codebook_size))  # running share of the vectors that chose each code
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize a latent (B, C, h, w); in training mode, move the codes afterwards."""
        with torch.autocast(latent.device.type, enabled=False):
            vectors = self._scaled(latent.float().flatten(2).transpose(1, 2).flatten(0, 1))
            if self.training and self.kmeans_start and not self.usage.any():
                self._set_codes(kmeans(self._codes(), vectors.detach(), self.max_distances))
            tokens = nearest(vectors, self._codes(), self.max_distances)
            codes = self._scaled(F.embedding(tokens, self.codebook.float()))
            commitment, codebook = F.mse_loss(vectors, codes.detach()), F.mse_loss(codes, vectors.detach())
            pass_gradient = straight_through if self.gradient == "straight_through" else rotation_trick
            output = pass_gradient(vectors, codes.detach())
            if self.training:
                self._learn(vectors.detach(), tokens)
        b, _, h, w = latent.shape
        return Quantized(output.view(b, h, w, -1).permute(0, 3, 1, 2), tokens.view(b, h * w), commitment, codebook)

    @torch.no_grad()
    def tokens(self, latent: Tensor) -> Tensor:
        """Return the numbers (B, h * w) of the codes nearest to a latent (B, C, h, w), in raster order."""
        with torch.autocast(latent.device.type, enabled=False):
            vectors = self._scaled(latent.float().flatten(2).transpose(1, 2).flatten(0, 1))
            return nearest(vectors, self._codes(), self.max_distances).view(len(latent), -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes (B, C, N) of tokens (B, N).

        Raises:
            UserError: A token is no code's number.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise UserError(
                f"tokens from {int(tokens.min())} to {int(tokens.max())} are out of range: the codebook has"
                f" {self.codebook_size} codes, 0 to {self.codebook_size - 1}. Use the tokenizer that wrote them"
            )
        return self._scaled(F.embedding(tokens, self.codebook.float())).transpose(1, 2)

    def reset_counts(self) -> None:
        """Begin a new window of ``counts``, which holds how often all ranks chose each code in training since then."""
        self.counts.zero_()

    @staticmethod
    def health(counts: Tensor) -> dict[str, float]:
        """Return what counts (K,) of chosen tokens say about a codebook.

        Returns:
            ``usage``, the share of the codes that were chosen at all; ``perplexity``, the exponential of the entropy,
            in [1, K]; ``dead``, the number of codes that were never chosen.
        """
        share = counts.double() / counts.sum().clamp(min=1)
        used = int((counts > 0).sum())
        perplexity = float(torch.special.entr(share).sum().exp())
        return {"usage": used / len(counts), "perplexity": perplexity, "dead": float(len(counts) - used)}

    @torch.no_grad()
    def _learn(self, vectors: Tensor, tokens: Tensor) -> None:
        """Count the tokens (M,) of the vectors (M, C), and move the codes."""
        counts = all_reduced(torch.bincount(tokens, minlength=self.codebook_size))
        self.counts += counts
        share = counts / counts.sum()
        self.usage.lerp_(share, 1 - self.decay)
        codes = self._codes()
        if self.update == "clustering":
            slope = CLUSTERING_SHARPNESS * self.codebook_size / (1 - self.decay)
            weight = torch.exp(-self.usage * slope - CLUSTERING_SHIFT)
            moving = weight.nonzero().flatten()  # exactly 0 for codes in use: the search is over the others only
            if len(moving):
                old = codes[moving]
                new = nearest_of_all_ranks(old, vectors, self.max_distances)
                self._set_codes(codes.index_copy(0, moving, old.lerp(new, weight[moving, None])))
        elif self.update == "ema":
            sums = all_reduced(torch.zeros_like(codes).index_add_(0, tokens, vectors))
            means = sums / counts.clamp(min=1)[:, None]
            step = (1 - self.decay) * share / self.usage  # as the running sum over the running count of each code
            self._set_codes(codes.lerp(means, step.nan_to_num()[:, None]))

    def _codes(self) -> Tensor:
        """Return the codes as they are compared, (K, C) float32, without gradient."""
        return self._scaled(self.codebook.detach().float())

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Return vectors (..., C) as the distance wants them."""
        return F.normalize(vectors, dim=-1) if self.distance == "cosine" else vectors

    @torch.no_grad()
    def _set_codes(self, codes: Tensor) -> None:
        """Move the codes, but none by a vector that is not finite."""
        self.codebook.copy_(torch.where(codes.isfinite().all(1, keepdim=True), codes, self.codebook))


def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the codes; the gradient passes to the vectors as it is."""
    return codes + (vectors - vectors.detach())  # exactly the codes: the difference is 0


def rotation_trick(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the codes; the gradient passes to the vectors rotated and scaled as vector is to code, both held constant.

    Args:
        vectors: (M, C).
        codes: (M, C), without gradient.

    Reference:
        Fifty et al., arXiv:2410.06424, section 4.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    e, q = F.normalize(vectors.detach(), dim=-1), F.normalize(codes, dim=-1)
    middle = F.normalize(e + q, dim=-1)
    scale = codes.norm(dim=-1, keepdim=True) / vectors.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    rotated = scale * (vectors - 2 * dot(vectors, middle) * middle + 2 * dot(vectors, e) * q)
    return straight_through(rotated, codes)
