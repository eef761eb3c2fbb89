"""What latent diffusion's convolutional encoder and decoder share, under its parameter names.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, section 3.1.
"""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.errors import UserError, check_positive

NORM_EPS = 1e-6  # of every GroupNorm in latent diffusion's autoencoder; torch's default is 1e-5


class Middle(nn.Module):
    """Residual block, attention, residual block at the latent's resolution."""

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, num_groups)
        self.attn_1 = SelfAttention(width, num_groups)
        self.block_2 = ResidualBlock(width, width, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same height and width, (B, C, h, w)."""
        x = self.block_2(self.attn_1(self.block_1(x)))
        return x


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for."""

    def __init__(self, width_in: int, width: int, num_blocks: int, attention: bool, num_groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if j else width_in, width, num_groups) for j in range(num_blocks)
        )
        self.attn = nn.ModuleList(SelfAttention(width, num_groups) for _ in range(num_blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same height and width, (B, width, h, w)."""
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return x


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution, added to the input, which a 1x1 convolution fits if the width changes."""

    def __init__(self, width_in: int, width: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, width_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same height and width, (B, C, h, w)."""
        y: Tensor = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class SelfAttention(nn.Module):
    """Self-attention of one head over all positions, added to the input."""

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, width, eps=NORM_EPS)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same height and width, (B, C, h, w)."""
        normed = self.norm(x)
        # contiguous: with another stride in the last axis SDPA falls back to its slowest kernel
        q, k, v = (rearrange(f(normed), "b d h w -> b 1 (h w) d").contiguous() for f in (self.q, self.k, self.v))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) d -> b d h w", h=x.shape[-2])
        update: Tensor = self.proj_out(attended)
        return x + update


def check_sizes(latent_dim: int, width: int, multipliers: Sequence[int], num_blocks: int, num_groups: int) -> None:
    """Raise a ``UserError`` where sizes do not fit each other."""
    check_positive(latent_dim=latent_dim, width=width, num_blocks=num_blocks, num_groups=num_groups)
    if not multipliers or min(multipliers) < 1:
        raise UserError(f"multipliers={list(multipliers)}: give one number of at least 1 per level")
    for multiplier in multipliers:
        if width * multiplier % num_groups:
            raise UserError(
                f"num_groups={num_groups} does not divide the width {width * multiplier} of a level (width={width}, "
                f"multipliers={list(multipliers)}): lower num_groups or change width"
            )


def resolve_levels(attention_levels: Sequence[int], num_levels: int) -> set[int]:
    """Return the levels as indices from 0."""
    for level in attention_levels:
        if not -num_levels <= level < num_levels:
            raise UserError(
                f"attention_levels={list(attention_levels)}: level {level} does not exist, there are {num_levels} "
                f"multipliers: give indices from {-num_levels} to {num_levels - 1}"
            )
    return {level % num_levels for level in attention_levels}
