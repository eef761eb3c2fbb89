"""Convolutional encoder from an image to a latent: that of latent diffusion, for VA-VAE and plain VAEs.

Parameter names are latent diffusion's, as in ``conv_decoder``.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, section 3.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.networks.conv_blocks import NORM_EPS, Level, Middle, check_sizes, resolve_levels
from aligntok.networks.encoders import pair


class ConvEncoder(nn.Module):
    """Encode an image (B, 3, H, W) in [0, 1] into features (B, 2 * latent_dim, H / downsampling, W / downsampling).

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
            _Level(inputs[i], widths[i], num_blocks, i in attended, i < len(widths) - 1, num_groups)
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
            x = level(x)
        features: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return features


class _Level(Level):
    """A level, then halving if asked for."""

    def __init__(
        self, width_in: int, width: int, num_blocks: int, attention: bool, downsample: bool, num_groups: int
    ) -> None:
        super().__init__(width_in, width, num_blocks, attention, num_groups)
        self.downsample = _Downsample(width) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(x)


class _Downsample(nn.Module):
    """Halve height and width: one row and column of zeros below and right, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.pad(x, (0, 1, 0, 1)))
        return x
