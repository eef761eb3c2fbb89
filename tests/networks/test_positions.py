import math

import pytest
import torch

from aligntok.networks.positions import grid_coordinates, rotary_table, rotate


def test_grid_is_in_raster_order():
    assert grid_coordinates(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_rotation_of_one_token():
    """Row turns the first half of the head, column the second, in adjacent pairs."""
    x = torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 1]).expand(1, 1, 15, 8)
    row, column = 2, 4
    token = rotate(x, rotary_table(grid_coordinates(3, 5), 8))[0, 0, row * 5 + column]
    angles = [row, row / 100, column, column / 100]  # 10000^(-2i/4)
    first = [wave(a) for a in angles[:2] for wave in (math.cos, math.sin)]  # (1, 0) turned
    second = [part for a in angles[2:] for part in (-math.sin(a), math.cos(a))]  # (0, 1) turned
    torch.testing.assert_close(token, torch.tensor(first + second))


def test_product_depends_on_the_difference_of_positions_alone():
    """On a 4x6 grid: equal queries and keys everywhere, so equal offsets must give equal scores."""
    h, w = 4, 6
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 1, h * w, 16) for _ in range(2))
    table = rotary_table(grid_coordinates(h, w), 16)
    scores = (rotate(q, table) @ rotate(k, table).transpose(-1, -2))[0, 0].reshape(h, w, h, w)
    torch.testing.assert_close(scores[:-1, :-2, :-1, :-2], scores[1:, 2:, 1:, 2:])
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])  # a row is not a column
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 1, 0, 0])  # left is not right


def test_sequence_uses_the_whole_head():
    table = rotary_table(torch.arange(5)[:, None], 8)
    assert table.shape == (5, 4, 2)
    torch.testing.assert_close(table[3, :, 0].acos(), 3 * 10_000 ** (-torch.arange(4) / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_form_is_the_same(dtype, monkeypatch):
    x, table = torch.randn(2, 3, 12, 8, dtype=dtype), rotary_table(grid_coordinates(3, 4), 8)
    eager = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = rotate(x, table)
    assert eager.dtype == compiled.dtype == dtype
    torch.testing.assert_close(eager, compiled)
    angles = rotate(x.float(), table)
    assert (eager - angles).abs().max() <= angles.abs().max() * torch.finfo(dtype).eps / 2  # rounded once, at the end
