"""Layers that transformers of the Llama kind share: RMSNorm, rotary attention, gated MLP.

Touvron et al., LLaMA, arXiv:2302.13971.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import check, check_positive
from aligntok.networks.positions import rotate


def check_rotary_sizes(width: int, depth: int, num_heads: int) -> None:
    """Raise a ``UserError`` where the sizes of a transformer with rotation by row and column do not fit each other."""
    check_positive(width=width, depth=depth, num_heads=num_heads)
    check(
        width % (4 * num_heads) == 0,
        f"width={width}: give a multiple of 4 * num_heads={4 * num_heads}, as half of a head turns with the row, half"
        " with the column, in pairs",
    )


class ClassConditional(nn.Module):
    """A network that takes a class, or one that takes none.

    >>> network = ClassConditional()
    >>> network.num_classes, network.null_label = 3, 3
    >>> network.check_condition(torch.tensor([0, 2, 3]))

    Attributes:
        num_classes: Classes 0 .. num_classes - 1; None for an unconditional network.
        null_label: The label that means no class, or None.
    """

    num_classes: int | None
    null_label: int | None

    @property
    def has_null(self) -> bool:
        """Whether there is a null class."""
        return self.null_label is not None

    def null(self, label: Tensor) -> Tensor:
        """Return as many null labels as there are labels, (B,)."""
        assert self.null_label is not None
        return torch.full_like(label, self.null_label)

    def drop(self, label: Tensor, dropped: Tensor) -> Tensor:
        """Return labels (B,), null where ``dropped`` (B,) is true."""
        assert self.null_label is not None
        return label.masked_fill(dropped, self.null_label)

    def prepare(self, label: Tensor) -> Tensor:
        """Return what ``forward`` takes for a label: itself, there is nothing to compute beforehand."""
        return label

    def check_condition(self, label: Tensor | None) -> None:
        """Raise a ``UserError`` if a label (B,) is none of this network's classes; waits for a GPU."""
        if label is None or self.num_classes is None:
            kind = "unconditional" if self.num_classes is None else f"conditional, on num_classes={self.num_classes},"
            given = "not given" if label is None else "given"
            fits = label is None and self.num_classes is None
            check(fits, f"the network is {kind} and labels were {given}: change one of them")
        elif label.numel():
            null = "no null class" if self.null_label is None else f"null class {self.null_label}"
            known = f"classes 0..{self.num_classes - 1} ({null}): set num_classes to the number of classes in the data"
            check_range("label", label, self.num_classes + (self.null_label is not None), known)


def check_range(name: str, ids: Tensor, count: int, known: str) -> None:
    """Raise a ``UserError`` if one of the ids, at least one, is not in 0 .. count - 1; `known` tells what there is."""
    low, high = int(ids.min()), int(ids.max())
    check(0 <= low <= high < count, f"{name} {low if low < 0 else high} is none of the network's {known}")


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation with a gain, in float32 whatever the dtype of its input.

    Reference:
        Zhang and Sennrich, arXiv:1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; same shape and dtype."""
        gain = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, gain, self.eps).to(x.dtype)


class KeyValueCache(NamedTuple):
    """Keys and values of the earlier tokens of one attention layer, and where the new ones belong.

    Attributes:
        keys: (B, num_heads, N, head_dim); the new ones are written into it.
        values: Likewise.
        positions: Of the n new tokens among the N, (n,) int64.
        attend: From queries, keys, values and positions to what a new token sees, for n = 1 among a fixed number N;
            None where it sees all N, and for n = N those before it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


class Attention(nn.Module):
    """Self-attention, positions by rotation, with biases.

    >>> import torch
    >>> from aligntok.networks.positions import rotary_table
    >>> attention = Attention(width=8, num_heads=2, causal=True)
    >>> attention(torch.randn(2, 5, 8), rotary_table(torch.arange(5)[:, None], head_dim=4)).shape
    torch.Size([2, 5, 8])

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

    def forward(
        self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from n tokens (B, n, width) to all that they see; same shape.

        Args:
            x: The whole sequence, or the tokens that follow a cache.
            rotary: Rotations of their positions, from ``rotary_table``.
            cache: Of the tokens before them.
            mask: Which of all tokens may be seen, broadcast to (B, num_heads, n, N) bool; all without it.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, n, head_dim)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        causal = self.causal
        if cache is not None:
            k = cache.keys.index_copy_(2, cache.positions, k)  # (B, heads, N, head_dim)
            v = cache.values.index_copy_(2, cache.positions, v)
            causal = causal and len(cache.positions) > 1  # one new token sees all
        if cache is not None and cache.attend is not None:
            seen = cache.attend(q, k, v, cache.positions)
        else:
            dropout = self.dropout if self.training else 0.0
            seen = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y: Tensor = self.proj(seen.transpose(1, 2).flatten(2))  # (B, n, width)
        return y


class SwiGLU(nn.Module):
    """Gated MLP: W_out (silu(a) * b) with [a | b] = W_in x, and `hidden` channels in a and in b.

    >>> import torch
    >>> SwiGLU(width=8, hidden=16)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])

    Reference:
        Shazeer, arXiv:2002.05202.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * hidden, bias=bias)
        self.proj_out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        a, b = self.proj_in(x).chunk(2, dim=-1)  # (..., hidden)
        y: Tensor = self.proj_out(F.silu(a) * b)
        return y
