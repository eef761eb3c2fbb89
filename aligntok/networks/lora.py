"""Low-rank updates of linear layers, for the ablation "LoRA instead of full fine-tuning".

Reference:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import check, check_positive

UP, DOWN = "lora_up", "lora_down"


class LoRALinear(nn.Linear):
    """A frozen linear layer, its weights shared, plus a trained update of rank `rank` that is zero at the start.

    >>> [name for name, value in LoRALinear(nn.Linear(4, 4), rank=1).named_parameters() if value.requires_grad]
    ['bias', 'lora_down', 'lora_up']
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias
        self.lora_down = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_up = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(input, self.weight + self.lora_up @ self.lora_down, self.bias)


def add_lora(network: nn.Module, rank: int) -> None:
    """Freeze ``network`` and give each of its linear layers a trained update of the given rank, in place.

    >>> network = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    >>> add_lora(network, rank=1)
    >>> list(merge_lora(network.state_dict()))
    ['0.weight', '0.bias']

    Raises:
        UserError: A rank below 1, or a network without linear layers: nothing of it would learn.
    """
    check_positive(rank=rank)
    learns = any(type(module) is nn.Linear for module in network.modules())
    check(learns, "rank has no effect: the encoder has no linear layers (a convolutional one?); set it to null")
    network.requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, LoRALinear(child, rank))


def merge_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which the updates are added to the weights and gone as keys of their own."""
    merged = {key: value for key, value in state.items() if not key.endswith((UP, DOWN))}
    for key in state:
        if key.endswith(UP):
            layer = key.removesuffix(UP)
            merged[layer + "weight"] = state[layer + "weight"] + state[key] @ state[layer + DOWN]
    return merged
