"""Convolutional encoder and decoder between image and latent: those of latent diffusion's autoencoder.

Residual blocks, self-attention at low resolution, strided convolutions down, nearest-neighbour upsampling; VA-VAE and
AlignTok use the decoder unchanged. Parameter names are latent diffusion's, so that published weights load by dropping
their `encoder.` or `decoder.` prefix.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, section 3.1.
Yao et al., Reconstruction vs. Generation (VA-VAE), arXiv:2501.01423.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.errors import UserError, check_positive
from aligntok.networks.encoders import pair
from aligntok.networks.layers import run_blocks

NORM_EPS = 1e-6  # of every GroupNorm in latent diffusion's autoencoder; torch's default is 1e-5


class ConvEncoder(nn.Module):
    """Encode an image (B, 3, H, W) in [0, 1] into features (B, 2 * latent_dim, H / downsampling, W / downsampling).

    >>> encoder = ConvEncoder(latent_dim=4, width=8, multipliers=(1, 2), num_blocks=1, image_size=16, num_groups=4)
    >>> encoder(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 8, 8, 8])

    An adapter follows as in every tokenizer: ``GaussianAdapter(2 * latent_dim, latent_dim)`` is latent diffusion's
    ``quant_conv``, a mean and a log-variance. VA-VAE f16d32 is `latent_dim=32, width=128, multipliers=(1, 1, 2, 2, 4),
    num_blocks=2`: 28,413,248 parameters.

    Args:
        latent_dim: Half of the channels that it gives.
        width: Channels where the multiplier is 1.
        multipliers: Width of each level in units of `width`, from full resolution to the latent's resolution.
        num_blocks: Residual blocks per level; latent diffusion's ``num_res_blocks``.
        image_size: Height and width of the images in pixels.
        attention_levels: As in ``ConvDecoder``.
        num_groups: Groups of every GroupNorm.

    Raises:
        UserError: If an argument does not fit the others.
    """

    def __init__(
        self,
        latent_dim: int,
        width: int,
        multipliers: Sequence[int],
        num_blocks: int,
        image_size: int | tuple[int, int] = 256,
        attention_levels: Sequence[int] = (-1,),
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(latent_dim, width, multipliers, num_blocks, num_groups)
        self.image_size = pair(image_size)
        self.width, self.downsampling = 2 * latent_dim, 2 ** (len(multipliers) - 1)
        attended = resolve_levels(attention_levels, len(multipliers))
        widths = [width * multiplier for multiplier in multipliers]
        inputs = [width, *widths[:-1]]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(inputs[i], widths[i], num_blocks, i in attended, num_groups, "down" if i < len(widths) - 1 else None)
            for i in range(len(widths))
        )
        self.mid = Middle(widths[-1], num_groups)
        self.norm_out = nn.GroupNorm(num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], self.width, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """Return features (B, 2 * latent_dim, h, w) of an image (B, 3, H, W) in [0, 1]; the layers see [-1, 1]."""
        x = self.conv_in((2 * image - 1).contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)  # (B, widths[i], H / 2^i, W / 2^i)
        features: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (B, 2 * latent_dim, h, w)
        return features


class ConvDecoder(nn.Module):
    """Decode a latent (B, latent_dim, h, w) into an image (B, 3, h * downsampling, w * downsampling).

    >>> decoder = ConvDecoder(latent_dim=4, width=8, multipliers=(1, 2), num_blocks=1, num_groups=4)
    >>> decoder(torch.randn(2, 4, 3, 5)).shape
    torch.Size([2, 3, 6, 10])

    The grid h x w is free and need not be square. VA-VAE f16d32 is `latent_dim=32, width=128,
    multipliers=(1, 1, 2, 2, 4), num_blocks=3`: 41,418,659 parameters.

    Args:
        latent_dim: Channels of the latent.
        width: Channels where the multiplier is 1.
        multipliers: Width of each level in units of `width`, from full resolution (level 0) to the latent's resolution.
        num_blocks: Residual blocks per level in this decoder; latent diffusion's `num_res_blocks` plus one.
        attention_levels: Levels with attention after every residual block, as indices into `multipliers`; negative ones
            count from the latent's resolution, so -1 (the default, as in VA-VAE) is the lowest resolution whatever the
            number of levels. One more attention is always in the middle, before the first level.
        num_groups: Groups of every GroupNorm; must divide the width of every level (32 in latent diffusion).
        gradient_checkpointing: Recompute each level in the backward pass instead of keeping its activations.

    Raises:
        UserError: If an argument does not fit the others.
    """

    def __init__(
        self,
        latent_dim: int,
        width: int,
        multipliers: Sequence[int],
        num_blocks: int,
        attention_levels: Sequence[int] = (-1,),
        num_groups: int = 32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(latent_dim, width, multipliers, num_blocks, num_groups)
        self.latent_dim = latent_dim
        self.downsampling = 2 ** (len(multipliers) - 1)
        self.gradient_checkpointing = gradient_checkpointing
        attended = resolve_levels(attention_levels, len(multipliers))
        widths = [width * multiplier for multiplier in multipliers]
        inputs = [*widths[1:], widths[-1]]  # a level receives what the next lower resolution gives

        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], num_groups)
        self.up = nn.ModuleList(
            Level(inputs[i], widths[i], num_blocks, i in attended, num_groups, "up" if i > 0 else None)
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(num_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # what the convolutions of CPUs and tensor cores want

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, where VA-VAE compares gradient norms for its adaptive GAN weight."""
        weight = self.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, latent: Tensor) -> Tensor:
        """Decode.

        Args:
            latent: (B, latent_dim, h, w), in the scale of the encoder (not normalised for a generator).

        Returns:
            Image (B, 3, h * downsampling, w * downsampling), nominally in [0, 1] but not clamped. The layers themselves
            work in latent diffusion's [-1, 1].

        Raises:
            UserError: If `latent` has another number of axes or channels.
        """
        if latent.ndim != 4 or latent.shape[1] != self.latent_dim:
            raise UserError(
                f"latent has shape {tuple(latent.shape)}, the decoder needs (B, {self.latent_dim}, h, w): "
                "give the decoder the adapter's latent_dim"
            )
        latent = latent.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(self.post_quant_conv(latent))  # (B, widths[-1], h, w)
        x = run_blocks([self.mid, *reversed(self.up)], x, recompute=self.gradient_checkpointing)  # (B, width, H, W)
        image: Tensor = self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)
        return (image + 1) / 2


class Middle(nn.Module):
    """Residual block, attention, residual block at the latent's resolution."""

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, num_groups)
        self.attn_1 = SelfAttention(width, num_groups)
        self.block_2 = ResidualBlock(width, width, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same height and width, (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))  # type: ignore[no-any-return]


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for; then half or twice the size."""

    def __init__(
        self,
        width_in: int,
        width: int,
        num_blocks: int,
        attention: bool,
        num_groups: int,
        resize: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if j else width_in, width, num_groups) for j in range(num_blocks)
        )
        self.attn = nn.ModuleList(SelfAttention(width, num_groups) for _ in range(num_blocks if attention else 0))
        self.downsample = Downsample(width) if resize == "down" else None
        self.upsample = Upsample(width) if resize == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, width_in, h, w) to (B, width, h, w), or half or twice that height and width."""
        for j, block in enumerate(self.block):
            x = block(x)  # (B, width, h, w)
            if self.attn:
                x = self.attn[j](x)
        for resize in (self.downsample, self.upsample):
            x = x if resize is None else resize(x)
        return x


class Downsample(nn.Module):
    """Halve height and width: one row and column of zeros below and right, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to (B, width, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to (B, width, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[no-any-return]


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
