"""The next token from the newest one alone: the network's own blocks with a cache of keys and values."""

from __future__ import annotations

import copy
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.layers import KeyValueCache, RMSNorm

FEW_ROWS = 4  # up to these F.linear reads a float32 weight as fast as memory gives it


class CachedTransformer:
    """Gives the logits that the network would, from the newest tokens alone.

    >>> network = AutoregressiveTransformer(8, (2, 2), 1, num_classes=3, width=16, depth=1, num_heads=2)
    >>> cached = CachedTransformer(network, num_rows=2, dtype=torch.float32)
    >>> logits = cached(network.start_ids(torch.tensor([0, 2]), 2)[:, None], start=0)
    >>> logits.shape  # of the first token
    torch.Size([2, 8])

    Args:
        network: Not changed. Its weights are shared where their dtype is the same.
        num_rows: Sequences at a time.
        dtype: Of the weights of linear layers, and of keys and values; norms, residual and softmax stay in float32.
        pack: Whether weights may be stored in oneDNN's order, which ``torch.compile`` and ``NativeStep`` cannot read.

    Attributes:
        network: A copy in eval mode, with ``StepLinear`` and ``StepNorm`` for its linear layers and norms.
        caches: Keys and values of each block, both (num_rows, num_heads, N, head_dim).
    """

    def __init__(
        self, network: AutoregressiveTransformer, num_rows: int, dtype: torch.dtype, pack: bool = True
    ) -> None:
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        self.network = copy.deepcopy(network, shared).eval()
        for parent in list(self.network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear | RMSNorm):
                    delattr(parent, name)  # a plain function takes its place: calling a module costs 3 us
                    step = StepNorm(child) if isinstance(child, RMSNorm) else StepLinear(child, dtype, num_rows, pack)
                    setattr(parent, name, step)
        shape = (num_rows, network.num_heads, network.sequence_length, network.width // network.num_heads)
        empty = torch.zeros(shape, dtype=dtype, device=network.rotary.device)
        self.caches = [(empty.clone(), empty.clone()) for _ in network.blocks]

    def load(self, network: AutoregressiveTransformer) -> None:
        """Read the weights of a network of the same sizes, into the same memory; not those that are packed."""
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | RMSNorm):
                attrgetter(name)(self.network).load(module)
        self.network.embed.weight.copy_(network.embed.weight)

    def __call__(self, ids: Tensor, start: int, rows: slice = slice(None)) -> Tensor:
        """Continue sequences and keep what the next call needs.

        Args:
            ids: Rows of the network's embedding table, newest last, (R, n) int64: all from position 0, or one more.
            start: Position of the first of them.
            rows: Which R of the sequences.

        Returns:
            Logits of the token after these, (R, codebook_size) float32.
        """
        network, end = self.network, start + ids.shape[1]
        positions = torch.arange(start, end, device=ids.device)
        x = network.embed(ids).float()  # (R, n, width)
        rotary = network.rotary[positions]
        for block, (keys, values) in zip(network.blocks, self.caches, strict=True):
            x = block(x, rotary, KeyValueCache(keys[rows, :, :end], values[rows, :, :end], positions))
        return network.head(network.norm(x[:, -1])).float()  # type: ignore[no-any-return]  # (R, codebook_size)


class StepLinear:
    """A linear layer for `num_rows` rows with its weight in another dtype, in oneDNN's own order where that is faster.

    ``F.linear`` reorders a weight at each call, which costs a few rows 1.1 to 1.7 times the product itself.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, num_rows: int, pack: bool) -> None:
        self.weight: Tensor = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        gains = num_rows > FEW_ROWS if dtype == torch.float32 else dtype == torch.bfloat16
        self.packed = pack and gains and self.weight.device.type == "cpu" and can_pack(dtype)
        if self.packed:  # private, as are the next two: torch has no public call that keeps a reordered weight
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, num_rows)

    def load(self, linear: nn.Linear) -> None:
        """Take the weight of another linear layer, of the same size."""
        assert not self.packed
        self.weight.copy_(linear.weight)
        if self.bias is not None:
            self.bias.copy_(linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) of any dtype to (..., out)."""
        x = x.to(self.weight.dtype)
        if self.packed:  # private: the product with such a weight
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


class StepNorm:
    """RMSNorm as sqrt(d) gain x / sqrt(|x|^2 + d eps): four operations, where torch takes about twenty on a CPU."""

    def __init__(self, norm: RMSNorm) -> None:
        size, eps = norm.normalized_shape[0], norm.eps
        assert eps is not None
        self.gain = norm.weight.detach().float() * size**0.5
        self.eps_norm = torch.tensor((size * eps) ** 0.5, device=self.gain.device)

    def load(self, norm: RMSNorm) -> None:
        """Take the gain of another norm, of the same size."""
        self.gain.copy_(norm.weight.float() * norm.normalized_shape[0] ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis, in float32; same shape and dtype."""
        values = x.float()
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True).hypot_(self.eps_norm)
        return values.div(norm).mul_(self.gain).to(x.dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # private: whether this CPU has bfloat16 products has no public name
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
