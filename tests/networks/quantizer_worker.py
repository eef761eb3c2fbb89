"""What the ranks of test_quantizers.py run. Usage: quantizer_worker.py FOLDER RANK WORLD."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from aligntok.networks import VectorQuantizer

SETUPS = {
    "clustering": {},
    "cosine": {"distance": "cosine"},
    "ema": {"update": "ema", "decay": 0.5},
    "kmeans": {"update": "gradient", "kmeans_start": True},
    "kmeans_few": {"update": "gradient", "kmeans_start": True, "codebook_size": 100},  # more codes than vectors
    "bad": {},  # of one rank, not all numbers are finite
}
SPLIT = 3  # images of rank 0, out of 8: the ranks' shares differ


def latents(name):
    latents = torch.randn(3, 8, 4, 1, 9, generator=torch.Generator().manual_seed(0))
    latents[0, 5] = latents[0, 1]  # of equal vectors on two ranks, one wins
    if name == "bad":
        latents[0, 7] = -torch.nan  # its sign is that of what x86 makes of inf - inf
        return latents[:1]
    return latents


def results(rank, world):
    """Steps on this rank's share of the same global batches."""
    share = slice(None) if world == 1 else (slice(SPLIT), slice(SPLIT, None))[rank]
    results = {}
    for name, options in SETUPS.items():
        torch.manual_seed(0)
        quantizer = VectorQuantizer(**{"codebook_size": 40, "latent_dim": 4, "chunk_size": 7, **options})
        tokens = [quantizer(latent[share]).tokens for latent in latents(name)]
        results[name] = {"tokens": torch.stack(tokens), "counts": quantizer.counts, **quantizer.state_dict()}
    return results


if __name__ == "__main__":
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(results(rank, world), folder / f"rank{rank}.pt")
    dist.destroy_process_group()
