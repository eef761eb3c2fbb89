"""Peak memory and CPU seconds of the online-clustered quantizer at AliTok's training size, on one of 32 ranks.

The peer's way (rewritten from a description of it): each rank gathers the vectors of all ranks and holds their whole
matrix of distances to the codes, once, in float32; its minima over the codes are the tokens, those over the vectors are
what the codes move to. Ours: a whole training forward pass of ``VectorQuantizer`` (tokens, losses, output, usage,
move) on this rank's vectors, and the arithmetic of its three reductions over 32 ranks; no code was in use before, so
all of them look for a vector. Network time counts on neither side: the peer would send its vectors to all ranks, 54 MB,
ours sends 0.6 MB. Each way has a process of its own and one thread; memory is its peak above what was there with this
rank's vectors and the codes.

    OMP_NUM_THREADS=1 python benchmarks/quantizer.py
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from aligntok.networks import VectorQuantizer, codebook

IMAGES, TOKENS, CODES, LATENT_DIM, RANKS = 48, 273, 4096, 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--rounds", type=int, default=5, help="of ours; the peer's way runs once")
    parser.add_argument("--way", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        torch.set_num_threads(1)
        print(*measure(args.way, args.ranks, args.rounds if args.way == "ours" else 1))
        return
    results = {}
    for way in ("ours", "peer"):
        command = [sys.executable, __file__, "--way", way, "--ranks", str(args.ranks), "--rounds", str(args.rounds)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[way] = [float(number) for number in output.split()]
    (memory, seconds), (peer_memory, peer_seconds) = results["ours"], results["peer"]
    print(
        "| vectors per rank x codes x ranks | memory, ours | full matrix | ratio | CPU s, ours | full matrix | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {IMAGES}x{TOKENS} x {CODES} x {args.ranks} | {memory:.3f} GB | {peer_memory:.2f} GB |"
        f" **{peer_memory / memory:.0f}** | {seconds:.2f} | {peer_seconds:.1f} | **{peer_seconds / seconds:.0f}** |"
    )


def measure(way: str, ranks: int, rounds: int) -> tuple[float, float]:
    """Return the peak memory in GB above that at the start, and the median CPU seconds."""
    torch.manual_seed(0)
    latent = torch.randn(IMAGES, LATENT_DIM, 1, TOKENS)
    quantizer = VectorQuantizer(CODES, LATENT_DIM)
    codes = quantizer.codebook.detach().clone()
    dist.all_reduce, dist.get_rank, dist.get_world_size = among(ranks), lambda: 0, lambda: ranks
    codebook.is_distributed = lambda: True
    small = torch.randn(1, LATENT_DIM, 1, 9)
    VectorQuantizer(9, LATENT_DIM)(small)
    full_matrix(small, codes[:9], 2)  # libraries are loaded
    before, seconds = peak(), []
    for _ in range(rounds):
        quantizer.usage.zero_()
        quantizer.codebook.data.copy_(codes)
        start = time.process_time()
        quantizer(latent) if way == "ours" else full_matrix(latent, codes, ranks)
        seconds.append(time.process_time() - start)
    return (peak() - before) / 1e9, statistics.median(seconds)


def full_matrix(latent: torch.Tensor, codes: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens, and the vector for each code, from all ranks' distances."""
    vectors = latent.flatten(2).transpose(1, 2).flatten(0, 1)
    gathered = torch.cat([vectors] * ranks)
    distances = torch.addmm(codes.square().sum(1), gathered, codes.T, alpha=-2)
    distances += gathered.square().sum(1, keepdim=True)
    return distances.min(1).indices, gathered[distances.min(0).indices]


def among(ranks: int):
    """Return a stand-in for ``all_reduce`` that does its arithmetic, with ranks that hold what this one holds."""

    def all_reduce(value: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
        other = torch.zeros_like(value) if value.is_floating_point() else value.clone()  # another's vectors: no winner
        for _ in range(ranks - 1):
            torch.minimum(value, other, out=value) if op == dist.ReduceOp.MIN else value.add_(other)

    return all_reduce


def peak() -> int:
    """Return the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
