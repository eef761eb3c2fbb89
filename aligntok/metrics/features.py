"""Features for the Fréchet distance that need no Inception."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from aligntok.networks.encoders import VisionEncoder


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
