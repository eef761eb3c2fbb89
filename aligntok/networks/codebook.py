"""Searches between vectors and codes in bounded memory, over all ranks of a run: nearest, k-means.

No rank sees another's vectors or distances; what travels are sums, minima and keys. Which vector or code is nearest is
a function of the values alone. A matrix product is fast, but how it rounds depends on the kernel that the processor,
the number of threads and the shapes select, so the product only decides where its rounding cannot matter. All other
targets are compared again by float64 differences summed in a fixed order, and at an exact tie the lowest number wins.

On a GPU the host would wait for how many those are. There the product is taken in float64 and decides alone: targets
whose distances agree to some 15 digits may be taken for each other, and at an exact tie the lowest number wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

KMEANS_ITERATIONS = 10
HOST_DEVICES = {
    "cpu",
    "mps",
}  # devices whose values the host sees without waiting; their sizes may then depend on values
HASH_MULTIPLIERS = (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85)  # Vigna, arXiv:1402.6246


@torch.no_grad()
def nearest(points: Tensor, targets: Tensor, max_distances: int) -> Tensor:
    """Return for each point the number of the target at the smallest Euclidean distance, (M,) int64.

    The lowest number where several are equally far. A target that is not finite is nearest to no point, and a point
    that is not finite gets number 0. The host waits for nothing.

    >>> nearest(torch.tensor([[0.2, 0.1], [1.0, 0.9]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), max_distances=100)
    tensor([0, 1])

    Args:
        points: (M, C) float32.
        targets: (T, C) float32.
        max_distances: Distances held at once; at least T of them are.
    """
    finite = targets.isfinite().all(1)
    targets = targets.masked_fill(~finite[:, None], 0)
    barred = targets.new_zeros(len(targets)).masked_fill(~finite, torch.inf)
    if points.device.type in HOST_DEVICES:
        best, unclear = nearest_by_product(points, targets, barred, max_distances)
        again = unclear.nonzero().flatten()
        if len(again):
            best[again] = nearest_by_differences(points[again], targets, barred, max_distances)
    else:
        exact, rows = targets.double(), max(1, max_distances // (2 * len(targets)))  # a distance takes twice the memory
        norms = exact.square().sum(1) + barred
        chunks = torch.split(points.double(), rows)
        best = torch.cat([torch.addmm(norms, chunk, exact.T, alpha=-2).argmin(1) for chunk in chunks])
    return best.masked_fill(~points.isfinite().all(1), 0)


def nearest_by_product(points: Tensor, targets: Tensor, barred: Tensor, max_distances: int) -> tuple[Tensor, Tensor]:
    """Return the nearest targets by a float32 product, and where its rounding may matter, (M,) int64 and bool.

    `barred` is added to the distances of each target: 0 or infinity, (T,).
    """
    rows, norms, best, unclear = max(1, max_distances // len(targets)), targets.square().sum(1) + barred, [], []
    buffer = targets.new_empty(min(rows, len(points)), len(targets))
    with full_precision():
        for chunk in torch.split(points, rows):
            distances = buffer[: len(chunk)]  # less the squared norms of the points
            torch.addmm(norms, chunk, targets.T, alpha=-2, out=distances)
            least, number = distances.min(1)
            second = distances.scatter_(1, number[:, None], torch.inf).amin(1)
            best.append(number)
            unclear.append((second <= least + rounding(chunk, least)) & (second < torch.inf))
    return torch.cat(best), torch.cat(unclear)


def nearest_by_differences(points: Tensor, targets: Tensor, barred: Tensor, max_distances: int) -> Tensor:
    """Return the numbers of the nearest targets, (M,): a float64 product, then differences where even that may err."""
    points, targets, limit, found = points.double(), targets.double(), max_distances // 8, []  # a pair takes 24 bytes
    norms, pairs = targets.square().sum(1) + barred, max(1, limit // points.shape[1])
    for chunk in torch.split(points, max(1, limit // len(targets))):
        distances = torch.addmm(norms, chunk, targets.T, alpha=-2)
        least = distances.amin(1)
        close = distances <= (least + rounding(chunk, least))[:, None]
        point, number = close.nonzero(as_tuple=True)
        parts = zip(torch.split(point, pairs), torch.split(number, pairs), strict=True)
        exact = torch.cat([squared_distances(chunk[i], targets[j]) for i, j in parts])
        smallest = exact.new_empty(len(chunk)).scatter_reduce(0, point, exact, "amin", include_self=False)
        number = number.where(exact == smallest[point], len(targets))
        found.append(number.new_empty(len(chunk)).scatter_reduce(0, point, number, "amin", include_self=False))
    return torch.cat(found)


def rounding(points: Tensor, least: Tensor) -> Tensor:
    """Return how far a nearest target's product may lie above the smallest product of each point, `least`, both (M,).

    A product ``|t|^2 - 2 p t`` of C dimensions is off by at most ``(C + 1) u (|t|^2 + 2 |p| |t|)``, whatever the order
    of its sums, with u half of eps (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). No nearest
    target is longer than ``|p|`` plus the distance r to any other, so this is below ``(C + 1) u (2 |p| + r)^2``. Two
    products are compared: twice that, with room for how the bound itself and `squared_distances` are rounded.
    """
    number, dim = torch.finfo(points.dtype), points.shape[1]
    norm = points.square().sum(1)
    reach = 2 * norm.sqrt() + (least + norm).clamp(min=0).sqrt()
    return (dim + 16) * (number.eps * reach.square() + number.tiny)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distance of each row of a (P, C) to that of b, (P,) float64, a function of the two alone.

    Sums by halves: a reduction of torch's adds in another order for another shape, elementwise operations never do.
    """
    terms = (a.double() - b.double()).square()
    while terms.shape[1] > 1:
        terms = F.pad(terms, (0, terms.shape[1] % 2))  # a zero for the odd one
        left, right = terms.chunk(2, dim=1)
        terms = left + right
    return terms[:, 0]


@torch.no_grad()
def nearest_of_all_ranks(codes: Tensor, vectors: Tensor, numbers: Tensor, max_distances: int) -> Tensor:
    """Return for each code the vector of all ranks that is nearest to it, (K, C), the same on all ranks.

    Each rank finds its own nearest. Then the smallest distance wins, at equal distance the lowest number. The winner's
    vector is summed with the others' zeros. Arguments as in ``kmeans``.
    """
    numbers, order = numbers.sort(stable=True)
    vectors = vectors[order]
    index = nearest(codes, vectors, max_distances)
    found = vectors[index]
    if not is_distributed():
        return found
    distance = squared_distances(found, codes).nan_to_num(torch.inf)
    wins = torch.ones_like(index, dtype=torch.bool)
    for value in (distance, numbers[index], torch.full_like(index, dist.get_rank())):  # an image may be there twice
        worst = torch.inf if value.is_floating_point() else torch.iinfo(value.dtype).max
        lowest = value.where(wins, worst)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        wins &= value == lowest
    return all_reduced(found.where(wins[:, None], 0))


@torch.no_grad()
def kmeans(codes: Tensor, vectors: Tensor, numbers: Tensor, max_distances: int) -> Tensor:
    """Return codes moved by k-means to the vectors of all ranks, the same on all ranks.

    Lloyd's iterations. They start from the vectors whose numbers have the smallest hashes: a uniform draw that depends
    on nothing else. A code without vectors stays where it is, so do the last ones where there are more codes than
    vectors.

    Args:
        codes: (K, C) float32, the same on all ranks.
        vectors: This rank's, (M, C) float32.
        numbers: Which vector of all ranks each is, (M,) int64, as of `numbers_of`.
        max_distances: Distances held at once.
    """
    codes = drawn(codes, vectors, numbers)
    for _ in range(KMEANS_ITERATIONS):
        tokens = nearest(vectors, codes, max_distances)
        counts = counts_of_all_ranks(tokens, len(codes))
        codes = torch.where(counts[:, None] > 0, means_of_all_ranks(vectors, tokens, counts), codes)
    return codes


def drawn(codes: Tensor, vectors: Tensor, numbers: Tensor) -> Tensor:
    """Return the codes (K, C), the first ones replaced by the vectors of all ranks with the smallest hashes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    own, row = one_to_one_hash(numbers).sort()
    own, none = own[: len(codes)], torch.iinfo(torch.int64).max
    hashes = own.new_zeros(world, len(codes))
    hashes[rank] = none
    hashes[rank, : len(own)] = own
    smallest, place = all_reduced(hashes).flatten().sort(stable=True)
    smallest, place = smallest[: len(codes)], place[: len(codes)]
    vector = vectors[row[(place % len(codes)).clamp(max=len(row) - 1)]]
    start = all_reduced(vector.where((place // len(codes) == rank)[:, None], 0))
    return start.where((smallest < none)[:, None], codes)


def one_to_one_hash(numbers: Tensor) -> Tensor:
    """Return a hash of int64 numbers: a one-to-one map of 64 bits, so no two numbers share one."""
    for factor in HASH_MULTIPLIERS:
        numbers = (numbers + 1) * factor
        numbers = numbers ^ (numbers >> 32 & 0xFFFFFFFF)
    return numbers


def counts_of_all_ranks(tokens: Tensor, num_codes: int) -> Tensor:
    """Return how many vectors of all ranks have each token, (K,) int64; unlike ``bincount``, no host waits for it."""
    return all_reduced(tokens.new_zeros(num_codes).index_add_(0, tokens, torch.ones_like(tokens)))


def means_of_all_ranks(vectors: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the vectors of all ranks that have each token, (K, C) float32; 0 where there are none.

    The sums are float64: the order in which ranks and batches add is lost when the mean is rounded to float32.
    """
    sums = vectors.new_zeros(len(counts), vectors.shape[1], dtype=torch.float64)
    sums = all_reduced(sums.index_add_(0, tokens, vectors.double()))
    return (sums / counts.clamp(min=1)[:, None]).float()


def numbers_of(ids: Tensor | None, count: int, length: int, device: torch.device) -> Tensor:
    """Return a number for each vector of this rank's images, (count * length,) int64: id times length plus position.

    Without ids, (count,) int64, the images of all ranks' batches are counted, rank after rank.
    """
    if ids is None:
        ids = torch.arange(count, device=device)
        if is_distributed():
            sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
            sizes[dist.get_rank()] = count
            ids = ids + all_reduced(sizes)[: dist.get_rank()].sum()
    return (ids.to(device)[:, None] * length + torch.arange(length, device=device)).flatten()


def all_reduced(value: Tensor) -> Tensor:
    """Return the sum over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply matrices of float32 in float32, whatever the run's setting for speed is (TF32, bfloat16)."""
    cuda: Any = torch.backends.cuda.matmul
    recent = hasattr(cuda, "fp32_precision")  # torch from 2.9
    key, exact = ("fp32_precision", "ieee") if recent else ("allow_tf32", False)
    backends = [cuda, torch.backends.mkldnn.matmul] if recent else [cuda]  # type: ignore[attr-defined]
    before = [getattr(backend, key) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, key, exact)
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, key, value)
