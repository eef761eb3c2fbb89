"""Against direct numpy, which subtracts before it squares and never splits a matrix."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchmetrics.image.kid import poly_mmd

from aligntok.errors import UserError
from aligntok.metrics import inception_score, kernel_distance, monge_distance, precision_recall
from aligntok.metrics.feature_sets import radii, squared_distance

pytestmark = pytest.mark.kernels


def features(count: int, seed: int, dim: int = 6, spread: float = 1.0, centre: float = 0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * spread + centre


def numpy_distances(a, b):
    return ((a.double().numpy()[:, None] - b.double().numpy()[None]) ** 2).sum(-1)


def numpy_precision_recall(reference, samples, k=3):
    radius = [np.sort(numpy_distances(x, x), axis=1)[:, k] for x in (reference, samples)]
    between = numpy_distances(samples, reference)
    return (between <= radius[0]).any(1).mean(), (between <= radius[1][:, None]).any(0).mean()


REFERENCE, SAMPLES = features(150, 0), features(130, 1, spread=1.5, centre=0.5)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_numpys(k):
    expected = numpy_precision_recall(REFERENCE, SAMPLES, k)
    assert precision_recall(REFERENCE, SAMPLES, k) == pytest.approx(expected, abs=1e-12)
    assert all(0.1 < share < 1 for share in expected)
    assert expected[0] != pytest.approx(expected[1], abs=0.02)  # which is which can be seen


def test_precision_and_recall_swap_with_the_sets():
    assert precision_recall(SAMPLES, REFERENCE) == precision_recall(REFERENCE, SAMPLES)[::-1]
    assert precision_recall(REFERENCE, REFERENCE.flip(0)) == (1, 1)
    assert precision_recall(REFERENCE, SAMPLES + 100) == (0, 0)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_chunks_do_not_matter(chunk):
    assert precision_recall(REFERENCE, SAMPLES, chunk=chunk) == precision_recall(REFERENCE, SAMPLES)
    assert kernel_distance(REFERENCE, SAMPLES, chunk=chunk) == pytest.approx(kernel_distance(REFERENCE, SAMPLES))


def test_near_duplicates_far_from_the_origin():
    """Float32 products of such norms are off by more than all of these distances."""
    reference, samples = (features(60, seed, dim=64, spread=1e-2, centre=300) for seed in (0, 1))
    torch.testing.assert_close(
        squared_distance(samples, reference).double().numpy(), numpy_distances(samples, reference), rtol=1e-5, atol=0
    )
    expected = numpy_precision_recall(reference, samples)
    assert precision_recall(reference, samples) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk", [3, 100])
def test_duplicates_and_ties(chunk):
    values = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0)) * 3
    equal = values.expand(5, -1)  # five equal rows: the third neighbour is at 0
    reference = torch.cat([equal, features(20, 1, dim=2048)])
    assert (radii(reference, 3, chunk)[:5] == 0).all()
    assert (radii(reference, 5, chunk)[:5] > 0).all()
    samples = torch.cat([values, values + 1e-3, features(8, 2, dim=2048) + 9])
    precision, recall = precision_recall(reference, samples, chunk=chunk)
    assert precision == 1 / 10  # the equal one lies in a sphere of radius 0, its neighbour does not
    assert recall >= 5 / 25
    line = torch.tensor([[0.0], [1.0], [2.0]])
    assert radii(line, 1, chunk).tolist() == [1, 1, 1]
    assert precision_recall(line, torch.tensor([[3.0], [3.5]]), 1, chunk) == (1 / 2, 0)  # 3 is on the sphere of 2


def test_kernel_distance_is_the_unbiased_mmd():
    reference, samples = features(40, 0), features(40, 1, spread=1.2)
    x, y = reference.double(), samples.double()
    kernels = [(a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    assert kernel_distance(reference, samples) == pytest.approx(poly_mmd(x, y).item())
    means = [k.fill_diagonal_(0).sum() / (40 * 39) for k in (kernels[0], kernels[2])]
    assert kernel_distance(reference, samples) == pytest.approx((sum(means) - 2 * kernels[1].mean()).item())
    assert kernel_distance(reference, samples[:30]) != pytest.approx(kernel_distance(reference, samples))


def test_kernel_distance_is_unbiased():
    """The mean over all subsets is the value of the whole: what papers estimate with random subsets."""
    reference, samples = features(6, 0), features(6, 1)
    subsets = list(torch.combinations(torch.arange(6), 3))
    mean = np.mean([kernel_distance(reference[i], samples[j]) for i in subsets for j in subsets])
    assert kernel_distance(reference, samples) == pytest.approx(mean)


def test_inception_score():
    logits = features(101, 0, dim=8, spread=2)
    scores = []
    for part in np.array_split(logits.double().numpy(), 10):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert inception_score(logits) == pytest.approx(np.mean(scores))
    one_hot = torch.eye(5).repeat(20, 1) * 4000  # certain, and all classes in each split: as many as there are classes
    assert inception_score(one_hot) == pytest.approx(5)
    assert inception_score(one_hot[one_hot.argmax(1).argsort()]) == pytest.approx(1)  # sorted by class: the trap


def test_bad_sets_are_refused():
    with pytest.raises(UserError, match="4 or more generated images, got 3"):
        precision_recall(REFERENCE, SAMPLES[:3])
    with pytest.raises(UserError, match="2 or more reference images, got 1"):
        kernel_distance(REFERENCE[:1], SAMPLES)
    with pytest.raises(UserError, match="reference images contain NaN"):
        precision_recall(REFERENCE * float("nan"), SAMPLES)
    with pytest.raises(UserError, match="10 or more"):
        inception_score(SAMPLES[:9])


# MIND


def test_monge_distance_of_one_dimension_is_the_cheapest_assignment():
    a, b = features(40, 0, dim=1), features(40, 1, dim=1, spread=2.0, centre=1.0)
    cost = (a - b.T).square().numpy()
    expected = 3 * cost[linear_sum_assignment(cost)].mean()
    assert monge_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert monge_distance(b, a.flip(0)) == pytest.approx(expected, rel=1e-5)


def test_monge_distance_is_the_mean_over_directions():
    """Of a shift c it is 3 |c|^2 in the mean over directions; of two spreads of a Gaussian, 3 D (s - t)^2."""
    a = features(500, 0, dim=64)
    shift = features(1, 5, dim=64)
    assert monge_distance(a, a) == 0
    assert monge_distance(a, a + shift) == pytest.approx(3 * float(shift.square().sum()), rel=0.1)
    assert monge_distance(a, a * 1.5) == pytest.approx(3 * 64 * 0.5**2, rel=0.02)
    assert monge_distance(a, a + shift) == monge_distance(a, a + shift)  # of directions that are drawn anew


def test_monge_distance_compares_equal_numbers():
    a, b = features(300, 0), features(100, 1)
    assert monge_distance(a, b) == pytest.approx(monge_distance(b, a), rel=1e-12)
    apart = monge_distance(torch.cat([a, a + 1]), b)
    assert apart > 1.2 * monge_distance(a, b)  # the rows are taken from all
    with pytest.raises(UserError, match="Monge distance need 2 or more generated images"):
        monge_distance(a, b[:1])
