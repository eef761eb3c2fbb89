"""The transformer decoder of a token sequence, causal or not: AliTok, arXiv:2506.05289, sections 3.2 to 3.4."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from aligntok.errors import UserError, check
from aligntok.networks.encoders import grid_of
from aligntok.networks.transformer import Transformer, init_weights, learned

STAGES_OWN = ("buffer_tokens", "positions", "prefix_head.")  # may differ from stage to stage


class TokenDecoder(nn.Module):
    """Decode N quantized vectors, prefix first, then the grid in raster order, into an image.

    >>> decoder = TokenDecoder(4, image_size=16, patch_size=8, width=8, depth=1, num_heads=2, num_prefix=1)
    >>> decoder(torch.randn(2, 4, 1, 5)).shape  # 1 + 2 * 2 vectors
    torch.Size([2, 3, 16, 16])

    Learned buffer tokens are put in front. With `causal`, the first stage's decoder, a patch depends on its own vector
    and on earlier ones only, so that the encoder learns tokens that an autoregressive model can predict. AliTok's
    sizes: width 1024, depth 24, num_heads 16; causal with num_buffer 1 in stage 1, not causal with 32 or 64 in stage 2.

    Args:
        image_size: Height and width of the image in pixels; one number for a square image.
        patch_size: Side in pixels of the patch that a vector of the grid gives, the downsampling factor.
        width, depth, num_heads, mlp_ratio: As in ``Transformer``.
        num_prefix: Vectors before those of the grid, at least 0.
        num_buffer: Learned tokens in front, at least 0, or 1 (the start token) if `causal`.
        causal: Whether a token sees itself and earlier ones only.
        prefix_head: Whether the prefix gives patches too, through a head of its own (``with_prefix``).

    Raises:
        UserError: If an argument does not fit the others.
    """

    def __init__(
        self,
        latent_dim: int,
        image_size: int | tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        num_prefix: int,
        num_buffer: int = 1,
        causal: bool = False,
        prefix_head: bool = False,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check(num_prefix >= prefix_head, f"num_prefix={num_prefix}: give at least 0, or 1 with prefix_head")
        check(num_buffer >= causal, f"num_buffer={num_buffer}: give at least 0, or 1 if causal")
        self.latent_dim, self.downsampling, self.causal = latent_dim, patch_size, causal
        self.grid, self.num_prefix = grid_of(image_size, patch_size), num_prefix
        self.sequence_length = num_prefix + self.grid[0] * self.grid[1]
        self.proj_in = nn.Linear(latent_dim, width)
        self.buffer_tokens = learned(num_buffer, width) if num_buffer else None
        self.positions = learned(num_buffer + self.sequence_length, width)
        self.transformer = Transformer(width, depth, num_heads, mlp_ratio)
        self.norm_out = nn.LayerNorm(width)
        self.head = PatchHead(width, patch_size)
        self.prefix_head = PatchHead(width, patch_size) if prefix_head else None
        self.apply(init_weights)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last linear layer, where the adaptive GAN weight compares gradient norms."""
        return self.head.proj.weight

    def forward(self, latent: Tensor) -> Tensor:
        """Return the image (B, 3, H, W) in (0, 1).

        Args:
            latent: (B, latent_dim, h, w) or (B, latent_dim, 1, N), read in raster order.

        Raises:
            UserError: If `latent` has other channels or another length than the decoder was built for.
        """
        return self.head(self._outputs(latent)[:, self.num_prefix :], *self.grid)  # type: ignore[no-any-return]

    def with_prefix(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image, and the patches of the prefix side by side, (B, 3, patch_size, num_prefix * patch_size).

        Raises:
            UserError: As ``forward``, or the decoder has no prefix head.
        """
        if self.prefix_head is None:
            raise UserError("the loss of the prefix needs a head for it: set prefix_head=True")
        prefix, patches = self._outputs(latent).tensor_split((self.num_prefix,), dim=1)
        return self.head(patches, *self.grid), self.prefix_head(prefix, 1, self.num_prefix)

    def carried_over(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of a previous stage's decoder as this decoder can load it.

        Buffer tokens and positions of another count, and a prefix head that is missing there, keep this decoder's own
        values; those that this decoder lacks are dropped. Whatever else does not fit is left for a strict load to name.
        """
        result = {key: value for key, value in self.state_dict().items() if key.startswith(STAGES_OWN)}
        for key, value in state.items():
            if not key.startswith(STAGES_OWN) or (key in result and result[key].shape == value.shape):
                result[key] = value
        return result

    def _outputs(self, latent: Tensor) -> Tensor:
        """Return the normalised outputs (B, N, width) at the vectors of a latent."""
        if latent.ndim != 4 or latent.shape[1] != self.latent_dim or latent[0, 0].numel() != self.sequence_length:
            (h, w), p = self.grid, self.downsampling
            raise UserError(
                f"latent has shape {tuple(latent.shape)}, the decoder needs {self.latent_dim} channels and"
                f" {self.num_prefix} + {h}x{w} = {self.sequence_length} vectors for images of {h * p}x{w * p} pixels:"
                " set latent_dim, image_size, patch_size and num_prefix to what the encoder gives"
            )
        x: Tensor = self.proj_in(latent.flatten(2).transpose(1, 2))  # (B, N, width)
        if self.buffer_tokens is not None:
            x = torch.cat((self.buffer_tokens.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        x = self.transformer(x + self.positions, causal=self.causal)  # (B, num_buffer + N, width)
        return self.norm_out(x[:, -self.sequence_length :])  # type: ignore[no-any-return]


class PatchHead(nn.Module):
    """A linear layer from a token to the pixels of its patch, then a 1x1 convolution over RGB and a sigmoid.

    >>> PatchHead(width=8, patch_size=4)(torch.randn(2, 6, 8), h=2, w=3).shape
    torch.Size([2, 3, 8, 12])
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(width, 3 * patch_size**2)
        self.colour = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """Return the image (B, 3, h * patch_size, w * patch_size) in (0, 1) of tokens (B, h * w, width)."""
        p = self.patch_size
        pixels = rearrange(self.proj(x), "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=h, w=w, p1=p, p2=p)
        return self.colour(pixels).sigmoid()  # type: ignore[no-any-return]
