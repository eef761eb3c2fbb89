"""CLIP and DINOv2 as torch-fidelity measures in them; only the reading of their weights is ours."""

from __future__ import annotations

import math
import warnings
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS, FeatureExtractorCLIP, build_model
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from aligntok.errors import UserError, check, words_of
from aligntok.files import hash_file
from aligntok.networks.encoders import read_weights
from aligntok.networks.frozen import Frozen
from aligntok.published import published_file

CLIP = {  # dimensions of the joint space
    "clip-rn50": 1024,
    "clip-rn101": 512,
    "clip-rn50x4": 640,
    "clip-rn50x16": 768,
    "clip-rn50x64": 1024,
    "clip-vit-b-32": 512,
    "clip-vit-b-16": 512,
    "clip-vit-l-14": 768,
    "clip-vit-l-14-336px": 768,
}
DINOV2 = {"dinov2-vit-s-14": 384, "dinov2-vit-b-14": 768, "dinov2-vit-l-14": 1024, "dinov2-vit-g-14": 1536}
DINOV2_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}  # in timm's names
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
DINOV2_OFFSET = 0.1  # DINOv2 resizes its positions by (cells + 0.1) / trained cells


class FidelityFeatures(nn.Module):
    """Image embedding of CLIP, or class token of DINOv2, as torch-fidelity 0.4 takes it.

    Its own network and preprocessing: 8-bit images, resized as TensorFlow 1 does (bilinear, no antialias) to the
    network's size, 224 px for DINOv2. DINOv2's network is timm's, with positions resized as DINOv2 does: torch-fidelity
    would fetch and run a repository's code.

    The weights are read from ``weights``, else as in ``aligntok.published``, by ``load_frozen`` or at the first use.
    They belong to no ``state_dict``. Files are read as plain tensors. OpenAI's own files of CLIP are TorchScript: one
    is opened only if its SHA-256 is the published one.

    >>> features = FidelityFeatures("clip-vit-l-14")  # needs no file yet
    >>> features.name, features.num_features
    ('clip-vit-l-14', 768)

    Args:
        name: One of torch-fidelity's, in ``CLIP`` and ``DINOV2``.
        weights: Path of OpenAI's or Meta's file, or of their state dict as ``.pth`` or ``.safetensors``.

    Raises:
        UserError: No such name; and when the weights are needed: they are nowhere and cannot be downloaded, or the file
            holds something else.

    Reference:
        Radford et al., CLIP, arXiv:2103.00020; Oquab et al., DINOv2, arXiv:2304.07193.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        widths = CLIP | DINOV2
        check(name in widths, f"torch-fidelity has no features {name!r}: use one of {', '.join(widths)}")
        self.name, self.weights = name, weights
        self.num_features = widths[name]
        self.network = Frozen(self._build)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, num_features) of images (B, 3, H, W) in [0, 1], which are rounded to 8 bits."""
        pixels = image.float().clamp(0, 1).mul(255).round().byte()
        return self.network.on(image.device)(pixels)[0]  # type: ignore[no-any-return]

    def _build(self) -> nn.Module:
        """Return the network with its weights."""
        remedy = ", give its path as `weights`, or choose other features"
        url, file = published_source(self.name)
        path = str(published_file(url, f"features {self.name}", remedy, self.weights, file))
        try:
            return Clip(self.name, clip_state(self.name, path)) if file else DinoV2(self.name, read_weights(path))
        except UserError:
            raise
        except Exception as error:  # whatever strict loading makes of a wrong file
            found = f"{type(error).__name__}: {words_of(error)}"
            raise UserError(f"{path} does not hold the weights of {self.name} ({found}): put {url} there") from error


def published_source(name: str) -> tuple[str, str | None]:
    """Return the address of features' weights, and the name of the file where that is not the end of the address."""
    if name in CLIP:
        return MODEL_URLS[name], f"{name}-{MODEL_METADATA[name]['hash']}.pt"  # as torch-fidelity caches it
    return DINOV2_URL.format(f"dinov2_vit{name[-4]}14"), None


class Clip(FeatureExtractorCLIP):  # type: ignore[misc]  # torch-fidelity has no types
    """torch-fidelity's extractor, with a state dict in place of a file that it would open."""

    def __init__(self, name: str, state: dict[str, Tensor]) -> None:
        FeatureExtractorBase.__init__(self, name, ["clip"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = build_model(state, torch.float32)
        self.resolution = self.model.visual.input_resolution


class DinoV2(FeatureExtractorDinoV2):  # type: ignore[misc]  # torch-fidelity has no types
    """torch-fidelity's extractor, with timm's network in place of one from a repository."""

    def __init__(self, name: str, state: dict[str, Tensor]) -> None:
        FeatureExtractorBase.__init__(self, name, ["dinov2"])
        self.feature_extractor_internal_dtype = torch.float32
        grid = self.INPUT_IMAGE_SIZE // state["patch_embed.proj.weight"].shape[-1]
        state["pos_embed"] = resized_positions(state["pos_embed"], grid)
        overlay = {"state_dict": state, "num_classes": 0}
        options: dict[str, Any] = {"img_size": self.INPUT_IMAGE_SIZE, "num_classes": 0, "pretrained": True}
        size = DINOV2_SIZES[name[-4]]
        self.model = timm.create_model(f"vit_{size}_patch14_dinov2", pretrained_cfg_overlay=overlay, **options)


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Return positions (1, 1 + N, D), the first of the class token, for a square of ``grid`` cells, as DINOv2 does."""
    token, cells = positions[:, :1], positions[:, 1:]
    side = math.isqrt(cells.shape[1])
    if side == grid:
        return positions
    cells = cells.reshape(1, side, side, -1).movedim(-1, 1)
    cells = F.interpolate(cells, scale_factor=(grid + DINOV2_OFFSET) / side, mode="bicubic")
    return torch.cat([token, cells.flatten(2).mT], dim=1)


def clip_state(name: str, path: str) -> dict[str, Tensor]:
    """Return the state dict of a file of CLIP; of TorchScript, which holds code, only of the published one."""
    if hash_file(path) != MODEL_METADATA[name]["hash"]:
        return read_weights(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
        module: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]  # torch left it so
    return module.state_dict()
