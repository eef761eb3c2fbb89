"""Copies of transformers for decoding, where a few rows meet every weight and time goes by the bytes of the weights."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.networks.layers import RMSNorm

FEW_ROWS = 4  # up to these F.linear reads a float32 weight as fast as memory gives it
Network = TypeVar("Network", bound=nn.Module)


def light_copy(network: Network, dtype: torch.dtype, num_rows: int, compiled: bool = False) -> Network:
    """Return a copy in eval mode whose linear layers have a dtype; it shares all else with the network.

    Norms and the residual keep the network's dtype. On a CPU a copy that will not be compiled has layers that torch
    runs faster there for few rows.

    Args:
        network: Not changed.
        dtype: Of weights and biases of the linear layers, and of what they give.
        num_rows: Tokens at a time.
        compiled: Whether the copy is for ``torch.compile``.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    light = copy.deepcopy(network, shared).eval()
    plain = compiled or next(network.parameters()).device.type != "cpu"
    for module in list(light.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                packed = not plain and can_pack(dtype) and (dtype == torch.bfloat16 or num_rows > FEW_ROWS)
                setattr(module, name, PackedLinear(child, dtype, num_rows) if packed else CastLinear(child, dtype))
            elif isinstance(child, RMSNorm) and not plain:
                setattr(module, name, ShortNorm(child))
    return light


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster with packed weights of this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CastLinear(nn.Module):
    """A linear layer of another dtype."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the weight's dtype."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PackedLinear(CastLinear):
    """The same, with the weight in the order in which oneDNN reads it; F.linear would bring it there at each call.

    These are the operations that torch's own compiler uses on a CPU.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, num_rows: int) -> None:
        super().__init__(linear, dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, num_rows)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the weight's dtype."""
        x = x.to(self.weight.dtype)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


class ShortNorm(nn.Module):
    """RMSNorm in four operations, of which torch takes about ten on a CPU: sqrt(d) gain x / sqrt(|x|^2 + d eps)."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        size = norm.normalized_shape[0]
        assert norm.eps is not None
        self.gain = norm.weight.detach().float() * size**0.5
        self.floor = torch.tensor((size * norm.eps) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; same shape and dtype."""
        values = x.float()
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True).hypot(self.floor)
        return cast(Tensor, (values / length * self.gain).to(x.dtype))
