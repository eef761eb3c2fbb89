"""Diffusion transformer that reads: DiT's blocks, each with cross-attention to a text.

Chen et al., PixArt-alpha, arXiv:2310.00426, section 2.3 (cross-attention whose output starts at zero, in a network that
knows images already); the adapter is that of i1, arXiv:2606.11289.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_nonnegative, check_positive
from aligntok.networks.dit import INIT_STD, NORM_EPS, Block, DiT, WideHead
from aligntok.networks.layers import Attention, RMSNorm, SwiGLU
from aligntok.networks.positions import rotary_table
from aligntok.networks.text import Text


class KeptText(Text):
    """What ``TextDiT.prepare`` makes of texts: ``features`` are keys and values, (B, depth, 2, heads, L, head_dim)."""


class TextDiT(DiT):
    """Predict the velocity of a latent at a time of the way from noise (t = 0) to data (t = 1), given a text.

    >>> network = TextDiT(latent_shape=(4, 2, 2), text_width=8, width=16, depth=1, num_heads=2)
    >>> text = Text(torch.randn(5, 3, 8), torch.ones(5, 3, dtype=torch.bool))
    >>> network(torch.randn(5, 4, 2, 2), torch.rand(5), text).shape
    torch.Size([5, 4, 2, 2])

    Sizes are in ``configs/size/text_dit_*.yaml``. Each block is a ``DiT``'s, ``x += attention(x)``,
    ``x += cross(norm(x), text)``, ``x += mlp(x)``; as ``cross`` starts at zero, so does what the text changes, and a
    class-conditional network of the same sizes can be the start. Its table of labels becomes one row, a vector that all
    images share. The text depends on neither latent nor time: ``prepare`` makes keys and values of it once per prompt,
    and all steps of a sampler use these.

    Args:
        latent_shape: (C, h, w) of a latent.
        text_width: Channels of the text's features.
        width: Channels of a token.
        depth: Number of blocks.
        num_heads: Attention heads; `width` is a multiple of 4 times this.
        patch_size: Side of the square of latent positions that makes one token.
        qk_norm: Normalise queries and keys of self-attention; those of cross-attention always are.
        adapter_depth: Transformer blocks that the text goes through before all others, trained with them.
        wide_head: RAE's wide head; it reads no text.

    Reference:
        PixArt-alpha, arXiv:2310.00426; blocks of LightningDiT, arXiv:2501.01423; adapter of i1, arXiv:2606.11289.
    """

    other_forwards = (*DiT.other_forwards, "prepare")

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        text_width: int,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int = 1,
        qk_norm: bool = True,
        adapter_depth: int = 2,
        wide_head: WideHead | None = None,
    ) -> None:
        check_positive(text_width=text_width)
        check_nonnegative(adapter_depth=adapter_depth)
        super().__init__(latent_shape, 1, width, depth, num_heads, patch_size, qk_norm, False, wide_head)
        self.num_classes = None
        self.text_width = text_width
        self.adapter = TextAdapter(text_width, width, adapter_depth, num_heads)
        for cross in self.cross_attentions:
            nn.init.zeros_(cross.proj.weight)

    def make_block(self, width: int, num_heads: int, qk_norm: bool) -> Block:
        """Return a new block that reads."""
        return TextBlock(width, num_heads, qk_norm)

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attention of each block."""
        return [block.cross for block in self.blocks if isinstance(block, TextBlock)]

    def forward(self, latent: Tensor, t: Tensor, text: Text) -> Tensor:  # type: ignore[override]  # in place of a class
        """Return the velocity (B, C, h, w).

        Args:
            latent: Points on the way from noise to normalised latents, (B, C, h, w).
            t: Their times in [0, 1], (B,).
            text: B texts, with features (B, L, text_width), or what ``prepare`` made of them.

        Raises:
            UserError: A latent of another shape.
        """
        return self.forward_with_tokens(latent, t, text, len(self.blocks))[0]

    def forward_with_tokens(  # type: ignore[override]  # in place of a class
        self, latent: Tensor, t: Tensor, text: Text, block: int
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, h, w) and the tokens behind a block, as ``DiT`` does."""
        if isinstance(text, KeptText):
            others = [(text.features[:, i], text.mask) for i in range(len(self.blocks))]
        else:
            others = [self.adapter(text)] * len(self.blocks)
        return self._outputs(latent, t, self.embed_label.weight.expand(len(latent), -1), block, others)

    # A class-conditional network as the start

    def without_text(self, num_classes: int, null_class: bool = True) -> DiT:
        """Return a new class-conditional network of the same sizes."""
        attention: Any = self.blocks[0].attention
        return DiT(
            self.latent_shape,
            num_classes,
            self.width,
            len(self.blocks),
            attention.num_heads,
            self.patch_size,
            qk_norm=isinstance(attention.q_norm, RMSNorm),
            null_class=null_class,
            wide_head=self.wide_head,
        )

    def start_from(self, network: DiT) -> None:
        """Take the weights of a class-conditional network of the same sizes; of its table of labels, the null class.

        Until the first step, any text then gives its velocity of the null class; without one, of the mean class.
        """
        state, labels = network.state_dict(), network.embed_label.weight
        row = labels.mean(0) if network.null_label is None else labels[network.null_label]
        own = {key: value for key, value in self.state_dict().items() if key not in state}
        self.load_state_dict(state | own | {"embed_label.weight": row[None]})

    # What a condition is to this network, see ``ClassConditional``

    @property
    def has_null(self) -> bool:
        """There is always a null text, the one without tokens."""
        return True

    def null(self, text: Text) -> Text:  # type: ignore[override]  # in place of a class
        """Return as many null texts as there are texts."""
        return Text(text.features, torch.zeros_like(text.mask))

    def drop(self, text: Text, dropped: Tensor) -> Text:  # type: ignore[override]  # in place of a class
        """Return B texts, null where ``dropped`` (B,) is true."""
        return Text(text.features, text.mask & ~dropped[:, None])

    def prepare(self, text: Text) -> KeptText:  # type: ignore[override]  # in place of a class
        """Return the keys and values of all blocks, which ``forward`` takes in place of the text."""
        tokens, mask = self.adapter(text)
        return KeptText(torch.stack([cross.keys_values(tokens) for cross in self.cross_attentions], dim=1), mask)

    def check_condition(self, text: Any) -> None:
        """Raise a ``UserError`` if a condition is no text, or one of another encoder."""
        check(isinstance(text, Text), "the network reads text and labels were given: give prompts")
        got = text.features.shape[-1]
        if got != self.text_width:
            raise UserError(
                f"the text has {got} channels, network.text_width is {self.text_width}: give its own encoder"
            )


class TextAdapter(nn.Module):
    """Features of a frozen text encoder, (B, L, text_width), to tokens (B, L, width): linear, blocks, norm.

    A text without tokens becomes one learned token. The features are divided by their root mean square first, because
    encoders differ in scale by orders of magnitude.
    """

    def __init__(self, text_width: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.proj = nn.Linear(text_width, width)
        self.null_text = nn.Parameter(torch.randn(width) * INIT_STD)
        self.blocks = nn.ModuleList(AdapterBlock(width, num_heads) for _ in range(depth))
        self.norm = RMSNorm(width, NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, text: Text) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L, width) and their mask (B, L) bool, of which at least one is true."""
        features = text.features.masked_fill(~text.mask[..., None], 0)  # padding may hold anything, even NaN
        x = self.proj(F.rms_norm(features.float(), features.shape[-1:], eps=NORM_EPS).to(self.proj.weight.dtype))
        first = torch.arange(x.shape[1], device=x.device) == 0
        empty = first & ~text.mask.any(1, keepdim=True)  # (B, L)
        x = torch.where(empty[..., None], self.null_text.to(x.dtype), x)
        mask = text.mask | empty
        rotary = rotary_table(torch.arange(x.shape[1])[:, None], self.head_dim).to(x.device, non_blocking=True)
        for block in self.blocks:
            x = block(x, rotary, mask)  # (B, L, width)
        return self.norm(x), mask


