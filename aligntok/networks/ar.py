"""Autoregressive transformer: the next token of an image, given its class and the tokens before.

Wu et al., AliTok, arXiv:2506.05289, section 4; after Sun et al., LlamaGen, arXiv:2406.06525.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive
from aligntok.networks import layers
from aligntok.networks.codebook import HOST_DEVICES
from aligntok.networks.layers import Attention, KeyValueCache, RMSNorm, SwiGLU
from aligntok.networks.positions import class_first_rotary

INIT_STD = 0.02  # arXiv:2406.06525
NORM_EPS = 1e-5  # arXiv:2302.13971
HIDDEN_MULTIPLE = 256  # of the MLP's hidden width, arXiv:2406.06525


class AutoregressiveTransformer(layers.ClassConditional):
    """Predict each token of an image from its class and the earlier tokens: first the prefix, then the grid.

    >>> network = AutoregressiveTransformer(8, (2, 2), 1, num_classes=3, width=16, depth=1, num_heads=2)
    >>> network(torch.randint(8, (2, 5)), label=torch.tensor([0, 2])).shape  # of the next token after 0 .. 5
    torch.Size([2, 6, 8])

    AliTok's sizes are in ``configs/size/ar_*.yaml``. One table embeds what the sequence holds: the codes, one row
    without use, the classes, and the null class; an unconditional network starts every sequence with the null class.

    Args:
        codebook_size: Codes 0 .. codebook_size - 1.
        grid: Rows and columns of the token grid.
        num_prefix: Tokens before the grid, at least 0.
        num_classes: Classes 0 .. num_classes - 1; None for an unconditional network.
        width: Channels of a token.
        depth: Number of blocks.
        num_heads: Attention heads; `width` is a multiple of 4 times this.
        hidden: Channels inside the MLP; None for 8/3 of `width`, rounded up to a multiple of 256.
        dropout: Share of zeros in training: embedded tokens, attention weights, outputs of attention and MLP.
        null_class: One more class, `num_classes`, that means no class; without effect in an unconditional network.

    Attributes:
        sequence_length: N = num_prefix + h * w.

    Reference:
        AliTok, arXiv:2506.05289; Llama's blocks, arXiv:2302.13971, with QK-norm, arXiv:2302.05442.
    """

    rotary: Tensor

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, int],
        num_prefix: int,
        num_classes: int | None,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int | None = None,
        dropout: float = 0.1,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        layers.check_rotary_sizes(width, depth, num_heads)
        check_positive(codebook_size=codebook_size, num_classes=num_classes, hidden=hidden)
        check(len(grid) == 2 and min(grid) >= 1, f"grid={list(grid)}: give rows and columns of the token grid")
        check(num_prefix >= 0, f"num_prefix={num_prefix}: give at least 0")
        check(0 <= dropout < 1, f"dropout={dropout}: give a share from 0 to below 1")
        self.codebook_size, self.grid, self.num_prefix = codebook_size, (grid[0], grid[1]), num_prefix
        self.sequence_length = num_prefix + grid[0] * grid[1]
        self.num_classes, self.width, self.num_heads = num_classes, width, num_heads
        self.null_label = num_classes if null_class else None
        self.hidden = hidden or -(-(width * 8 // 3) // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE

        num_starts = 1 if num_classes is None else num_classes + null_class
        self.embed = nn.Embedding(codebook_size + 1 + num_starts, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("rotary", class_first_rotary(self.grid, num_prefix, width // num_heads), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, self.hidden, dropout) for _ in range(depth))
        self.norm = RMSNorm(width, NORM_EPS)
        self.head = nn.Linear(width, codebook_size)
        self._init_weights()

    def forward(self, tokens: Tensor, label: Tensor | None = None) -> Tensor:
        """Return logits (B, n + 1, codebook_size): at position p of token p, given the label and the tokens before it.

        Args:
            tokens: The first n tokens of the sequence, (B, n) int64, n from 0 to N.
            label: Classes, (B,) int64, ``null_label`` for none; None in an unconditional network. Their range is not
                looked at: see ``check_condition``.

        Raises:
            UserError: More than N tokens; a token out of range, on the CPU (elsewhere that would wait for the device).
        """
        self._check_tokens(tokens)
        assert (label is None) == (self.num_classes is None)
        ids = torch.cat((self.start_ids(label, len(tokens))[:, None].to(tokens.device), tokens), dim=1)
        x = self.dropout(self.embed(ids))  # (B, n + 1, width)
        rotary = self.rotary[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, rotary)  # (B, n + 1, width)
        logits: Tensor = self.head(self.norm(x))  # (B, n + 1, codebook_size)
        return logits

    def start_ids(self, label: Tensor | None, count: int) -> Tensor:
        """Return the rows of the embedding table that start `count` sequences of labels (B,), (B,) int64."""
        if label is None:
            return torch.full((count,), self.codebook_size + 1, device=self.embed.weight.device)
        return label + self.codebook_size + 1

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] > self.sequence_length:
            raise UserError(
                f"tokens have shape {tuple(tokens.shape)}, the network needs (B, n) with n up to num_prefix + h * w ="
                f" {self.sequence_length}: set num_prefix={self.num_prefix} and grid={list(self.grid)} to the"
                " tokenizer's"
            )
        if tokens.device.type in HOST_DEVICES and tokens.numel():
            known = f"codes 0..{self.codebook_size - 1}: set codebook_size to the tokenizer's"
            layers.check_range("token", tokens, self.codebook_size, known)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)


class Block(nn.Module):
    """Causal attention and gated MLP, each behind a norm."""

    compiled_as_one = True

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(width, NORM_EPS)
        self.attention = Attention(width, num_heads, qk_norm=True, eps=NORM_EPS, causal=True, dropout=dropout)
        self.norm_mlp = RMSNorm(width, NORM_EPS)
        self.mlp = SwiGLU(width, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map tokens (B, n, width): a whole sequence from its start, or those that follow a cache."""
        x = x + self.dropout(self.attention(self.norm_attention(x), rotary, cache))  # (B, n, width)
        y: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))  # (B, n, width)
        return y
