"""Perceptual losses: distance between two images in the features of a frozen network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ConvNeXt_Small_Weights, VGG16_Weights, convnext_small, vgg16

from aligntok.errors import check
from aligntok.networks.encoders import VisionEncoder
from aligntok.networks.frozen import Frozen
from aligntok.published import give_published

VGG16_URL, CONVNEXT_URL = VGG16_Weights.IMAGENET1K_V1.url, ConvNeXt_Small_Weights.IMAGENET1K_V1.url
LPIPS_LAYERS = (3, 8, 15, 22, 29)  # the last ReLU before each pooling in VGG-16's `features`
LPIPS_EPS, NORM_EPS = 1e-8, 1e-10
REMEDY = ", or use aligntok.losses.FeatureDistance"


class PerceptualDistance(nn.Module, ABC):
    """Base of the distances between images in a frozen network's features.

    A subclass says what is compared (``features``) and how (``compare``); hold a network with published weights as
    ``Frozen(build)``, and a stage loads it before the first step.

    >>> class Colour(PerceptualDistance):
    ...     def features(self, image): return [image.mean((2, 3))]
    ...     def compare(self, ours, theirs): return (ours[0] - theirs[0]).abs().mean()
    >>> Colour()(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    tensor(1.)
    """

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Return the mean distance () between two batches (B, 3, H, W) in [0, 1]; the gradient goes to ``image``."""
        with torch.no_grad():
            theirs = self.features(reference)
        return self.compare(self.features(image), theirs)

    @abstractmethod
    def features(self, image: Tensor) -> list[Tensor]:
        """Return what is compared of images (B, 3, H, W) in [0, 1], of any size."""

    @abstractmethod
    def compare(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Return the mean distance () between two lists of ``features``."""


class LPIPS(PerceptualDistance):
    """LPIPS with VGG-16: torchvision's network, and the layers' weights that torchmetrics brings.

    >>> distance = LPIPS()  # needs no file yet: `load_frozen` or the first use looks for it

    Reference:
        Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv:1801.03924.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = Frozen(self.build)
        self.mean, self.std = channels(-0.030, -0.088, -0.188), channels(0.458, 0.448, 0.450)  # of pixels in [-1, 1]

    def features(self, image: Tensor) -> list[Tensor]:
        """Return five maps of features, of unit length in each place."""
        maps: list[Tensor] = self.network.on(image.device)[0]((image.float() * 2 - 1 - self.mean) / self.std)
        return maps

    def compare(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Return the weighted squared distance, a mean over places and a sum over layers."""
        weights = self.network.on(ours[0].device)[1]
        terms = [F.conv2d((a - b).square(), weight).mean() for weight, a, b in zip(weights, ours, theirs, strict=True)]
        return torch.stack(terms).sum()

    @staticmethod
    def build() -> nn.Module:
        """Return VGG-16 up to its last compared layer, and for each compared layer the weights of its channels."""
        import torchmetrics

        with torch.device("meta"):
            layers = UnitMaps(*vgg16().features[: LPIPS_LAYERS[-1] + 1])
        give_published(layers, VGG16_URL, "LPIPS", REMEDY, "features.")
        file = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
        weights = torch.load(file, weights_only=True, map_location="cpu").values()  # each (1, width, 1, 1)
        return nn.ModuleList([layers, nn.ParameterList(weights)])


class UnitMaps(nn.Sequential):
    """VGG-16's layers; gives what the compared ones give, of unit length in each place."""

    compiled_as_one = True

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to maps (B, C_i, H_i, W_i)."""
        maps = []
        for index, layer in enumerate(self):
            x = layer(x)
            if index in LPIPS_LAYERS:
                maps.append(x / (x.square().sum(1, keepdim=True) + LPIPS_EPS).sqrt())
        return maps


class LogitDistance(PerceptualDistance):
    """Mean squared difference of a classifier's logits: torchvision's ConvNeXt-S, trained on ImageNet-1k.

    >>> distance = LogitDistance(image_size=224)  # needs no file yet: `load_frozen` or the first use looks for it

    Args:
        image_size: Side in pixels to which images are resized, bilinear with antialiasing.

    Reference:
        Liu et al., ConvNeXt, arXiv:2201.03545; AliTok, arXiv:2506.05289, for the loss.
    """

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        self.image_size = image_size
        self.network = Frozen(self.build)
        self.mean, self.std = channels(0.485, 0.456, 0.406), channels(0.229, 0.224, 0.225)

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the logits (B, 1000)."""
        size = (self.image_size, self.image_size)
        resized = F.interpolate(image.float(), size, mode="bilinear", antialias=True)
        return [self.network.on(image.device)((resized - self.mean) / self.std)]

    def compare(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Return the mean squared difference ()."""
        return F.mse_loss(ours[0], theirs[0])

    @staticmethod
    def build() -> nn.Module:
        """Return torchvision's network."""
        with torch.device("meta"):
            network: nn.Module = convnext_small()
        give_published(network, CONVNEXT_URL, "LogitDistance", REMEDY)
        return network


class FeatureDistance(PerceptualDistance):
    """LPIPS-like distance in any timm backbone: squared distance of unit-length features, a mean over cells and layers.

    For machines where LPIPS' VGG cannot be had, and to compare in the features of the tokenizer's own encoder. Images
    of another size than the encoder's are resized, bicubic with antialiasing.

    >>> encoder = VisionEncoder("resnet10t", image_size=64, downsampling=16, weights=None)
    >>> distance = FeatureDistance(encoder)
    >>> distance(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)).shape
    torch.Size([])

    Args:
        encoder: Gives the features.
        layers: Which of its intermediate layers to compare; by default only the encoder's own output layer.
    """

    def __init__(self, encoder: VisionEncoder, layers: list[int] | None = None) -> None:
        super().__init__()
        self.layers = layers or [encoder.layer]
        there = min(self.layers) >= 0 and max(self.layers) <= encoder.layer
        check(there, f"layers {self.layers}: {encoder.name} has layers 0 to {encoder.layer}, the used one")
        self.judge = Frozen(encoder)

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the maps of the layers, of unit length in each cell."""
        encoder: VisionEncoder = self.judge.network
        maps = encoder.intermediates(encoder.resized(image.float()), self.layers)
        return [F.normalize(x, dim=1, eps=NORM_EPS) for x in maps]

    def compare(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Return the squared distance (), a mean over cells and layers."""
        terms = [(a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(terms).mean()


def channels(red: float, green: float, blue: float) -> nn.Buffer:
    """Return numbers of the three channels as a buffer (3, 1, 1) that is not saved."""
    return nn.Buffer(torch.tensor((red, green, blue)).view(3, 1, 1), persistent=False)
