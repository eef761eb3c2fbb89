"""Features for the Fréchet distance that need no Inception."""

from __future__ import annotations

from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import check, check_positive
from aligntok.networks.encoders import VisionEncoder, check_name, create_backbone
from aligntok.networks.frozen import Frozen


class EncoderFeatures(nn.Module):
    """One vector of a vision encoder for an image: the mean over its grid, or its class token.

    FD-DINOv2 as published (dgm-eval) is ``pool: class`` of ``vit_large_patch14_dinov2.lvd142m`` at 224 px, that is
    downsampling 16 for images of 256 px. Images and positions are resized by torch and timm here, by PIL and DINOv2's
    code there: do not mix numbers of both.

    >>> import torch
    >>> encoder = VisionEncoder("vit_tiny_patch16_224", (32, 32), 16, weights=None, model_args={"depth": 1})
    >>> EncoderFeatures(encoder, pool="class")(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 192])

    Args:
        encoder: Images of another size than its own are resized.
        name: What the metric is called after (``val/rfd_<name>``); by default the encoder's own name, with ``_class``
            for the class token.
        pool: ``mean`` or ``class``.

    Reference:
        Stein et al., Exposing flaws of generative model evaluation metrics, arXiv:2306.04675.
    """

    def __init__(
        self, encoder: VisionEncoder, name: str | None = None, pool: Literal["mean", "class"] = "mean"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.name = name or encoder.name.split(".")[0] + ("_class" if pool == "class" else "")
        self.num_features = encoder.width

    def forward(self, image: Tensor) -> Tensor:
        """Return features (B, num_features) of an image (B, 3, H, W) in [0, 1].

        Raises:
            UserError: The class token of an encoder that has none.
        """
        image = self.encoder.resized(image)
        return self.encoder.class_token(image) if self.pool == "class" else self.encoder(image).mean((-2, -1))


class TimmFeatures(nn.Module):
    """The vector by which a timm model describes an image, as FD-loss takes it for FDr6.

    That is the class token after the last norm; without one, what the attention pooling gives; else the mean over the
    last feature map, before the head's norm. Images are resized (bicubic, antialias), normalised with the model's own
    pixel statistics and, where its patches do not divide them, padded with zeros at the right and at the bottom.

    The weights are read by ``load_frozen`` or at the first use. They belong to no ``state_dict``.

    >>> features = TimmFeatures("resnet10t", image_size=64, weights=None, name="small")
    >>> features(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 512])

    Args:
        model: timm's name, e.g. ``vit_large_patch14_dinov2.lvd142m``.
        image_size: Side in pixels to which images are resized; by default the model's own.
        weights: ``hub`` (first ``$ALIGNTOK_HOME/<model>.safetensors``), a local .safetensors or .pth file, ``offline``,
            or null: random.
        name: What the metric is called after; by default the model's name up to the dot.
        model_args: More arguments for ``timm.create_model``.

    Raises:
        UserError: No such model; and when they are needed: weights that are missing or do not fit.

    Reference:
        Yang et al., Representation Fréchet Loss, arXiv:2604.28190; its code, frechet_distance/repr_models.py.
    """

    def __init__(
        self,
        model: str,
        image_size: int | None = None,
        weights: str | None = "hub",
        name: str | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_name(model)
        check_positive(image_size=image_size)
        self.model, self.weights, self.model_args = model, weights, model_args or {}
        self.name = name or model.split(".")[0]
        with torch.device("meta"):
            network = timm.create_model(model, num_classes=0, **self.model_args)
        self.num_features: int = network.num_features
        self.image_size: int = image_size or network.pretrained_cfg["input_size"][-1]
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))[-1]
        self.padding = -self.image_size % patch
        self.network = Frozen(self._build)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, num_features) of images (B, 3, H, W) in [0, 1]."""
        network, size = self.network.on(image.device), (self.image_size, self.image_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (image.new_tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        x = network.forward_features(F.pad((image - mean) / std, (0, self.padding, 0, self.padding)))
        if x.dim() == 4:
            check(
                x.shape[1] == self.num_features,
                f"{self.model} gives no map (B, {self.num_features}, h, w): choose another",
            )
            return cast(Tensor, x.mean((-2, -1)))
        if getattr(network, "num_prefix_tokens", 0):
            return cast(Tensor, x[:, 0])
        pool = getattr(network, "attn_pool", None)
        return cast(Tensor, x.mean(1) if pool is None else pool(x))

    def _build(self) -> nn.Module:
        """Return the network with its weights."""
        side = self.image_size + self.padding
        return create_backbone(self.model, (side, side), self.weights, None, self.model_args)
