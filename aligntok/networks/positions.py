"""Where a token lies on its grid: a fixed table to add, angles to rotate queries and keys by."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_PERIOD = 10_000  # slowest wave, arXiv:1706.03762 section 3.5


def sincos_positions(h: int, w: int, width: int) -> Tensor:
    """Return the fixed position table of a grid of h rows and w columns, (h * w, width) float32 in raster order.

    The first half of the channels encodes the column, the second half the row, each as all sines, then all cosines, of
    the integer coordinate times MAX_PERIOD^(-k / (width / 4)); `width` is a multiple of 4.

    >>> sincos_positions(2, 3, width=8).shape
    torch.Size([6, 8])

    Reference:
        He et al., arXiv:2111.06377, with frequencies of Vaswani et al., arXiv:1706.03762, section 3.5.
    """
    rows, columns = grid_coordinates(h, w).unbind(1)
    angles = [coordinate[:, None] * wave_frequencies(width // 4) for coordinate in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def grid_coordinates(h: int, w: int) -> Tensor:
    """Return (row, column) of every position of a grid in raster order, (h * w, 2) int64."""
    return torch.cartesian_prod(torch.arange(h), torch.arange(w))


def rotary_table(coordinates: Tensor, head_dim: int) -> Tensor:
    """Return the rotations of rotary position embedding: cosine and sine, (N, head_dim / 2, 2) float32.

    Each of the A coordinates turns its own share of the head, head_dim / (2 A) pairs of channels, by the coordinate
    times MAX_PERIOD^(-2 i A / head_dim).

    >>> rotary_table(grid_coordinates(2, 3), head_dim=8).shape
    torch.Size([6, 4, 2])

    Args:
        coordinates: (N, A); A = 2 for ``grid_coordinates``, 1 for a sequence.
        head_dim: Channels of a head, a multiple of 2 A.

    Reference:
        Su et al., RoFormer, arXiv:2104.09864; in two dimensions Fang et al., EVA-02, arXiv:2303.11331.
    """
    frequencies = wave_frequencies(head_dim // (2 * coordinates.shape[1]))
    angles = (coordinates[:, :, None] * frequencies).flatten(1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def class_first_rotary(grid: tuple[int, int], num_prefix: int, head_dim: int) -> Tensor:
    """Return the rotations of a class token, K prefix tokens and a grid of tokens, (1 + K + h * w, head_dim / 2, 2).

    The class token's are all zero, cosine too: its queries and keys become zero, so that attention to it does not
    depend on what it is. The prefix has the positions 0 .. K - 1 in one dimension over the whole head, the grid has
    two, both counted from K. `head_dim` is a multiple of 4.

    Reference:
        Sun et al., LlamaGen, arXiv:2406.06525 (the zeros); AliTok, arXiv:2506.05289 (the prefix).
    """
    parts = (
        torch.zeros(1, head_dim // 2, 2),
        rotary_table(torch.arange(num_prefix)[:, None], head_dim),
        rotary_table(grid_coordinates(*grid) + num_prefix, head_dim),
    )
    return torch.cat(parts)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of channels, (a, b) to (a cos - b sin, b cos + a sin), in float32.

    Args:
        x: Queries or keys, (B, num_heads, N, head_dim), any float dtype; the result has it too.
        table: From ``rotary_table``.
    """
    pairs, table = x.float().reshape(*x.shape[:-1], -1, 2), table.float()
    if torch.compiler.is_compiling():  # which fuses real numbers only
        cos, sin = table.chunk(2, dim=-1)
        signs = torch.arange(-1, 2, 2, device=x.device)  # stacked halves would be written and read once more
        rotated = pairs * cos + pairs.flip(-1) * sin * signs
    else:  # one pass over memory in place of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


def wave_frequencies(count: int) -> Tensor:
    """Return MAX_PERIOD^(-k / count) for k = 0 .. count - 1, (count,) float64."""
    return MAX_PERIOD ** (-torch.arange(count, dtype=torch.float64) / count)
