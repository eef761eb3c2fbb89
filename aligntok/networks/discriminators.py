"""Patch discriminators: for many patches of an image at once, whether it is real or a reconstruction."""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.errors import UserError, check, check_positive

INIT_STD = 0.02  # arXiv:1611.07004 section 6.2
MAX_GROWTH = 8  # the widest layer of a PatchGAN in units of the first, arXiv:1611.07004 section 6.1
MAX_GROUPS = 32  # Wu and He, Group Normalization, arXiv:1803.08494
PATCH_SLOPE = 0.2  # of the PatchGAN's leaky ReLU, arXiv:1611.07004 section 6.1
BLUR_SLOPE = 0.1  # of AliTok's leaky ReLU, arXiv:2506.05289
BLUR_FILTER = (1.0, 3.0, 3.0, 1.0)  # binomial low-pass filter, arXiv:1904.11486


class PatchDiscriminator(nn.Module):
    """PatchGAN: logits (B, 1, h', w') of an image (B, 3, H, W), each seeing a patch of it (70x70 pixels by default).

    >>> PatchDiscriminator(width=8)(torch.rand(2, 3, 32, 48)).shape
    torch.Size([2, 1, 2, 4])

    Args:
        width: Channels of the first convolution.
        num_layers: Convolutions with stride 2.
        norm: "batch" as published (in training a sample's logits then depend on the other samples of its batch),
            "group" (they do not) or "none". Group norm has 32 groups, or the largest power of 2 that fits.

    Reference:
        Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, arXiv:1611.07004; initialisation
        and sizes of Esser et al., Taming Transformers, arXiv:2012.09841 (2,765,633 parameters by default).
    """

    def __init__(self, width: int = 64, num_layers: int = 3, norm: Literal["batch", "group", "none"] = "batch") -> None:
        super().__init__()
        check_positive(width=width, num_layers=num_layers)
        check(norm in ("batch", "group", "none"), f"norm={norm!r}: give 'batch', 'group' or 'none'")
        self.min_size = 3 * 2**num_layers  # the two last 4x4 convolutions, padded by 1, take 2 off and need 1
        widths = [width * min(2**i, MAX_GROWTH) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(PATCH_SLOPE)]
        bias = norm != "batch"  # batch norm takes it away again
        for i, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            convolution = nn.Conv2d(before, after, 4, stride=2 if i < num_layers else 1, padding=1, bias=bias)
            layers += [convolution, _norm(norm, after), nn.LeakyReLU(PATCH_SLOPE)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_patch)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, 1, H // 2**num_layers - 2, W // 2**num_layers - 2), high for real.

        Args:
            image: (B, 3, H, W) in [0, 1]; the layers work in [-1, 1].

        Raises:
            UserError: If the image is too small for a single logit.
        """
        if min(image.shape[-2:]) < self.min_size:
            raise UserError(
                f"image of {image.shape[-2]}x{image.shape[-1]} pixels, the discriminator needs {self.min_size} on each "
                "side: lower its num_layers"
            )
        logits: Tensor = self.main(image * 2 - 1)
        return logits


class BlurDiscriminator(nn.Module):
    """Discriminator that blurs before it subsamples, without batch statistics.

    >>> BlurDiscriminator(width=8, logit_size=4)(torch.rand(2, 3, 32, 48)).shape
    torch.Size([2, 1, 4, 4])

    Parameter names are those of AliTok's code. The defaults are its sizes: 1,909,889 parameters.

    Args:
        width: Channels of the first convolution and stage; doubled in every later stage.
        num_stages: Stages, each halving the resolution.
        logit_size: Side of the grid of logits. Features are max-pooled to it (repeated if their grid is smaller).

    Reference:
        Luo et al., Open-MAGVIT2, arXiv:2409.04410; AliTok, arXiv:2506.05289; the blur: Zhang, Making Convolutional
        Networks Shift-Invariant Again, arXiv:1904.11486.
    """

    def __init__(self, width: int = 128, num_stages: int = 3, logit_size: int = 16) -> None:
        super().__init__()
        check_positive(width=width, num_stages=num_stages, logit_size=logit_size)
        self.logit_size = logit_size
        widths = [width, *(width * 2**i for i in range(num_stages))]
        self.block_in = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(BLUR_SLOPE))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
                _BlurDownsample(),
                _norm("group", widths[i + 1]),
                nn.LeakyReLU(BLUR_SLOPE),
            )
            for i in range(num_stages)
        )
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(BLUR_SLOPE), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, 1, logit_size, logit_size), high for real, of an image (B, 3, H, W).

        It is in [0, 1] and used as it is, since AliTok's images are in [0, 1] end to end.
        """
        x = self.block_in(image)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.to_logits(F.adaptive_max_pool2d(x, self.logit_size))
        return logits


class _BlurDownsample(nn.Module):
    """Low-pass filter of each channel, every second pixel kept: (B, D, H, W) to (B, D, ceil(H / 2), ceil(W / 2))."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor(BLUR_FILTER)
        kernel = torch.outer(line, line)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2))  # the least that gives ceil(side / 2) pixels
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1])


def _norm(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(math.gcd(MAX_GROUPS, width), width) if norm == "group" else nn.Identity()


def _init_patch(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INIT_STD)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
