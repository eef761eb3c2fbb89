"""Measures of two sets of features that are kept: precision, recall, KID, MIND; and the Inception Score of one."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from aligntok.errors import check
from aligntok.randomness import hashed, normal

CHUNK = 2048  # rows and columns of a block of pairs, which with 2,048 dimensions takes less than 0.3 GB


def precision_recall(
    reference: Tensor, samples: Tensor, num_neighbours: int = 3, chunk: int = CHUNK
) -> tuple[float, float]:
    """Return the shares of samples and of reference images that lie within the other set.

    A point lies within a set if its distance to some member is at most that member's distance to its own
    ``num_neighbours``-th neighbour in the set, itself not counted. Equal points are neighbours at distance 0.

    ADM's protocol (evaluations/evaluator.py): the 10,000 images of the reference file against all samples. Where ADM
    takes float16, products are float64 here and distances are rounded to float32, so that the chunk changes nothing.
    For 10,000 and 50,000 of 2,048 dimensions 13 TFLOP, 5 minutes on one CPU core.

    >>> precision_recall(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.5], [9.0]]), num_neighbours=1)
    (0.5, 1.0)

    Args:
        reference: Features (N, D), N > num_neighbours.
        samples: Features (M, D), M > num_neighbours.
        num_neighbours: 3 in papers.
        chunk: Rows and columns that are compared at once.

    Raises:
        UserError: Too few images, or features that are not finite.

    Reference:
        Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, arXiv:1904.06991.
    """
    check_sets(reference, samples, num_neighbours + 1, "precision and recall")
    reference_radii = radii(reference, num_neighbours, chunk)
    sample_radii = radii(samples, num_neighbours, chunk)
    realistic = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, columns in blocks(samples, reference, chunk):
        distance = squared_distance(samples[rows], reference[columns])
        realistic[rows] |= (distance <= reference_radii[columns]).any(dim=1)
        covered[columns] |= (distance <= sample_radii[rows].unsqueeze(1)).any(dim=0)
    return realistic.double().mean().item(), covered.double().mean().item()


def radii(features: Tensor, num_neighbours: int, chunk: int) -> Tensor:
    """Return each row's squared distance to its ``num_neighbours``-th neighbour among the others, (N,) float32."""
    count = num_neighbours + 1  # each row is its own nearest one
    nearest = torch.full((len(features), count), torch.inf, device=features.device)
    for rows, columns in blocks(features, features, chunk):
        candidates = torch.cat([nearest[rows], squared_distance(features[rows], features[columns])], dim=1)
        nearest[rows] = candidates.topk(count, largest=False).values
    return nearest[:, -1]


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared Euclidean distances (N, M), float32, of rows (N, D) and (M, D); of equal rows, exactly 0."""
    a, b = a.double(), b.double()
    norms = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    distance = torch.addmm(norms, a, b.T, alpha=-2)
    rounding = a.shape[1] * torch.finfo(distance.dtype).eps * norms
    return distance.masked_fill_(distance <= rounding, 0).float()


def kernel_distance(reference: Tensor, samples: Tensor, chunk: int = CHUNK) -> float:
    """Return the kernel distance (KID where the features are Inception's): unbiased, may be slightly below 0.

    The squared maximum mean discrepancy with the kernel ``(x y / D + 1)^3``, over all pairs. Papers estimate it by the
    mean over 100 random subsets of 1,000 images.

    >>> kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))  # 1 + 64 - 2 (1 + 1 + 8 + 64) / 4
    28.0

    Args:
        reference: Features (N, D), N >= 2.
        samples: Features (M, D), M >= 2.
        chunk: Rows and columns that are compared at once.

    Raises:
        UserError: Too few images, or features that are not finite.

    Reference:
        Binkowski et al., Demystifying MMD GANs, arXiv:1801.01401, section 4.
    """
    check_sets(reference, samples, 2, "the kernel distance")
    within = kernel_mean(reference, None, chunk) + kernel_mean(samples, None, chunk)
    return (within - 2 * kernel_mean(reference, samples, chunk)).item()


def kernel_mean(a: Tensor, b: Tensor | None, chunk: int) -> Tensor:
    """Return the mean () of the kernel over pairs of a row of a and one of b, or of different rows of a, float64."""
    others = a if b is None else b
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows, columns in blocks(a, others, chunk):
        kernel = (a[rows].double() @ others[columns].double().T / a.shape[1] + 1) ** 3
        if b is None and rows == columns:
            kernel.fill_diagonal_(0)
        total += kernel.sum()
    return total / (len(a) * (len(others) - int(b is None)))


def monge_distance(reference: Tensor, samples: Tensor, num_directions: int = 1000) -> float:
    """Return the Monge distance (MIND where the features are Inception's): a sliced Wasserstein distance, by sorting.

    ``3 D`` times the mean, over random directions, of the squared 2-Wasserstein distance of the projections. Of the
    larger set as many rows are taken as the smaller one has, for the value depends on the number: the paper reports
    1,000 to 5,000 samples. Rows and directions are the same in each call; other code draws others, and 1,000 other
    directions move the value by 3 to 4 % (standard deviation, 1,000 rows of 2,048 dimensions).

    >>> round(monge_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]])), 3)  # 3 (1 + 4) / 2
    7.5

    Args:
        reference: Features (N, D), N >= 2.
        samples: Features (M, D), M >= 2.
        num_directions: 1,000 in torch-fidelity 0.5.

    Raises:
        UserError: Too few images, or features that are not finite.

    Reference:
        Berthet et al., MIND: Monge Inception Distance, arXiv:2605.06797.
    """
    check_sets(reference, samples, 2, "the Monge distance")
    count, width = min(len(reference), len(samples)), reference.shape[1]
    ids = torch.arange(num_directions, device=reference.device)
    directions = torch.nn.functional.normalize(normal(ids, 0, 0, "directions", (width,)).double())
    chosen = (x[hashed(torch.arange(len(x), device=x.device)).argsort()[:count]] for x in (reference, samples))
    ours, theirs = ((directions @ x.double().T).sort().values for x in chosen)  # (directions, count)
    return 3 * width * (ours - theirs).square().mean().item()


def inception_score(logits: Tensor, num_splits: int = 10) -> float:
    """Return the Inception Score: the mean over splits of exp(mean KL of a prediction from the split's mean).

    As in ADM, splits are consecutive rows (of 5,000 where there are 50,000), which must not be sorted by class;
    torch-fidelity shuffles the rows first.

    >>> round(inception_score(100 * torch.eye(4).repeat(5, 1), num_splits=5), 3)  # certain, and of 4 classes
    4.0

    Args:
        logits: (N, K), N >= num_splits, in the order of the images' ids.
        num_splits: Number of splits.

    Reference:
        Salimans et al., Improved Techniques for Training GANs, arXiv:1606.03498, section 4.
    """
    check(len(logits) >= num_splits, f"the Inception Score needs {num_splits} or more images, got {len(logits)}")
    scores = []
    for part in logits.tensor_split(num_splits):
        log_p = part.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


def blocks(a: Tensor, b: Tensor, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of a and the rows of b, at most ``chunk`` of each, of all blocks of pairs."""
    for row in range(0, len(a), chunk):
        for column in range(0, len(b), chunk):
            yield slice(row, row + chunk), slice(column, column + chunk)


def check_sets(reference: Tensor, samples: Tensor, least: int, measure: str) -> None:
    """Refuse sets that are too small or hold NaN."""
    for name, features in (("reference", reference), ("generated", samples)):
        check(len(features) >= least, f"{measure} need {least} or more {name} images, got {len(features)}")
        check(bool(features.isfinite().all()), f"{measure}: features of the {name} images contain NaN or infinity")
