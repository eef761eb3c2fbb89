"""Features for the Fréchet distance that need no Inception."""

from __future__ import annotations

from torch import Tensor, nn

from aligntok.networks.encoders import VisionEncoder


class EncoderFeatures(nn.Module):
    """A vision encoder's features, averaged over the grid.

    Args:
        encoder: Any ``VisionEncoder``.
        name: What the metric is called after (``val/rfd_<name>``); by default the encoder's own name.
    """

    def __init__(self, encoder: VisionEncoder, name: str | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.name = name or encoder.name.split(".")[0]
        self.num_features = encoder.width

    def forward(self, image: Tensor) -> Tensor:
        """Return features (B, num_features) of an image (B, 3, H, W) in [0, 1]."""
        return self.encoder(image).mean((-2, -1))  # type: ignore[no-any-return]