class AdapterBlock(nn.Module):
    """Attention among the tokens of a text and gated MLP, each behind a norm."""

    compiled_as_one = True

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(width, NORM_EPS)
        self.attention = Attention(width, num_heads, qk_norm=True, eps=NORM_EPS)
        self.norm_mlp = RMSNorm(width, NORM_EPS)
        self.mlp = SwiGLU(width, width * 8 // 3)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        """Map tokens (B, L, width); ``mask`` (B, L) says which are seen."""
        x = x + self.attention(self.norm_attention(x), rotary, mask=mask[:, None, None])
        y: Tensor = x + self.mlp(self.norm_mlp(x))
        return y


class TextBlock(Block):
    """A block of ``DiT`` with cross-attention between attention and MLP."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__(width, num_heads, qk_norm)
        self.norm_cross = RMSNorm(width, NORM_EPS)
        self.cross = CrossAttention(width, num_heads)

    def forward(  # type: ignore[override]  # it takes a text, too
        self, x: Tensor, condition: Tensor, rotary: Tensor, text: Tensor, mask: Tensor
    ) -> Tensor:
        """Map tokens (B, N, width), with a text's tokens (B, L, width) or keys and values, of which a mask is seen."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate * self.attention(self.norm_attention(x, shift, scale), rotary)
        x = x + self.cross(self.norm_cross(x), self.cross.keys_values(text) if text.ndim == 3 else text, mask)
        y: Tensor = x + gate_mlp * self.mlp(self.norm_mlp(x, shift_mlp, scale_mlp))
        return y


class CrossAttention(nn.Module):
    """Attention from the tokens of an image to those of a text, with normalised queries and keys.

    >>> cross = CrossAttention(width=8, num_heads=2)
    >>> kept = cross.keys_values(torch.randn(2, 3, 8))
    >>> cross(torch.randn(2, 5, 8), kept, mask=torch.ones(2, 3, dtype=torch.bool)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = RMSNorm(width // num_heads, NORM_EPS)
        self.k_norm = RMSNorm(width // num_heads, NORM_EPS)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> Tensor:
        """Return the keys and values of a text's tokens (B, L, width), (B, 2, num_heads, L, head_dim)."""
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(0, 2, 3, 1, 4).unbind(1)
        return torch.stack([self.k_norm(k), v], dim=1)

    def forward(self, x: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        """Map tokens (B, N, width), with the text's keys and values, of which the mask (B, L) says which there are."""
        q = self.q_norm(self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))  # (B, heads, N, head_dim)
        k, v = kept.to(q.dtype).unbind(1)
        seen = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        y: Tensor = self.proj(seen.transpose(1, 2).flatten(2))  # (B, N, width)
        return y
