"""An encoder from an image to a sequence of tokens: AliTok, arXiv:2506.05289, section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError, check
from aligntok.networks.encoders import VisionEncoder, check_size, grid_of, pair
from aligntok.networks.transformer import Transformer, init_weights, learned


class QueryEncoder(nn.Module):
    """A vision transformer over the image's patches and learned queries; the outputs at the queries are the tokens.

    >>> encoder = QueryEncoder(image_size=16, patch_size=8, width=8, depth=1, num_heads=2, num_prefix=1)
    >>> encoder(torch.rand(2, 3, 16, 16)).shape  # 1 + 2 * 2 tokens
    torch.Size([2, 8, 1, 5])

    The queries are `num_prefix` for the prefix, then one per patch in raster order, N in all. Nothing but training ties
    a query to its patch, unless it starts from its patch (`from_patches`). AliTok's sizes: width 768, depth 12,
    num_heads 12, patch_size 16.

    Args:
        image_size: Height and width of the image in pixels; one number for a square image.
        patch_size: Side of a patch in pixels, the downsampling factor.
        width, depth, num_heads, mlp_ratio: As in ``Transformer``.
        num_prefix: Queries before those of the grid, at least 0.
        causal: The ablation: patches in raster order see earlier ones only, a query sees earlier queries and the
            patches up to its own. In the prefix, each query sees one more patch of the first row than the one before;
            where it has more queries than the row has patches, the first ones see the first patch only.
        from_patches: Add each patch to its query: small networks then learn in hundreds of steps to look at the image,
            where separate queries need thousands (ours; off in AliTok).
        backbone: A vision encoder whose features take the place of the embedded patches, so that the tokens are
            semantic as well.

    Raises:
        UserError: If an argument does not fit the others.
    """

    mask: Tensor | None

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        num_prefix: int,
        causal: bool = False,
        from_patches: bool = False,
        backbone: VisionEncoder | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check(num_prefix >= 0, f"num_prefix={num_prefix}: give at least 0")
        check(not causal or backbone is None, "causal: a backbone sees the whole image at once, set backbone null")
        h, w = grid_of(image_size, patch_size)
        self.width, self.image_size, self.downsampling = width, pair(image_size), patch_size
        self.num_prefix, self.grid = num_prefix, (1, num_prefix + h * w)
        self.backbone, self.from_patches = backbone, from_patches
        if backbone is None:
            self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        elif backbone.grid != (h, w) or backbone.image_size != self.image_size:
            raise UserError(
                f"backbone takes images of {backbone.image_size} to a grid of {backbone.grid}, the encoder images of"
                f" {self.image_size} to {(h, w)}: give both one image_size, and patch_size as downsampling"
            )
        else:
            self.embed = nn.Conv2d(backbone.width, width, 1)
        self.positions = learned(h * w, width)
        self.queries = learned(self.grid[1], width)
        self.transformer = Transformer(width, depth, num_heads, mlp_ratio)
        self.norm_out = nn.LayerNorm(width)
        for part in (self.embed, self.transformer):  # not the backbone
            part.apply(init_weights)
        self.register_buffer("mask", causal_mask(h, w, num_prefix) if causal else None, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, width, 1, N) of an image (B, 3, H, W) in [0, 1].

        Raises:
            UserError: The image has another size than the encoder was built for.
        """
        check_size(image, self.image_size)
        seen = image if self.backbone is None else self.backbone(image)
        patches = self.embed(seen).flatten(2).transpose(1, 2)  # (B, h * w, width)
        queries = self.queries.expand(len(image), -1, -1)  # (B, N, width)
        if self.from_patches:
            queries = queries + F.pad(patches, (0, 0, self.num_prefix, 0))
        x = self.transformer(torch.cat((patches + self.positions, queries), dim=1), self.mask)
        features: Tensor = self.norm_out(x[:, patches.shape[1] :])  # (B, N, width)
        return features.transpose(1, 2).unsqueeze(2)  # (B, width, 1, N)


def causal_mask(h: int, w: int, num_prefix: int) -> Tensor:
    """Return which of the patches, then queries (columns) each of them (rows) sees in the causal encoder, bool."""
    patches = torch.arange(h * w)
    prefix = (torch.arange(num_prefix) - max(num_prefix - w, 0)).clamp(min=0)
    own = torch.cat((prefix, patches))  # patch of each query
    sees_patches = patches[None] <= torch.cat((patches, own))[:, None]
    queries = torch.ones(len(own), len(own), dtype=torch.bool).tril()
    sees_queries = torch.cat((torch.zeros(len(patches), len(own), dtype=torch.bool), queries))
    return torch.cat((sees_patches, sees_queries), dim=1)
