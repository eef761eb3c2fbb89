"""Vision-transformer decoder from a latent to an image, one patch per latent position.

Zheng et al., Diffusion Transformers with Representation Autoencoders (RAE), arXiv:2510.11690; the blocks are those of
He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377. RAE's class token, which its decoder
drops at the end, is left out.
"""

from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive
from aligntok.networks.encoders import grid_of
from aligntok.networks.positions import sincos_positions
from aligntok.networks.transformer import init_weights


class TransformerDecoder(nn.Module):
    """Decode a latent (B, latent_dim, h, w) into an image (B, 3, H, W) with h = H / patch_size, w = W / patch_size.

    >>> import torch
    >>> decoder = TransformerDecoder(latent_dim=4, image_size=(8, 16), patch_size=4, width=8, depth=1, num_heads=2)
    >>> decoder(torch.randn(2, 4, 2, 4)).shape
    torch.Size([2, 3, 8, 16])

    RAE's sizes are width/depth/num_heads 768/12/12 (B), 1024/24/16 (L), 1152/28/16 with `mlp_ratio=3.5556` (XL).

    Args:
        image_size: Height and width of the image in pixels; one number for a square image.
        patch_size: Side in pixels of the patch that one latent position gives, the downsampling factor.
        width: Channels of a token, a multiple of 4 (the position table) and of `num_heads`.
        depth, num_heads, mlp_ratio: As in ``Transformer``.

    Raises:
        UserError: If an argument does not fit the others.
    """

    positions: Tensor

    def __init__(
        self,
        latent_dim: int,
        image_size: int | tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, width=width, depth=depth, num_heads=num_heads)
        fits = width % 4 == width % num_heads == 0
        check(fits, f"width={width}: give a multiple of 4 and of num_heads={num_heads}")
        self.latent_dim, self.downsampling, self.grid = latent_dim, patch_size, grid_of(image_size, patch_size)
        self.proj_in = nn.Linear(latent_dim, width)
        self.register_buffer("positions", sincos_positions(*self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)  # as in timm's blocks
        self.head = nn.Linear(width, patch_size**2 * 3)
        self.apply(init_weights)  # as in ViT-MAE

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last linear layer, where the adaptive GAN weight compares gradient norms."""
        return self.head.weight

    def forward(self, latent: Tensor) -> Tensor:
        """Return the image (B, 3, H, W), nominally in [0, 1] but not clamped; the layers work in [-1, 1].

        Args:
            latent: (B, latent_dim, h, w), in the scale of the encoder (not normalised for a generator).

        Raises:
            UserError: If `latent` has other channels or another grid than the decoder was built for.
        """
        (h, w), p = self.grid, self.downsampling
        if latent.ndim != 4 or latent.shape[1:] != (self.latent_dim, h, w):
            raise UserError(
                f"latent has shape {tuple(latent.shape)}, the decoder needs (B, {self.latent_dim}, {h}, {w}), for "
                f"images of {h * p}x{w * p} pixels: set latent_dim, image_size and patch_size to what the encoder gives"
            )
        x: Tensor = self.proj_in(rearrange(latent, "b c h w -> b (h w) c")) + self.positions  # (B, h * w, width)
        for block in self.blocks:
            x = block(x)  # (B, h * w, width)
        patches: Tensor = self.head(self.norm(x))  # (B, h * w, patch_size^2 * 3)
        image = rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=h, w=w, p1=p, p2=p)
        return (image + 1) / 2
