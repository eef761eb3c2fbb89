"""Vision-transformer decoder from a latent to an image, one patch per latent position.

Zheng et al., Diffusion Transformers with Representation Autoencoders (RAE), arXiv:2510.11690; the blocks are those of
He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377. RAE's class token, which its decoder
drops at the end, is left out.
"""

from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from aligntok.errors import UserError, check_positive
from aligntok.networks.layers import run_blocks
from aligntok.networks.positions import sincos_positions

INIT_STD = 0.02  # ViT-MAE's initializer_range


class TransformerDecoder(nn.Module):
    """Decode a latent (B, latent_dim, h, w) into an image (B, 3, H, W) with h = H / patch_size, w = W / patch_size.

    >>> import torch
    >>> decoder = TransformerDecoder(latent_dim=4, image_size=(8, 16), patch_size=4, width=8, depth=1, num_heads=2)
    >>> decoder(torch.randn(2, 4, 2, 4)).shape
    torch.Size([2, 3, 8, 16])

    RAE's sizes are width/depth/num_heads 768/12/12 (B), 1024/24/16 (L), 1152/28/16 with `mlp_ratio=3.5556` (XL).

    Args:
        latent_dim: Channels of the latent.
        image_size: Height and width of the image in pixels; one number for a square image.
        patch_size: Side in pixels of the patch that one latent position gives, the downsampling factor.
        width: Channels of a token, a multiple of 4 (the position table) and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP in units of `width` (4 in arXiv:2111.06377).
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        UserError: If an argument does not fit the others.

    Reference:
        Zheng et al., arXiv:2510.11690.
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
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, patch_size=patch_size, depth=depth, num_heads=num_heads)
        if width < 1 or width % 4 or width % num_heads:
            raise UserError(f"width={width}: give a multiple of 4 and of num_heads={num_heads}")
        height_width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(height_width) != 2 or any(side < 1 or side % patch_size for side in height_width):
            raise UserError(f"image_size={image_size}: give one or two multiples of patch_size={patch_size}")

        self.latent_dim = latent_dim
        self.downsampling = patch_size
        self.grid = (height_width[0] // patch_size, height_width[1] // patch_size)
        self.gradient_checkpointing = gradient_checkpointing
        self.proj_in = nn.Linear(latent_dim, width)
        self.register_buffer("positions", sincos_positions(*self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)  # as in timm's blocks
        self.head = nn.Linear(width, patch_size**2 * 3)
        self.apply(_init_linear)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last linear layer, where the adaptive GAN weight compares gradient norms."""
        weight = self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, latent: Tensor) -> Tensor:
        """Decode.

        Args:
            latent: (B, latent_dim, h, w), in the scale of the encoder (not normalised for a generator).

        Returns:
            Image (B, 3, H, W), nominally in [0, 1] but not clamped. The layers themselves work in [-1, 1].

        Raises:
            UserError: If `latent` has other channels or another grid than the decoder was built for.
        """
        if latent.ndim != 4 or latent.shape[1:] != (self.latent_dim, *self.grid):
            h, w = self.grid
            raise UserError(
                f"latent has shape {tuple(latent.shape)}, the decoder needs (B, {self.latent_dim}, {h}, {w}), for "
                f"images of {h * self.downsampling}x{w * self.downsampling} pixels: set latent_dim, image_size and "
                "patch_size to what the encoder gives"
            )
        x: Tensor = self.proj_in(rearrange(latent, "b c h w -> b (h w) c")) + self.positions  # (B, h * w, width)
        x = run_blocks(self.blocks, x, recompute=self.gradient_checkpointing)  # (B, h * w, width)
        patches: Tensor = self.head(self.norm(x))  # (B, h * w, patch_size^2 * 3)
        h, w = self.grid
        p = self.downsampling
        image = rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=h, w=w, p1=p, p2=p)
        return (image + 1) / 2


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
