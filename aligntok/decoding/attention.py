"""Attention of one new token per sequence to the keys up to a position that only the device knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("aligntok::attend", mutates_args=(), device_types="cpu")
def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Return what the new token of each sequence sees; an operator, as ``torch.compile`` knows no such length.

    On a GPU one program for each sequence and head reads its keys and values once, up to the position and no further:
    the attention of one query is bound by reading them.

    Args:
        q: (B, num_heads, 1, head_dim).
        keys: (B, num_heads, N, head_dim), contiguous.
        values: Likewise.
        position: Of the new token among the N, (1,) int64.
    """
    end = int(position) + 1
    return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end]).contiguous()


@attend.register_kernel("cuda")
def _(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    from aligntok.decoding import attention_triton  # only there: not every torch comes with Triton

    return attention_triton.attend(q, keys, values, position)


@attend.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
