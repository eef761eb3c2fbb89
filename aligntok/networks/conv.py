"""Convolutional encoder and decoder between image and latent: those of latent diffusion's autoencoder.

Residual blocks, self-attention at low resolution, strided convolutions down, nearest-neighbour upsampling; VA-VAE and
AlignTok use the decoder unchanged. Parameter names are latent diffusion's, so that published weights load by dropping
their `encoder.` or `decoder.` prefix.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, section 3.1.
Yao et al., Reconstruction vs. Generation (VA-VAE), arXiv:2501.01423.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.errors import UserError, check, check_positive
from aligntok.networks.encoders import pair

NORM_EPS = 1e-6  # of every GroupNorm in latent diffusion's autoencoder; torch's default is 1e-5


class ConvEncoder(nn.Module):
    """Encode an image (B, 3, H, W) in [0, 1] into features (B, 2 * latent_dim, H / downsampling, W / downsampling).

    >>> encoder = ConvEncoder(latent_dim=4, width=8, multipliers=(1, 2), num_blocks=1, image_size=16, num_groups=4)
    >>> encoder(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 8, 8, 8])

    Latent diffusion's ``quant_conv``, which gives mean and log-variance, is ``GaussianAdapter(2 * latent_dim,
    latent_dim)``. VA-VAE f16d32 is `latent_dim=32, width=128, multipliers=(1, 1, 2, 2, 4), num_blocks=2`: 28,413,248
    parameters.

    Args:
        latent_dim: Half of the channels of the features.
        width, multipliers, attention_levels, num_groups: As in ``ConvDecoder``.
        num_blocks: Residual blocks per level; latent diffusion's ``num_res_blocks``.
        image_size: Height and width of the images in pixels.

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
        check_positive(latent_dim=latent_dim, num_blocks=num_blocks)
        widths, attended = check_levels(width, multipliers, attention_levels, num_groups)
        last = len(widths) - 1
        self.image_size, self.width, self.downsampling = pair(image_size), 2 * latent_dim, 2**last
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(w_in, w, num_blocks, i in attended, num_groups, "down" if i < last else None)
            for i, (w_in, w) in enumerate(zip([width, *widths[:-1]], widths, strict=True))
        )
        self.mid = middle(widths[-1], num_groups)
        self.norm_out = NormSiLU(num_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], self.width, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """Return features (B, 2 * latent_dim, h, w) of an image (B, 3, H, W) in [0, 1]; the layers see [-1, 1]."""
        x = self.conv_in((2 * image - 1).contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)  # (B, widths[i], H / 2^i, W / 2^i)
        features: Tensor = self.conv_out(self.norm_out(self.mid(x)))  # (B, 2 * latent_dim, h, w)
        return features


class ConvDecoder(nn.Module):
    """Decode a latent (B, latent_dim, h, w) into an image (B, 3, h * downsampling, w * downsampling).

    >>> decoder = ConvDecoder(latent_dim=4, width=8, multipliers=(1, 2), num_blocks=1, num_groups=4)
    >>> decoder(torch.randn(2, 4, 3, 5)).shape
    torch.Size([2, 3, 6, 10])

    The grid h x w is free and need not be square. VA-VAE f16d32 is `latent_dim=32, width=128,
    multipliers=(1, 1, 2, 2, 4), num_blocks=3`: 41,418,659 parameters.

    Args:
        width: Channels where the multiplier is 1.
        multipliers: Width of each level in units of `width`, from full resolution (level 0) to the latent's resolution;
            with L of them, the downsampling is 2^(L - 1).
        num_blocks: Residual blocks per level in this decoder; latent diffusion's `num_res_blocks` plus one.
        attention_levels: Levels with attention after every residual block, as indices into `multipliers`; negative ones
            count from the latent's resolution, so -1 (the default, as in VA-VAE) is the lowest resolution whatever the
            number of levels. One more attention is always in the middle, at the latent's resolution.
        num_groups: Groups of every GroupNorm; must divide the width of every level (32 in latent diffusion).

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
    ) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, num_blocks=num_blocks)
        widths, attended = check_levels(width, multipliers, attention_levels, num_groups)
        self.latent_dim, self.downsampling = latent_dim, 2 ** (len(widths) - 1)
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], num_groups)
        self.up = nn.ModuleList(  # a level receives what the next lower resolution gives
            Level(w_in, w, num_blocks, i in attended, num_groups, "up" if i > 0 else None)
            for i, (w_in, w) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = NormSiLU(num_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # what the convolutions of CPUs and tensor cores want

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution, where VA-VAE compares gradient norms for its adaptive GAN weight."""
        return self.conv_out.weight

    def forward(self, latent: Tensor) -> Tensor:
        """Return the image (B, 3, H, W), nominally in [0, 1] but not clamped; the layers work in [-1, 1].

        Args:
            latent: (B, latent_dim, h, w), in the scale of the encoder (not normalised for a generator).

        Raises:
            UserError: If `latent` has another number of axes or channels.
        """
        if latent.ndim != 4 or latent.shape[1] != self.latent_dim:
            raise UserError(
                f"latent has shape {tuple(latent.shape)}, the decoder needs (B, {self.latent_dim}, h, w): "
                "give the decoder the adapter's latent_dim"
            )
        latent = latent.contiguous(memory_format=torch.channels_last)
        x = self.mid(self.conv_in(self.post_quant_conv(latent)))  # (B, widths[-1], h, w)
        for level in reversed(self.up):
            x = level(x)  # (B, widths[i], H / 2^i, W / 2^i)
        image: Tensor = self.conv_out(self.norm_out(x))  # (B, 3, H, W)
        return (image + 1) / 2


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for; `resize` is "down", "up" or None.

    >>> Level(4, 8, num_blocks=1, attention=True, num_groups=4, resize="down")(torch.randn(2, 4, 6, 6)).shape
    torch.Size([2, 8, 3, 3])
    """

    compiled_as_one = True

    def __init__(
        self, width_in: int, width: int, num_blocks: int, attention: bool, num_groups: int, resize: str | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if j else width_in, width, num_groups) for j in range(num_blocks)
        )
        self.attn = nn.ModuleList(SelfAttention(width, num_groups) for _ in range(num_blocks if attention else 0))
        self.downsample = downsample(width) if resize == "down" else nn.Identity()
        self.upsample = upsample(width) if resize == "up" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, width_in, h, w) to (B, width, h, w), or half or twice that height and width."""
        for j, block in enumerate(self.block):
            x = block(x)  # (B, width, h, w)
            x = self.attn[j](x) if self.attn else x
        return self.upsample(self.downsample(x))  # type: ignore[no-any-return]


