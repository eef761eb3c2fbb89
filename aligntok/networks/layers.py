"""Layers that transformers of the Llama kind share: RMSNorm, rotary attention, gated MLP.

Touvron et al., LLaMA, arXiv:2302.13971.
"""

from __future__ import annotations

from typing import cast

import torch
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

    def forward(self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Attend.

        Args:
            x: (B, N, width).
            rotary: Rotations of the N positions, from ``rotary_table``.
            cache: Keys and values of earlier tokens, which are seen too; those of these N are written to it.
            start: Position of the first of the N tokens in the cache, see there.

        Returns:
            (B, N, width).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        mask = None
        if cache is not None:
            k, v, mask = cache.write(k, v, start)
        dropout = self.dropout if self.training else 0.0
        causal = self.causal and x.shape[1] > 1  # a single token is the last one, it sees all
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return cast(Tensor, y)


class KeyValueCache:
    """Keys and values of an attention layer at the positions so far, in tensors of fixed shape.

    Args:
        keys: Zeros (B, num_heads, length, head_dim).
        values: Likewise.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def write(self, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write those of N more positions and return all that their queries may see.

        Args:
            k: (B, num_heads, N, head_dim).
            v: Likewise.
            start: Position of the first of them: 0, or one at a time. A tensor (1,) keeps the shape of what is
                returned fixed, for a compiled step.

        Returns:
            Keys, values and a mask: views of the positions up to these and None; with a tensor all and a mask.
        """
        if isinstance(start, Tensor):
            self.keys.index_copy_(2, start, k)
            self.values.index_copy_(2, start, v)
            return self.keys, self.values, (torch.arange(self.keys.shape[2], device=k.device) <= start)[None]
        end = start + k.shape[2]
        assert start == 0 or k.shape[2] == 1  # a causal mask counts queries and keys from the same position
        self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end], None


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
