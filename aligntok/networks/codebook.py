"""Searches between vectors and codes in bounded memory, over all ranks of a run: nearest, k-means.

No rank sees another's vectors or distances; what travels are sums over codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KMEANS_ITERATIONS = 10
DISTANCE_BITS = 32  # of a float32


@torch.no_grad()
def nearest(points: Tensor, targets: Tensor, max_distances: int) -> Tensor:
    """Return for each point the number of the target at the smallest Euclidean distance, (M,) int64.

    Args:
        points: (M, C) float32.
        targets: (T, C) float32.
        max_distances: Distances held at once; at least T of them are.
    """
    rows, norms, found = max(1, max_distances // len(targets)), targets.square().sum(1), []
    distances = targets.new_empty(min(rows, len(points)), len(targets))  # less the point's own norm
    with full_precision():
        for chunk in torch.split(points, rows):
            torch.addmm(norms, chunk, targets.T, alpha=-2, out=distances[: len(chunk)])
            found.append(distances[: len(chunk)].min(1).indices)
    return torch.cat(found)


@torch.no_grad()
def nearest_of_all_ranks(codes: Tensor, vectors: Tensor, max_distances: int) -> Tensor:
    """Return for each code the vector of all ranks that is nearest to it, (K, C), the same on all ranks.

    Each rank finds its own nearest; then the smallest distance wins, at equal distance the lowest rank, and the
    winner's vector is summed with the others' zeros.

    Args:
        codes: (K, C) float32, the same on all ranks.
        vectors: This rank's, (M, C) float32.
        max_distances: Distances held at once.
    """
    found = vectors[nearest(codes, vectors, max_distances)]
    if not is_distributed():
        return found
    distance = (found - codes).square().sum(1).nan_to_num(torch.inf)
    bits = distance.view(torch.int32).long()  # of numbers that are not negative: ordered as the numbers are
    key = (bits << DISTANCE_BITS) | dist.get_rank()
    winner = key.clone()
    dist.all_reduce(winner, dist.ReduceOp.MIN)
    return all_reduced(torch.where((key == winner)[:, None], found, 0))


@torch.no_grad()
def kmeans(codes: Tensor, vectors: Tensor, max_distances: int) -> Tensor:
    """Return codes moved by k-means to the vectors of all ranks, the same on all ranks.

    Lloyd's iterations from vectors drawn from the batch with a fixed seed. A code without vectors stays where it is, so
    do the last ones where there are more codes than vectors.

    Args:
        codes: (K, C) float32.
        vectors: This rank's, (M, C) float32.
        max_distances: Distances held at once.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    sizes = torch.zeros(world, dtype=torch.int64, device=vectors.device)
    sizes[rank] = len(vectors)
    sizes = all_reduced(sizes)
    drawn = torch.randperm(int(sizes.sum()), generator=torch.Generator().manual_seed(0))[: len(codes)]
    here = drawn.to(vectors.device) - sizes[:rank].sum()
    own = (here >= 0) & (here < len(vectors))
    start = all_reduced(torch.where(own[:, None], vectors[here.clamp(0, len(vectors) - 1)], 0))
    codes = torch.cat((start, codes[len(start) :]))
    for _ in range(KMEANS_ITERATIONS):
        tokens = nearest(vectors, codes, max_distances)
        counts = all_reduced(torch.bincount(tokens, minlength=len(codes)))[:, None]
        sums = all_reduced(torch.zeros_like(codes).index_add_(0, tokens, vectors))
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    return codes


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
    if hasattr(cuda, "fp32_precision"):
        cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        switches: list[tuple[Any, str, Any]] = [(backend, "fp32_precision", "ieee") for backend in (cuda, cpu)]
    else:  # torch before 2.9
        switches = [(cuda, "allow_tf32", False)]
    before = [getattr(backend, key) for backend, key, _ in switches]
    try:
        for backend, key, exact in switches:
            setattr(backend, key, exact)
        yield
    finally:
        for (backend, key, _), value in zip(switches, before, strict=True):
            setattr(backend, key, value)