def middle(width: int, num_groups: int) -> nn.Sequential:
    """Return a residual block, attention and a residual block at the latent's resolution."""
    block_1, attn_1 = ResidualBlock(width, width, num_groups), SelfAttention(width, num_groups)
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=attn_1, block_2=ResidualBlock(width, width, num_groups)))


def downsample(width: int) -> nn.Sequential:
    """Halve height and width: one row and column of zeros below and right, then a 3x3 convolution of stride 2."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))


def upsample(width: int) -> nn.Sequential:
    """Double height and width: nearest neighbour, then a 3x3 convolution."""
    return nn.Sequential(OrderedDict(nearest=Doubled(), conv=nn.Conv2d(width, width, 3, padding=1)))


class Doubled(nn.Upsample):
    """Each pixel four times: nearest neighbour at twice the height and width."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2 h, 2 w)."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        # the compiler makes atomic additions of the gradient of an upsampling, and plain sums of that of a repetition
        return repeat(x, "b c h w -> b h a w d c", a=2, d=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution, added to the input, which a 1x1 convolution fits if the width changes."""

    compiled_as_one = True

    def __init__(self, width_in: int, width: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(num_groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = NormSiLU(num_groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same height and width, (B, C, h, w)."""
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return y + self.nin_shortcut(x)  # type: ignore[no-any-return]


class NormSiLU(nn.GroupNorm):
    """GroupNorm and SiLU, which a compiler makes one kernel of."""

    compiled_as_one = True

    def __init__(self, num_groups: int, width: int) -> None:
        super().__init__(num_groups, width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape, (B, width, h, w), and of the same order in memory where it is compiled."""
        return F.silu(self.normalized(x) if torch.compiler.is_compiling() else super().forward(x)).to(x.dtype)

    def normalized(self, x: Tensor) -> Tensor:
        """Return GroupNorm in float32 from the moments of each channel; torch's own gives up channels_last on a GPU."""
        values, grouped = x.float(), (len(x), self.num_groups, -1)
        variance, mean = (y.view(grouped) for y in torch.var_mean(values, (2, 3), correction=0))  # of each channel
        group_mean = mean.mean(2, keepdim=True)  # (B, num_groups, 1)
        group_variance = (variance + (mean - group_mean).square()).mean(2, keepdim=True)
        scale = (self.weight.view(grouped[1:]) * (group_variance + self.eps).rsqrt()).flatten(1)  # (B, width)
        shift = self.bias - group_mean.expand_as(mean).flatten(1) * scale
        normalized: Tensor = values * scale[..., None, None] + shift[..., None, None]
        return normalized


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
        return x + self.proj_out(attended)  # type: ignore[no-any-return]


def check_levels(
    width: int, multipliers: Sequence[int], attention_levels: Sequence[int], num_groups: int
) -> tuple[list[int], set[int]]:
    """Return the width of each level and the indices, from 0, of those with attention, if all fit each other."""
    check_positive(width=width, num_groups=num_groups)
    count, widths = len(multipliers), [width * multiplier for multiplier in multipliers]
    check(bool(widths) and min(widths) > 0, f"multipliers={list(multipliers)}: give at least 1 for each level")
    for wide in widths:
        what = f"num_groups={num_groups} does not divide the width {wide} of a level"
        check(wide % num_groups == 0, f"{what} ({width=}, multipliers={list(multipliers)}): lower it or change width")
    for level in attention_levels:
        what = f"attention_levels={list(attention_levels)}: level {level} does not exist"
        check(-count <= level < count, f"{what}, give indices of multipliers, from {-count} to {count - 1}")
    return widths, {level % count for level in attention_levels}
