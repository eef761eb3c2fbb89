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

from aligntok.errors import check, check_positive
from aligntok.networks.codebook import (
    HOST_DEVICES,
    counts_of_all_ranks,
    kmeans,
    means_of_all_ranks,
    nearest,
    nearest_of_all_ranks,
    numbers_of,
)

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

    In training mode each forward pass looks up first and then moves the codes as `update` says, by the vectors of all
    ranks. The codebook stays bit-equal on all ranks and is that of one process with the whole batch; vectors and
    distances stay on their rank. In eval mode nothing changes. Which code is nearest depends on the values alone, and
    of codes equally near the first is taken. On a GPU the host waits for the device at the first step alone.

    Args:
        codebook_size: Number of codes, K.
        latent_dim: Channels of a code, C.
        distance: ``euclidean``, or ``cosine``: vectors and codes are normalised to length 1 first, also in the output.
        gradient: How the gradient passes the lookup. ``straight_through`` copies it; ``rotation`` rotates and scales it
            by the rotation and scale that map the vector to its code (Fifty et al., arXiv:2410.06424).
        update: What moves the codes. ``gradient``: only the optimizer, by the codebook loss. ``clustering``: that, and
            rarely used codes move to the vector nearest to them (CVQ-VAE). ``ema``: each code follows the moving
            average of its vectors (VQ-VAE-2, arXiv:1906.00446, appendix A.1), and gets no gradient.
        decay: Decay of the moving averages of usage and, for ``ema``, of the vectors, in [0, 1).
        kmeans_start: Initialise the codes by k-means on the first training batch; without it they are random.
        chunk_size: Vectors that are compared with all codes at once: bounds memory to chunk_size * codebook_size
            distances of 4 bytes.

    Raises:
        UserError: An argument is out of range.

    >>> quantizer = VectorQuantizer(codebook_size=512, latent_dim=8).eval()
    >>> quantized = quantizer(torch.randn(2, 8, 4, 4))
    >>> quantized.latent.shape, quantized.tokens.shape
    (torch.Size([2, 8, 4, 4]), torch.Size([2, 16]))
    >>> torch.equal(quantizer.lookup(quantized.tokens), quantized.latent.flatten(2))
    True
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
        check_positive(codebook_size=codebook_size, latent_dim=latent_dim, chunk_size=chunk_size)
        check(codebook_size > 1, "codebook_size=1: give at least 2 codes")
        check(0 <= decay < 1, f"decay={decay}: give a share in [0, 1), such as 0.99")
        self.codebook_size, self.latent_dim = codebook_size, latent_dim
        self.distance, self.gradient, self.update = distance, gradient, update
        self.decay, self.kmeans_start = decay, kmeans_start
        self.max_distances = chunk_size * codebook_size
        self.may_start = kmeans_start  # until the first training step: later the host need not wait to look at `usage`
        codes = torch.randn(codebook_size, latent_dim)  # far apart: codes that begin alike move to one vector, together
        if update == "ema":
            self.register_buffer("codebook", codes)
        else:
            self.codebook = nn.Parameter(codes)
        self.register_buffer("usage", torch.zeros(codebook_size))  # running share of the vectors that chose each code
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)

    def forward(self, latent: Tensor, ids: Tensor | None = None) -> Quantized:
        """Quantize a latent (B, C, h, w); in training mode, move the codes afterwards.

        The ids of the images, (B,) int64, decide with which vectors k-means begins, and to which of two vectors equally
        near a code moves, in any order of the images and on any number of ranks. None numbers the images by their
        places in the batch, rank after rank.
        """
        b, _, h, w = latent.shape
        with torch.autocast(latent.device.type, enabled=False):
            vectors = self._vectors(latent)  # (B * h * w, C)
            numbers = numbers_of(ids, b, h * w, latent.device) if self.training else None
            if numbers is not None and self.may_start:
                self.may_start = False
                if not self.usage.any():
                    self._set_codes(kmeans(self._codes(), vectors.detach(), numbers, self.max_distances))
            tokens = nearest(vectors, self._codes(), self.max_distances)  # (B * h * w)
            codes = self._scaled(F.embedding(tokens, self.codebook.float()))  # (B * h * w, C)
            commitment, codebook = F.mse_loss(vectors, codes.detach()), F.mse_loss(codes, vectors.detach())
            pass_gradient = straight_through if self.gradient == "straight_through" else rotation_trick
            output = pass_gradient(vectors, codes.detach())  # (B * h * w, C)
            if numbers is not None:
                self._learn(vectors.detach(), tokens, numbers)
        return Quantized(output.view(b, h, w, -1).permute(0, 3, 1, 2), tokens.view(b, h * w), commitment, codebook)

    @torch.no_grad()
    def tokens(self, latent: Tensor) -> Tensor:
        """Return the numbers (B, h * w) of the codes nearest to a latent (B, C, h, w), in raster order."""
        with torch.autocast(latent.device.type, enabled=False):
            return nearest(self._vectors(latent), self._codes(), self.max_distances).view(len(latent), -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes (B, C, N) of tokens (B, N).

        Raises:
            UserError: A token is no code's number. On a GPU, where this check would make the host wait, the kernel
                stops instead.
        """
        if tokens.device.type in HOST_DEVICES and tokens.numel():
            low, high, size = int(tokens.min()), int(tokens.max()), self.codebook_size
            have = f"the codebook has {size} codes, 0 to {size - 1}. Use the tokenizer that wrote them"
            check(0 <= low <= high < size, f"tokens from {low} to {high} are out of range: {have}")
        return self._scaled(F.embedding(tokens, self.codebook.float())).transpose(1, 2)

    def reset_counts(self) -> None:
        """Begin a new window of ``counts``, which holds how often all ranks chose each code in training since then."""
        self.counts.zero_()

    @staticmethod
    def health(counts: Tensor) -> dict[str, float]:
        """Return what counts (K,) of chosen tokens say about a codebook.

        ``usage`` is the share of the codes that were chosen at all, ``perplexity`` the exponential of the entropy, in
        [1, K], ``dead`` the number of codes that were never chosen.
        """
        share = counts.double() / counts.sum().clamp(min=1)
        used = int((counts > 0).sum())
        perplexity = float(torch.special.entr(share).sum().exp())
        return {"usage": used / len(counts), "perplexity": perplexity, "dead": float(len(counts) - used)}

    @torch.no_grad()
    def _learn(self, vectors: Tensor, tokens: Tensor, numbers: Tensor) -> None:
        """Count the tokens (M,) of the vectors (M, C), and move the codes."""
        counts = counts_of_all_ranks(tokens, self.codebook_size)
        self.counts += counts
        share = counts / counts.sum()
        self.usage.lerp_(share, 1 - self.decay)
        codes = self._codes()
        if self.update == "clustering":
            slope = CLUSTERING_SHARPNESS * self.codebook_size / (1 - self.decay)
            weight = torch.exp(-self.usage * slope - CLUSTERING_SHIFT)
            if codes.device.type in HOST_DEVICES:  # exactly 0 for codes in use: leaving them out saves their search
                moving = weight.nonzero().flatten()
                if not len(moving):
                    return
            else:
                moving = torch.arange(len(codes), device=codes.device)
            old = codes[moving]
            new = nearest_of_all_ranks(old, vectors, numbers, self.max_distances)
            self._set_codes(codes.index_copy(0, moving, old.lerp(new, weight[moving, None])))
        elif self.update == "ema":
            step = (1 - self.decay) * share / self.usage  # as the running sum over the running count of each code
            means = means_of_all_ranks(vectors, tokens, counts)
            self._set_codes(codes.lerp(means, step.nan_to_num()[:, None]))

    def _codes(self) -> Tensor:
        """Return the codes as they are compared, (K, C) float32, without gradient."""
        return self._scaled(self.codebook.detach().float())

    def _vectors(self, latent: Tensor) -> Tensor:
        """Return the vectors of a latent (B, C, h, w) as they are compared, (B * h * w, C) float32."""
        return self._scaled(latent.float().flatten(2).transpose(1, 2).flatten(0, 1).contiguous())

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
    """Return the codes (M, C); the gradient passes to the vectors (M, C) rotated and scaled as vector is to code.

    Rotation and scale are held constant, and the codes get no gradient; Fifty et al., arXiv:2410.06424, section 4.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    e, q = F.normalize(vectors.detach(), dim=-1), F.normalize(codes, dim=-1)
    middle = F.normalize(e + q, dim=-1)
    scale = codes.norm(dim=-1, keepdim=True) / vectors.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    rotated = scale * (vectors - 2 * dot(vectors, middle) * middle + 2 * dot(vectors, e) * q)
    return straight_through(rotated, codes)
