"""Convolutional decoder from a latent to an image.

The decoder of latent diffusion's autoencoder, which VA-VAE and AlignTok use unchanged: residual blocks, self-attention
at low resolution, nearest-neighbour upsampling. Parameter names are latent diffusion's, so that published weights load
by dropping their `decoder.` prefix.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, section 3.1.
Yao et al., Reconstruction vs. Generation (VA-VAE), arXiv:2501.01423.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.errors import UserError
from aligntok.networks.conv_blocks import NORM_EPS, Level, Middle, check_sizes, resolve_levels
from aligntok.networks.layers import run_blocks


class ConvDecoder(nn.Module):
    """Decode a latent (B, latent_dim, h, w) into an image (B, 3, h * downsampling, w * downsampling).

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

    Reference:
        Rombach et al., arXiv:2112.10752; sizes of VA-VAE, arXiv:2501.01423.
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
            _Level(inputs[i], widths[i], num_blocks, i in attended, i > 0, num_groups) for i in range(len(widths))
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
        image: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return (image + 1) / 2


class _Level(Level):
    """A level, then upsampling by 2 if asked for."""

    def __init__(
        self, width_in: int, width: int, num_blocks: int, attention: bool, upsample: bool, num_groups: int
    ) -> None:
        super().__init__(width_in, width, num_blocks, attention, num_groups)
        self.upsample = _Upsample(width) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.upsample is None else self.upsample(x)


class _Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x
