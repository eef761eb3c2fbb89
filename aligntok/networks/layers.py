"""Layers that transformers of the Llama kind share: RMSNorm, rotary attention, gated MLP.

Touvron et al., LLaMA, arXiv:2302.13971.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.networks.positions import rotate


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation with a gain, in float32 whatever the dtype of its input.

    Reference:
        Zhang and Sennrich, arXiv:1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; same shape and dtype."""
        gain = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, gain, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Self-attention, positions by rotation, with biases.

    Args:
        width: Channels of a token, a multiple of `num_heads`.
        num_heads: Attention heads.
        qk_norm: RMSNorm with gain on each head's queries and keys, before the rotation (arXiv:2302.05442).
        eps: Of these norms.
        causal: A token sees itself and earlier ones, not all.
        dropout: Share of attention weights that are zeroed in training.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: bool = False,
        eps: float = 1e-6,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.causal, self.dropout = num_heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // num_heads, eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, N, width).
            rotary: Rotations of the N positions, from ``rotary_table``.

        Returns:
            (B, N, width).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        y: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return y


class SwiGLU(nn.Module):
    """Gated MLP: W_out (silu(a) * b) with [a | b] = W_in x.

    Args:
        width: Channels in and out.
        hidden: Channels of a and of b.
        bias: Whether both layers have one.

    Reference:
        Shazeer, arXiv:2002.05202.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * hidden, bias=bias)
        self.proj_out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        a, b = self.proj_in(x).chunk(2, dim=-1)
        y: Tensor = self.proj_out(F.silu(a) * b)
        return y
