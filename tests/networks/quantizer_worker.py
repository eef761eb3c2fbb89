"""What the ranks of test_quantizers.py run."""

import os

import torch
import torch.distributed as dist

from aligntok.networks import VectorQuantizer

SETUPS = {
    "clustering": {},
    "cosine": {"distance": "cosine"},
    "ema": {"update": "ema", "decay": 0.5},
    "kmeans": {"update": "gradient", "kmeans_start": True},
    "kmeans_few": {"update": "gradient", "kmeans_start": True, "codebook_size": 100},  # more codes than vectors
    "kmeans_places": {"update": "gradient", "kmeans_start": True},  # without ids
    "ties": {},  # whole numbers far from the origin: many codes are equally far from several vectors
    "kmeans_ties": {"update": "ema", "kmeans_start": True},
    "bad": {},  # of one rank, not all numbers are finite
}
SHARES = ([6, 1, 4], [0, 2, 7, 5, 3])  # images of the two ranks: neither of one size nor in order
PLACES = ([0, 1, 2], [3, 4, 5, 6, 7])  # where images have no ids, rank 1 goes on after rank 0
IDS = torch.arange(8) * 5 + 2


def latents(name):
    generator = torch.Generator().manual_seed(0)
    if name.endswith("ties"):
        return torch.randint(-1, 2, (3, 8, 4, 1, 9), generator=generator) + 5000.0
    latents = torch.randn(3, 8, 4, 1, 9, generator=generator)
    latents[0, 5] = latents[0, 1]  # of equal vectors on two ranks, one wins
    if name == "bad":
        latents[0, 7] = -torch.nan  # its sign is that of what x86 makes of inf - inf
        return latents[:1]
    return latents


def results(rank, world):
    """Steps on this rank's share of the same global batches; tokens of the other rank's images are 0."""
    results = {}
    for name, options in SETUPS.items():
        shares = PLACES if name == "kmeans_places" else SHARES
        share = shares[rank] if world == 2 else slice(None)
        torch.manual_seed(0)
        quantizer = VectorQuantizer(**{"codebook_size": 40, "latent_dim": 4, "chunk_size": 7, **options})
        if name == "ties":
            quantizer.codebook.data = torch.randint(-2, 3, (40, 4)) / 2 + 5000.0
        batches, tokens = latents(name), torch.zeros(3, 8, 9, dtype=torch.int64)
        for latent, found in zip(batches, tokens, strict=False):
            found[share] = quantizer(latent[share], None if name == "kmeans_places" else IDS[share]).tokens
        results[name] = {"tokens": tokens, "counts": quantizer.counts, **quantizer.state_dict()}
    return results


def results_of_rank():
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    return results(dist.get_rank(), 2)
