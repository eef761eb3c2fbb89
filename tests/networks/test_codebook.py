"""Which vector is nearest is a function of the values alone: whole numbers, whose distances are known exactly."""

import numpy as np
import pytest
import torch

from aligntok.networks.codebook import nearest, nearest_of_all_ranks, numbers_of, squared_distances

pytestmark = pytest.mark.kernels


def whole_numbers(count, dim, seed, size=3, offset=0):
    return torch.randint(-size, size + 1, (count, dim), generator=torch.Generator().manual_seed(seed)) + offset


def first_nearest(points, targets):
    """Of int64 vectors, without any rounding; at equal distance the lowest number."""
    distances = ((points.numpy()[:, None] - targets.numpy()[None]) ** 2).sum(-1)
    return torch.from_numpy(distances.argmin(1)), (distances == distances.min(1, keepdims=True)).sum(1)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("offset", [0, 2**12, 2**22])
@pytest.mark.parametrize("dim", [1, 3, 32])
def test_ties_and_near_ties_at_any_offset_in_any_chunks(offset, dim):
    """Of 32 dimensions at 2^22, float32 products are off by many times the distances."""
    points, targets = whole_numbers(150, dim, 0, offset=offset), whole_numbers(190, dim, 1, offset=offset)
    targets[100:150] = targets[:50]  # exact ties of equal codes
    targets[150:] = 2 * points[:40] - targets[:40]  # and of codes on two sides of a point
    expected, ties = first_nearest(points, targets)
    assert (ties > 1).sum() > 10
    for chunk in (1, 7, 64, 150):
        assert torch.equal(nearest(points.float(), targets.float(), chunk * len(targets)), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dim", [2, 16, 33])
def test_a_point_between_two_targets(dim):
    """Of a code that is the mean of two vectors, rounded to float32, the differences say which is nearer."""
    vectors = torch.randn(300, dim, generator=torch.Generator().manual_seed(0)) + 20
    codes = (vectors[::2] + vectors[1::2]) / 2
    distances = torch.stack([squared_distances(code.expand_as(vectors), vectors) for code in codes])
    assert torch.equal(squared_distances(codes, vectors[::2]), distances[torch.arange(150), torch.arange(0, 300, 2)])
    for chunk in (3, 150):
        assert torch.equal(nearest(codes, vectors, chunk * 300), distances.min(1).indices)
        for rows in (codes[:1], codes[40:47], codes.flip(0)):  # products of other shapes
            expected = torch.stack([distances[(codes == row).all(1).nonzero()[0, 0]].argmin() for row in rows])
            assert torch.equal(nearest(rows, vectors, chunk * 300), expected)


def test_permuted_rows_give_the_same_vectors():
    points, targets = torch.randn(2, 200, 24, generator=torch.Generator().manual_seed(0))
    targets[100:] = points[:100].flip(0) * 2 - targets[:100]
    found = targets[nearest(points, targets, 10_000)]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(targets[order][nearest(points, targets[order], 1000)], found)
    assert torch.equal(targets[nearest(points[order], targets, 1000)], found[order])


def test_of_vectors_equally_near_to_a_code_the_lowest_id_wins_in_any_order_of_the_images():
    vectors = torch.tensor([[3.0, 4.0], [-5.0, 0.0], [4.0, -3.0], [0.0, 5.0]])
    code = torch.zeros(1, 2)
    for ids in ([3, 2, 1, 0], [0, 1, 2, 3], [12, 7, 5, 9]):
        numbers = numbers_of(torch.tensor(ids), 4, 1, vectors.device)
        found = nearest_of_all_ranks(code, vectors, numbers, 100)
        assert torch.equal(found[0], vectors[np.argmin(ids)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_nearest_to_nothing(value):
    points, targets = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(points, targets[1:]).argmin(1) + 1
    targets[0, 2] = value
    assert torch.equal(nearest(points, targets, 500), expected)
    points[3, 1] = value
    expected[3] = 0
    assert torch.equal(nearest(points, targets, 500), expected)
    assert torch.equal(nearest(points, torch.full_like(targets, value), 500), torch.zeros(50, dtype=torch.int64))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-22, 1e15])
def test_scales_at_which_products_vanish_or_are_large(scale):
    points, targets = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    targets[30:] = targets[:30]
    expected = torch.cdist(points, targets[:30]).argmin(1) if scale else torch.zeros(60, dtype=torch.int64)
    assert torch.equal(nearest(points * scale, targets * scale, 1000), expected)


def test_numbers_of_vectors_are_their_images_ids_and_their_places():
    ids = torch.tensor([7, 0])
    assert numbers_of(ids, 2, 3, ids.device).tolist() == [21, 22, 23, 0, 1, 2]
    assert numbers_of(None, 2, 3, ids.device).tolist() == [0, 1, 2, 3, 4, 5]
