"""An autoregressive transformer one token at a time, with the keys and values of the earlier ones kept.

A few rows meet every weight, so that a step lasts as long as the weights take to come from memory; between two layers
there are as few operations as we could find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.networks.ar import AutoregressiveTransformer, Block
from aligntok.networks.layers import RMSNorm
from aligntok.networks.positions import rotate

FEW_ROWS = 4  # up to these F.linear reads a float32 weight as fast as memory gives it


class CachedTransformer:
    """Gives the logits that the network would, from the newest tokens alone.

    Args:
        network: Not changed. Its weights are shared where their dtype is the same.
        num_rows: Sequences at a time.
        dtype: Of the weights of linear layers, and of keys and values; norms, residual and softmax stay in float32.
        pack: Whether weights may be kept in the order that torch's products of few rows want. ``torch.compile`` and
            ``NativeStep`` need them as they are.
    """

    def __init__(
        self, network: AutoregressiveTransformer, num_rows: int, dtype: torch.dtype, pack: bool = True
    ) -> None:
        def light(linear: nn.Linear) -> FewRowLinear:
            return FewRowLinear(linear, dtype, num_rows, pack)

        self.table = network.embed.weight.detach().float()
        self.rotary = network.rotary
        device = network.rotary.device
        shape = (num_rows, network.num_heads, network.sequence_length, network.width // network.num_heads)
        self.layers = [
            Layer(cast(Block, block), light, *(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
            for block in network.blocks
        ]
        self.norm, self.head = ShortNorm([network.norm]), light(network.head)

    def __call__(self, ids: Tensor, start: int | Tensor, rows: slice = slice(None)) -> Tensor:
        """Continue sequences and keep what the next call needs.

        Args:
            ids: Rows of the network's embedding table, newest last, (n, R) int64: all from position 0, or one more.
            start: Position of the first of them. A tensor (1,) keeps all shapes fixed, for ``torch.compile``.
            rows: Which R of the sequences.

        Returns:
            Logits of the token after these, (R, codebook_size) float32.
        """
        device, end = self.rotary.device, self.layers[0].keys.shape[2]
        if isinstance(start, Tensor):
            positions, mask = start, (torch.arange(end, device=device) <= start)[None]
        else:
            end, mask = start + len(ids), None
            positions = torch.arange(start, end, device=device)
        rotary = self.rotary[positions][:, None, None, None]  # of (n, R, q or k, num_heads, head_dim)
        x = F.embedding(ids.flatten(), self.table)
        for layer in self.layers:
            x = layer(x, rotary, positions, mask, rows, slice(end))
        return self.head(self.norm(x[-ids.shape[1] :])).float()


class Layer:
    """A block of the network.

    Args:
        block: Of the network.
        light: Makes a linear layer that is fast for few rows.
        keys: Room for those of all rows and positions, (num_rows, num_heads, N, head_dim).
        values: Likewise.
    """

    def __init__(self, block: Block, light: Callable[[nn.Linear], FewRowLinear], keys: Tensor, values: Tensor) -> None:
        attention, mlp = block.attention, block.mlp
        self.norm_attention, self.norm_mlp = ShortNorm([block.norm_attention]), ShortNorm([block.norm_mlp])
        self.norm_qk = ShortNorm([cast(RMSNorm, attention.q_norm), cast(RMSNorm, attention.k_norm)])
        self.qkv, self.proj = light(attention.qkv), light(attention.proj)
        self.proj_in, self.proj_out = light(mlp.proj_in), light(mlp.proj_out)
        self.keys, self.values = keys, values

    def __call__(
        self, x: Tensor, rotary: Tensor, positions: Tensor, mask: Tensor | None, rows: slice, seen: slice
    ) -> Tensor:
        """Map the new tokens (n * R, width), in place; `seen` are the positions that they attend to."""
        keys, values, n = self.keys[rows], self.values[rows], len(positions)
        num_rows, num_heads, _, _ = keys.shape
        qkv = self.qkv(self.norm_attention(x)).view(n, num_rows, 3, num_heads, -1)
        qk = rotate(self.norm_qk(qkv[:, :, :2].float()), rotary).to(qkv.dtype)
        q, k = qk.permute(2, 1, 3, 0, 4)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, qkv[:, :, 2].permute(1, 2, 0, 3))
        y = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen], mask, is_causal=n > 1)
        x += self.proj(y.permute(2, 0, 1, 3).reshape(x.shape))
        gate, value = self.proj_in(self.norm_mlp(x)).chunk(2, dim=-1)
        x += self.proj_out(F.silu(gate).mul_(value))
        return x


class ShortNorm:
    """RMSNorm in four operations, of which torch takes about ten on a CPU: sqrt(d) gain x / sqrt(|x|^2 + d eps).

    Args:
        norms: One, or one for each index of the third last axis.
    """

    def __init__(self, norms: list[RMSNorm]) -> None:
        size, eps = norms[0].normalized_shape[0], norms[0].eps
        assert eps is not None
        gains = torch.stack([norm.weight.detach().float() for norm in norms])
        self.gain = gains[:, None] * size**0.5 if len(norms) > 1 else gains[0] * size**0.5
        self.floor = torch.tensor((size * eps) ** 0.5, device=gains.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis of float32 numbers."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)
        return x.div(length).mul_(self.gain)


class FewRowLinear:
    """A linear layer in the way that is fastest for few rows.

    On a CPU F.linear brings a weight into oneDNN's order at each call; here that is done once, with the operations that
    torch's own compiler uses, except where it is no gain.

    Args:
        linear: (..., in) to (..., out).
        dtype: Of its weight and of its result.
        num_rows: At a time.
        pack: Whether to do so.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, num_rows: int, pack: bool) -> None:
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        gains = num_rows > FEW_ROWS if dtype == torch.float32 else dtype == torch.bfloat16
        self.packed = pack and gains and self.weight.device.type == "cpu" and can_pack(dtype)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, num_rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), of any dtype."""
        x = x.to(self.weight.dtype)
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
