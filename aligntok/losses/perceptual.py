"""Perceptual losses: distance between two images in the features of a frozen network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.networks.encoders import VisionEncoder
from aligntok.networks.frozen import Frozen

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's name for its ImageNet VGG-16
NORM_EPS = 1e-10


def lpips_weights() -> Path | None:
    """Return the local file of torchvision's VGG-16, or ``None``: ``$ALIGNTOK_HOME`` first, then torch's cache."""
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if "ALIGNTOK_HOME" in os.environ:
        folders.insert(0, Path(os.environ["ALIGNTOK_HOME"]))
    return next((folder / VGG16_FILE for folder in folders if (folder / VGG16_FILE).is_file()), None)


class LPIPS(nn.Module):
    """LPIPS with VGG-16, torchmetrics' implementation, as a mean over the batch.

    The VGG weights are looked for in ``$ALIGNTOK_HOME``, then in torch's cache, then downloaded, all at the first
    use, so that a stage can be built where there is no network.

    Raises:
        UserError: The weights are nowhere and cannot be downloaded; says which file to put where.

    Reference:
        Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv:1801.03924.
    """

    def __init__(self) -> None:
        super().__init__()
        self._network: list[nn.Module] = []  # in a list: no submodule, so in no checkpoint, average or parameter count

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Return the mean distance () between two batches (B, 3, H, W) in [0, 1]."""
        self.load()
        distance: Tensor = self._network[0].to(image.device)(image.float() * 2 - 1, reference.float() * 2 - 1)
        return distance.mean()

    def load(self) -> None:
        """Get the weights now; a stage calls this before the first step, so that a missing file stops it early."""
        if not self._network:
            self._network.append(load_lpips())


def load_lpips() -> nn.Module:
    """Return torchmetrics' LPIPS network with its ImageNet VGG-16."""
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import vgg16

    path = lpips_weights()
    network: Any = _LPIPS(net="vgg", pnet_rand=True)
    try:
        state = torch.load(path, weights_only=True) if path else vgg16(weights="DEFAULT").state_dict()
    except OSError as error:
        raise UserError(
            f"LPIPS needs torchvision's {VGG16_FILE} and cannot download it: put the file into $ALIGNTOK_HOME or"
            f" {Path(torch.hub.get_dir()) / 'checkpoints'}, or use aligntok.losses.FeatureDistance"
        ) from error
    # torchmetrics cuts VGG's `features` into slices and keeps each layer's number in its name
    ours = network.net.state_dict()
    network.net.load_state_dict({key: state["features." + key.split(".", 1)[1]] for key in ours})
    return cast(nn.Module, network.eval().requires_grad_(False))


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
