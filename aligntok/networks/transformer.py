"""The body of a plain vision transformer: a norm, then pre-norm blocks.

Dosovitskiy et al., arXiv:2010.11929, with a norm before the first block as in CLIP (arXiv:2103.00020).
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from aligntok.errors import check, check_positive

INIT_STD = 0.02  # AliTok, arXiv:2506.05289


class Transformer(nn.Module):
    """Norm and blocks with LayerNorm (eps 1e-5), biases everywhere, exact GELU.

    >>> Transformer(width=8, depth=1, num_heads=2)(torch.randn(2, 5, 8), causal=True).shape
    torch.Size([2, 5, 8])

    Under autocast attention has the dtype of its input, with a softmax in float32; published code is float32.

    Args:
        width: Channels of a token, a multiple of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP in units of `width`.
    """

    def __init__(self, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        check_positive(width=width, depth=depth, num_heads=num_heads)
        check(width % num_heads == 0, f"width={width}: give a multiple of num_heads={num_heads}")
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Transform a sequence.

        Args:
            x: (B, N, width).
            mask: Whether token i, a row, sees token j, (N, N) bool; all see all without it.
            causal: Whether a token sees itself and earlier ones only, instead of a mask.

        Returns:
            (B, N, width), not normalised.
        """
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, attn_mask=mask, is_causal=causal)  # (B, N, width)
        return x


def init_weights(module: nn.Module) -> None:
    """Draw the weights of linear layers and convolutions, for ``Module.apply``; their biases are 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def learned(*shape: int) -> nn.Parameter:
    """Return learned vectors, positions or tokens, of the given shape."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=INIT_STD))
