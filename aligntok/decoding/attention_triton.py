"""The GPU's kernel of ``attend``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_PROGRAMS = 512  # fewer leave a GPU's memory idle unless each has more keys under way
TILES = {True: (256, 8), False: (64, 4)}  # keys of 64 channels at a time, and warps: with few programs and with many


def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """See ``aligntok.decoding.attention.attend``."""
    rows, num_heads, length, head_dim = keys.shape
    assert keys.is_contiguous()
    assert values.is_contiguous()
    q = q.contiguous()
    out = torch.empty_like(q)
    block, warps = TILES[rows * num_heads < FEW_PROGRAMS]
    channels = triton.next_power_of_2(head_dim)
    block = max(16, block * 64 // max(64, channels))  # as many registers for wider heads
    kernel[(rows * num_heads,)](
        q, keys, values, position, out, head_dim**-0.5, length, head_dim, channels, block, num_warps=warps
    )
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    position: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    length: tl.constexpr,
    head_dim: tl.constexpr,
    channels: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Each place of a tile keeps its own softmax (Milakov et al., arXiv:1805.02867): warps meet at the end only."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(position).to(tl.int32) + 1
    channel = tl.arange(0, channels)
    inside = channel < head_dim
    query = tl.load(q + row * head_dim + channel, mask=inside, other=0.0).to(tl.float32) * scale
    largest = tl.full([block], -1e30, tl.float32)  # finite: places without a token weigh exp(-inf) = 0
    total = tl.zeros([block], tl.float32)
    seen = tl.zeros([block, channels], tl.float32)
    for start in range(0, count, block):
        token = start + tl.arange(0, block)
        known = token < count
        place = row * length * head_dim + token[:, None] * head_dim + channel[None, :]
        mask = known[:, None] & inside[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(known, tl.sum(key * query[None, :], axis=1), -float("inf"))
        larger = tl.maximum(largest, score)
        weight = tl.exp(score - larger)
        shrink = tl.exp(largest - larger)
        total = total * shrink + weight
        seen = seen * shrink[:, None] + value * weight[:, None]
        largest = larger
    weight = tl.exp(largest - tl.max(largest, axis=0))
    result = tl.sum(seen * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out + row * head_dim + channel, result.to(out.dtype.element_ty), mask=inside)
