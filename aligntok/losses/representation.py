"""REPA: tokens inside a generator are drawn to the features of a frozen vision encoder.

Reference:
    Yu et al., Representation Alignment for Generation, arXiv:2410.06940, section 3.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from aligntok.errors import check
from aligntok.networks.encoders import VisionEncoder
from aligntok.networks.frozen import Frozen


class RepresentationAlignment(nn.Module):
    """Minus the mean cosine between projected tokens of a generator's block and a frozen encoder's features.

    >>> import torch
    >>> encoder = VisionEncoder("vit_tiny_patch16_224", (32, 32), 16, weights=None, model_args={"depth": 1})
    >>> alignment = RepresentationAlignment(encoder, width=8, hidden_width=16)
    >>> alignment(torch.zeros(1, 4, 8), torch.rand(1, 3, 64, 64)).shape  # 4 tokens, 2 x 2 cells
    torch.Size([])

    Args:
        encoder: Gives the features, of images resized to its size; its grid must be the generator's.
        width: Of the generator's tokens.
        hidden_width: Of the projector, three linear layers with SiLU between them; 2048 in the paper.
        block: After which block the tokens are taken, counted from 1; 8 in the paper.
        weight: Of the term in the loss; 0.5 in the paper.
    """

    def __init__(
        self, encoder: VisionEncoder, width: int, hidden_width: int = 2048, block: int = 8, weight: float = 0.5
    ) -> None:
        super().__init__()
        self.encoder = Frozen(encoder)
        self.width, self.block, self.weight = width, block, weight
        self.project = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, encoder.width),
        )

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Return the term () in [-1, 1].

        Args:
            tokens: (B, N, width), row by row.
            image: The same images, (B, 3, H, W) in [0, 1].

        Raises:
            UserError: The encoder's grid has another number of cells than there are tokens, or another aspect.
        """
        features = self.encoder(self.encoder.network.resized(image)).flatten(2).transpose(1, 2)  # (B, N, encoder.width)
        (height, width), (rows, columns) = image.shape[-2:], self.encoder.network.grid
        check(
            rows * columns == tokens.shape[1] and rows * width == columns * height,
            f"the encoder gives {rows * columns} cells ({rows}x{columns}), the generator has {tokens.shape[1]} tokens"
            f" of images of {height}x{width} pixels: change the encoder's image_size or downsampling",
        )
        return -cosine_similarity(self.project(tokens).float(), features.float(), dim=-1).mean()  # ()
