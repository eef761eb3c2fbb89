"""Perceptual losses: distance between two images in the features of a frozen network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.networks.encoders import VisionEncoder
from aligntok.networks.frozen import Frozen

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's name for its ImageNet VGG-16
CONVNEXT_FILE = "convnext_small-0c510722.pth"  # and for its ImageNet ConvNeXt-S
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels, red green blue
NORM_EPS = 1e-10


class OnDemand(nn.Module):
    """A judge whose published weights come at the first use, so that a stage can be built where there is no network.

    They are looked for in ``$ALIGNTOK_HOME``, then in torch's cache, then downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._network: list[nn.Module] = []  # in a list: no submodule, so in no checkpoint, average or parameter count

    def load(self) -> None:
        """Get the weights now; a stage calls this before the first step, so that a missing file stops it early.

        Raises:
            UserError: The weights are nowhere and cannot be downloaded; says which file to put where.
        """
        if not self._network:
            self._network.append(self.build().eval().requires_grad_(False))

    def build(self) -> nn.Module:
        """Return the network with its weights."""
        raise NotImplementedError  # a loss defines it

    def network_on(self, device: torch.device) -> nn.Module:
        """Return the network on a device."""
        self.load()
        return self._network[0].to(device)


class LPIPS(OnDemand):
    """LPIPS with VGG-16, torchmetrics' implementation, as a mean over the batch.

    Reference:
        Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv:1801.03924.
    """

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Return the mean distance () between two batches (B, 3, H, W) in [0, 1]."""
        distance: Tensor = self.network_on(image.device)(image.float() * 2 - 1, reference.float() * 2 - 1)
        return distance.mean()

    def build(self) -> nn.Module:
        """Return torchmetrics' network with torchvision's VGG-16."""
        from torchmetrics.functional.image.lpips import _LPIPS
        from torchvision.models import vgg16

        network: Any = _LPIPS(net="vgg", pnet_rand=True)
        state = published_state(VGG16_FILE, lambda: vgg16(weights="DEFAULT"), "LPIPS")
        # torchmetrics cuts VGG's `features` into slices and keeps each layer's number in its name
        ours = network.net.state_dict()
        network.net.load_state_dict({key: state["features." + key.split(".", 1)[1]] for key in ours})
        return cast(nn.Module, network)


class LogitDistance(OnDemand):
    """Mean squared difference of a classifier's logits: torchvision's ConvNeXt-S, trained on ImageNet-1k.

    Args:
        image_size: Side in pixels to which images are resized, bilinear with antialiasing.

    Reference:
        Liu et al., ConvNeXt, arXiv:2201.03545; AliTok, arXiv:2506.05289, for the loss.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Return the mean distance () between two batches (B, 3, H, W) in [0, 1]; the gradient goes to ``image``."""
        with torch.no_grad():
            theirs = self.logits(reference)
        return F.mse_loss(self.logits(image), theirs)

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits (B, 1000) of images (B, 3, H, W) in [0, 1]."""
        size = (self.image_size, self.image_size)
        resized = F.interpolate(image.float(), size, mode="bilinear", antialias=True)
        logits: Tensor = self.network_on(image.device)((resized - self.mean) / self.std)
        return logits

    def build(self) -> nn.Module:
        """Return torchvision's network."""
        from torchvision.models import convnext_small

        state = published_state(CONVNEXT_FILE, lambda: convnext_small(weights="IMAGENET1K_V1"), "LogitDistance")
        with torch.device("meta"):
            network: nn.Module = convnext_small()
        network.load_state_dict(state, assign=True)
        return network


class FeatureDistance(nn.Module):
    """LPIPS-like distance in any timm backbone: squared distance of unit-length features, a mean over cells and layers.

    For machines where LPIPS' VGG cannot be had, and to use the frozen encoder itself as the judge.

    Args:
        encoder: The judge; any ``VisionEncoder``.
        layers: Which of its intermediate layers to compare; by default only the encoder's own output layer.
    """

    def __init__(self, encoder: VisionEncoder, layers: list[int] | None = None) -> None:
        super().__init__()
        self.layers = layers or [encoder.layer]
        if min(self.layers) < 0 or max(self.layers) > encoder.layer:
            raise UserError(
                f"perceptual layers {self.layers}: {encoder.name} has layers 0 to {encoder.layer}, the used one"
            )
        self.judge = Frozen(encoder)

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Return the mean distance () between two batches (B, 3, H, W) in [0, 1]; the gradient goes to ``image``."""
        with torch.no_grad():
            theirs = self.judge.network.intermediates(reference.float(), self.layers)
        ours = self.judge.network.intermediates(image.float(), self.layers)
        distances = [
            (F.normalize(a, dim=1, eps=NORM_EPS) - F.normalize(b, dim=1, eps=NORM_EPS)).square().sum(1).mean()
            for a, b in zip(ours, theirs, strict=True)
        ]
        return torch.stack(distances).mean()


def lpips_weights() -> Path | None:
    """Return the local file of torchvision's VGG-16, or ``None``."""
    return local_weights(VGG16_FILE)


def local_weights(file: str) -> Path | None:
    """Return where a file of weights is on this machine, or ``None``: ``$ALIGNTOK_HOME`` first, then torch's cache."""
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if "ALIGNTOK_HOME" in os.environ:
        folders.insert(0, Path(os.environ["ALIGNTOK_HOME"]))
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def published_state(file: str, download: Callable[[], nn.Module], loss: str) -> dict[str, Tensor]:
    """Return torchvision's weights of that file name, or download the network; ``loss`` is who needs them."""
    path = local_weights(file)
    try:
        state: dict[str, Tensor] = torch.load(path, weights_only=True) if path else download().state_dict()
    except OSError as error:
        raise UserError(
            f"{loss} needs torchvision's {file} and cannot download it: put the file into $ALIGNTOK_HOME or"
            f" {Path(torch.hub.get_dir()) / 'checkpoints'}, or use aligntok.losses.FeatureDistance"
        ) from error
    return state
