"""Diffusion transformer: the velocity from noise to latent, given the time and a class.

Yao et al., Reconstruction vs. Generation (LightningDiT), arXiv:2501.01423, section 4; after Peebles and Xie, DiT,
arXiv:2212.09748. The wide head is that of Zheng et al., RAE, arXiv:2510.11690, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive
from aligntok.networks.layers import Attention, ClassConditional, SwiGLU, check_rotary_sizes
from aligntok.networks.positions import grid_coordinates, rotary_table, sincos_positions, wave_frequencies

INIT_STD = 0.02  # of label table and time embedding, arXiv:2212.09748
NUM_TIME_FEATURES = 256  # arXiv:2212.09748
NORM_EPS = 1e-6  # arXiv:2501.01423


@dataclass(frozen=True)
class WideHead:
    """Size of a wide and shallow head behind the blocks, for latents of many channels.

    >>> WideHead(width=2048, depth=2, num_heads=16)  # RAE's
    WideHead(width=2048, depth=2, num_heads=16)

    Reference:
        Zheng et al., RAE, arXiv:2510.11690, section 5.
    """

    width: int
    depth: int
    num_heads: int

    def __post_init__(self) -> None:
        check_rotary_sizes(self.width, self.depth, self.num_heads)


class DiT(ClassConditional):
    """Predict the velocity of a latent at a time of the way from noise (t = 0) to data (t = 1).

    >>> network = DiT(latent_shape=(4, 2, 2), num_classes=3, width=16, depth=1, num_heads=2)
    >>> network(torch.randn(5, 4, 2, 2), t=torch.rand(5), label=torch.arange(5) % 3).shape
    torch.Size([5, 4, 2, 2])

    LightningDiT's sizes are in ``configs/size/dit_*.yaml``. With a wide head the blocks of `width` only make the
    condition, one per token, of the head's blocks, which read the latent anew. RAE's own network differs from that in
    two details that we leave out: random Fourier features of the time, and a second SiLU on the condition.

    Args:
        latent_shape: (C, h, w) of a latent.
        num_classes: Classes 0 .. num_classes - 1.
        width: Channels of a token.
        depth: Number of blocks.
        num_heads: Attention heads; `width` is a multiple of 4 times this.
        patch_size: Side of the square of latent positions that makes one token.
        qk_norm: Normalise queries and keys; stabler in long runs (arXiv:2302.05442).
        null_class: One more class, `num_classes`, that means no class.
        wide_head: RAE's wide head.

    Reference:
        Yao et al., arXiv:2501.01423, section 4.
    """

    other_forwards: tuple[str, ...] = ("forward_with_tokens",)  # a sharded network gathers its weights for them too
    positions: Tensor
    rotary: Tensor
    wide_rotary: Tensor

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int = 1,
        qk_norm: bool = False,
        null_class: bool = True,
        wide_head: WideHead | None = None,
    ) -> None:
        super().__init__()
        check_rotary_sizes(width, depth, num_heads)
        check_positive(patch_size=patch_size, num_classes=num_classes)
        fits = len(latent_shape) == 3 and min(latent_shape) >= 1 and not any(n % patch_size for n in latent_shape[1:])
        three = f"channels, height and width, the last two multiples of patch_size={patch_size}"
        check(fits, f"latent_shape={list(latent_shape)}: give {three}")
        self.latent_shape = channels, h, w = (latent_shape[0], latent_shape[1], latent_shape[2])
        self.num_classes, self.width, self.patch_size = num_classes, width, patch_size
        self.null_label = num_classes if null_class else None
        self.grid = (h // patch_size, w // patch_size)
        patch_channels = channels * patch_size**2

        self.embed_latent = nn.Linear(patch_channels, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_label = nn.Embedding(num_classes + null_class, width)
        self.register_buffer("positions", sincos_positions(*self.grid, width), persistent=False)
        self.register_buffer("rotary", self._rotary(width // num_heads), persistent=False)
        self.blocks = nn.ModuleList(self.make_block(width, num_heads, qk_norm) for _ in range(depth))
        self.wide_head = wide_head
        if wide_head is not None:
            self.embed_wide = nn.Linear(patch_channels, wide_head.width)
            self.embed_condition = nn.Linear(width, wide_head.width)
            self.register_buffer("wide_rotary", self._rotary(wide_head.width // wide_head.num_heads), persistent=False)
            self.wide_blocks = nn.ModuleList(
                Block(wide_head.width, wide_head.num_heads, qk_norm) for _ in range(wide_head.depth)
            )
        self.head = Head(width if wide_head is None else wide_head.width, patch_channels)
        self._init_weights()

    def forward(self, latent: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return the velocity (B, C, h, w).

        Args:
            latent: Points on the way from noise to normalised latents, (B, C, h, w).
            t: Their times in [0, 1], (B,).
            label: Classes, (B,) int64; ``null_label`` for none. Their range is not looked at: see ``check_condition``.

        Raises:
            UserError: A latent of another shape.
        """
        return self._outputs(latent, t, self.embed_label(label), len(self.blocks))[0]

    def forward_with_tokens(self, latent: Tensor, t: Tensor, label: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, h, w) and the tokens behind a block, to align them with features (REPA).

        Inputs are those of ``forward``; `block` is 1 .. depth, a wide head's blocks do not count. Tokens are
        (B, N, width) in raster order, N = h * w / patch_size^2.

        Raises:
            UserError: A latent of another shape; no such block.
        """
        return self._outputs(latent, t, self.embed_label(label), block)

    def _outputs(
        self, latent: Tensor, t: Tensor, embedded: Tensor, block: int, others: Sequence[tuple[Any, ...]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return velocity and tokens, with a vector (B, width) beside the time, and each block's other arguments."""
        if latent.ndim != 4 or latent.shape[1:] != self.latent_shape:
            raise UserError(
                f"latent has shape {tuple(latent.shape)}, the network needs (B, *{self.latent_shape}): set latent_shape"
                " to what the tokenizer gives"
            )
        if not 1 <= block <= len(self.blocks):
            raise UserError(f"block={block}: give a block from 1 to depth={len(self.blocks)}")
        (h, w), p = self.grid, self.patch_size
        patches = rearrange(latent, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=p, p2=p)
        time = self.embed_time(t)[:, None]  # (B, 1, width)
        condition = F.silu(time + embedded[:, None])  # (B, 1, width): one for all tokens
        x = tokens = self.embed_latent(patches) + self.positions  # (B, N, width)
        for number, (each, other) in enumerate(
            zip(self.blocks, others or [()] * len(self.blocks), strict=True), start=1
        ):
            x = each(x, condition, self.rotary, *other)  # (B, N, width)
            tokens = x if number == block else tokens
        if self.wide_head is not None:
            condition = F.silu(self.embed_condition(F.silu(time + x)))  # (B, N, wide width): one per token
            x = self.embed_wide(patches)  # (B, N, wide width)
            for each in self.wide_blocks:
                x = each(x, condition, self.wide_rotary)  # (B, N, wide width)
        velocity = rearrange(self.head(x, condition), "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=h, w=w, p1=p, p2=p)
        return velocity.clone(), tokens  # of a view, FSDP loses sight where it is changed in place

    def make_block(self, width: int, num_heads: int, qk_norm: bool) -> Block:
        """Return a new block."""
        return Block(width, num_heads, qk_norm)

    def _rotary(self, head_dim: int) -> Tensor:
        return rotary_table(grid_coordinates(*self.grid), head_dim)

    def _init_weights(self) -> None:
        """Start as DiT does: every block is the identity, the velocity is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (self.embed_label, self.embed_time.proj_in, self.embed_time.proj_out):
            nn.init.normal_(module.weight, std=INIT_STD)
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for module in (*(block.modulation for block in blocks), self.head.modulation, self.head.proj):
            nn.init.zeros_(module.weight)


class TimeEmbedding(nn.Module):
    """Time in [0, 1], (B,), to (B, width): cosines and sines of the time itself, then an MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(NUM_TIME_FEATURES, width)
        self.proj_out = nn.Linear(width, width)
        self.register_buffer("frequencies", wave_frequencies(NUM_TIME_FEATURES // 2).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed."""
        embedding: Tensor = self.proj_out(F.silu(self.proj_in(self.features(t).to(self.proj_in.weight.dtype))))
        return embedding

    def features(self, t: Tensor) -> Tensor:
        """Return all cosines, then all sines, (B, NUM_TIME_FEATURES) float32."""
        angles = t.float()[:, None] * self.frequencies.float()
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class Block(nn.Module):
    """Attention and gated MLP, each with shift, scale and gate from the condition (adaLN-zero)."""

    compiled_as_one = True

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.norm_attention = ModulatedNorm(width)
        self.attention = Attention(width, num_heads, qk_norm, NORM_EPS)
        self.norm_mlp = ModulatedNorm(width)
        self.mlp = SwiGLU(width, width * 8 // 3)  # as many weights as an MLP of hidden width 4 * width

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor) -> Tensor:
        """Map tokens (B, N, width), with a condition (B, 1, width) or (B, N, width)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate * self.attention(self.norm_attention(x, shift, scale), rotary)
        y: Tensor = x + gate_mlp * self.mlp(self.norm_mlp(x, shift_mlp, scale_mlp))
        return y


class Head(nn.Module):
    """Last layer: from tokens to patches, norm with shift and scale from the condition."""

    def __init__(self, width: int, patch_channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = ModulatedNorm(width)
        self.proj = nn.Linear(width, patch_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, width), with a condition (B, 1, width) or (B, N, width), to (B, N, patch_channels)."""
        patches: Tensor = self.proj(self.norm(x, *self.modulation(condition).chunk(2, dim=-1)))
        return patches


class ModulatedNorm(nn.Module):
    """RMSNorm with a gain, then scale and shift, as one: norm(x) * gain * (1 + scale) + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise (B, N, width); scale and shift are (B, 1, width) or (B, N, width)."""
        normed = F.rms_norm(x, self.weight.shape, eps=NORM_EPS)  # float32 inside, whatever the dtype
        return torch.addcmul(shift, normed, torch.addcmul(self.weight, self.weight, scale))
