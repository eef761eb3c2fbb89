"""A judge of scenes: which object is at which place, and the colour of the ground."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import check, check_positive

STRIDE = 16  # pixels of the finest grid that must be whole: a quarter of it is a cell of the features


class Verdict(NamedTuple):
    """Logits of what is in pictures.

    Attributes:
        objects: At the whole picture and at its four quarters in raster order, (B, 5, num_objects + 1); last: nothing.
        ground: (B, num_grounds).
    """

    objects: Tensor
    ground: Tensor

    def named(self) -> tuple[Tensor, Tensor]:
        """Return the most likely objects (B, 5) and grounds (B,)."""
        return self.objects.argmax(-1), self.ground.argmax(-1)


class SceneJudge(nn.Module):
    """A small convolutional network that names a large object, those in the four quarters, and the ground.

    >>> judge = SceneJudge(num_objects=40, num_grounds=8, image_size=32, width=8)
    >>> objects, ground = judge(torch.rand(2, 3, 32, 32)).named()
    >>> objects.shape, ground.shape
    (torch.Size([2, 5]), torch.Size([2]))

    Args:
        num_objects: Objects that it knows.
        num_grounds: Colours of the ground.
        image_size: Side of the pictures in pixels, a multiple of 16.
        width: Channels of the first layer; the last have four times as many.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, num_objects: int, num_grounds: int, image_size: int = 32, width: int = 32) -> None:
        super().__init__()
        check_positive(num_objects=num_objects, num_grounds=num_grounds, image_size=image_size, width=width)
        check(image_size % STRIDE == 0, f"SceneJudge: image_size {image_size}: give a multiple of {STRIDE}")
        wide, cells = 4 * width, image_size // 4
        self.features = nn.Sequential(
            *layer(3, width, 4, 2),
            *layer(width, 2 * width, 3, 1),
            *layer(2 * width, wide, 4, 2),
        )  # (B, wide, cells, cells)
        self.small = nn.Sequential(nn.Conv2d(wide, wide, cells // 2, cells // 2), nn.ReLU())  # (B, wide, 2, 2)
        self.large = nn.Sequential(nn.Conv2d(wide, 2 * width, 2, 2), nn.ReLU(), nn.Flatten())
        self.name_small = nn.Linear(wide, num_objects + 1)
        self.name_large = nn.Linear(2 * width * (cells // 2) ** 2, num_objects + 1)
        self.name_ground = nn.Linear(wide, num_grounds)

    def forward(self, image: Tensor) -> Verdict:
        """Return the logits of images (B, 3, H, W) in [0, 1]."""
        x = self.features(2 * image - 1)
        small = self.name_small(self.small(x).flatten(2).transpose(1, 2))  # (B, 4, num_objects + 1)
        objects = torch.cat([self.name_large(self.large(x))[:, None], small], dim=1)
        return Verdict(objects, self.name_ground(x.mean((2, 3))))

    def loss(self, image: Tensor, objects: Tensor, ground: Tensor) -> Tensor:
        """Return the cross-entropy () summed over a scene, of images (B, 3, H, W), objects (B, 5) and grounds (B,)."""
        verdict = self(image)
        places = F.cross_entropy(verdict.objects.flatten(0, 1), objects.flatten(), reduction="sum") / len(image)
        return places + F.cross_entropy(verdict.ground, ground)


def layer(channels: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    """Return a convolution, a batch norm and a ReLU."""
    return [nn.Conv2d(channels, width, kernel, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
