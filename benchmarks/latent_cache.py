"""Latents/s of the latent cache through its DataLoader, against the published way, on the same files.

The published way (LightningDiT's dataset, rewritten from a description of it): each item opens its safetensors file and
takes its row, latents or mirrored ones, by ``get_slice``; torch's loader stacks them. "In memory" gathers each batch
from one tensor that holds all latents, in torch's loader too: an upper bound for whoever reads files. All are shuffled
over all shards, normalise nothing, and take turns in one process; medians over the rounds. "Cold" rows begin each pass
with the files dropped from the page cache, as a cache larger than the memory would have it. The second table opens a
cache of ImageNet's size, whose files are sparse: all that opening reads is there. Run it on an idle machine:

    python benchmarks/latent_cache.py
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from aligntok.cache import Manifest, Record, shard_name
from aligntok.data import LatentDataModule, LatentShards

SHAPE = (32, 16, 16)
NUM_SHARDS, SHARD_SIZE = 8, 1000
IMAGENET, IMAGENET_SHARD = 1_281_167, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--open", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(opening(args.open))
        return
    torch.set_num_threads(1)  # a copy gains nothing from more
    shape = "x".join(map(str, SHAPE))
    print(f"{os.cpu_count()} CPUs, {shape}, batches of {args.batch_size}, {NUM_SHARDS} shards of {SHARD_SIZE}\n")
    print("| dtype | workers | aligntok, items/s | file per item | ratio (rounds) | in memory | share of it |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.bfloat16):
            cache = Path(folder) / str(dtype)
            write(cache, dtype)
            for workers in args.workers:
                print(row(cache, dtype, args.batch_size, workers, args.rounds), flush=True)
            if dtype == torch.float32:
                for workers in args.workers:
                    print(row(cache, dtype, args.batch_size, workers, args.rounds, cold=True), flush=True)
        print(f"\nOpening {IMAGENET:,} items, in a new process, median of 3:\n")
        print(
            "| opening, s | with the first batch of 256, s | own memory, MB | mapped files, MB | process before, MB |"
        )
        print("|---|---|---|---|---|")
        sparse(Path(folder) / "imagenet")
        command = [sys.executable, __file__, "--open", str(Path(folder) / "imagenet")]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
        print(f"| {' | '.join(sorted(column, key=float)[1] for column in zip(*runs, strict=True))} |")


def row(cache: Path, dtype: torch.dtype, batch_size: int, workers: int, rounds: int, cold: bool = False) -> str:
    """Return a row of the first table."""
    loaders = {
        "ours": lambda: our_loader(cache, batch_size, workers),
        "published": lambda: DataLoader(FilePerItem(cache), batch_size, shuffle=True, num_workers=workers),
        "memory": lambda: DataLoader(InMemory(cache), batch_size, shuffle=True, num_workers=workers, collate_fn=same),
    }
    if cold:
        loaders.pop("memory")
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, make in loaders.items():
            if cold:
                drop(cache)
            rates[name].append(items_per_second(make(), batch_size, workers))
    ratios = [a / b for a, b in zip(rates["ours"], rates["published"], strict=True)]
    ours, published, memory = (*(statistics.median(values) for values in rates.values()), 0.0)[:3]
    bound = f"{memory:,.0f} | {100 * ours / memory:.0f} %" if memory else "|"
    name = str(dtype).removeprefix("torch.") + ", cold" * cold
    return (
        f"| {name} | {workers} | {ours:,.0f} | {published:,.0f} | **{ours / published:.1f}** ({min(ratios):.1f} to"
        f" {max(ratios):.1f}) | {bound} |"
    )


def drop(cache: Path) -> None:
    """Drop the files from the page cache, which keeps what some loader still maps."""
    gc.collect()
    for path in cache.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def our_loader(cache: Path, batch_size: int, workers: int) -> DataLoader:
    source = LatentShards(str(cache))
    data = LatentDataModule(source, batch_size, val=source, num_workers=workers)
    data.setup()
    return data.train_dataloader()


class FilePerItem(Dataset):
    """The published way."""

    def __init__(self, cache: Path) -> None:
        self.files = sorted(cache.glob("*.safetensors"))

    def __len__(self) -> int:
        return NUM_SHARDS * SHARD_SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, at = divmod(index, SHARD_SIZE)
        with safe_open(self.files[shard], framework="pt", device="cpu") as file:
            key = "latents" if torch.rand(()) < 0.5 else "latents_flip"
            return file.get_slice(key)[at : at + 1][0], file.get_slice("labels")[at : at + 1][0]


class InMemory(Dataset):
    """One tensor, and a gather for each batch."""

    def __init__(self, cache: Path) -> None:
        parts = []
        for path in sorted(cache.glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                parts.append((file.get_tensor("latents"), file.get_tensor("labels")))
        self.latents, self.labels = (torch.cat(column) for column in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(indices)
        return self.latents[chosen], self.labels[chosen]


def same(batch: object) -> object:
    return batch


def items_per_second(loader: DataLoader, batch_size: int, workers: int) -> float:
    """Return the rate of a pass of whole batches, once its workers run."""
    times = []
    for _ in loader:
        times.append(time.perf_counter())
    times = times[: NUM_SHARDS * SHARD_SIZE // batch_size]
    warm = 2 * workers + 1
    return batch_size * (len(times) - warm) / (times[-1] - times[warm - 1])


def write(cache: Path, dtype: torch.dtype) -> None:
    """Write a cache of random latents."""
    cache.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(NUM_SHARDS):
        latents = torch.randn(SHARD_SIZE, *SHAPE, generator=generator).to(dtype)
        labels = torch.randint(1000, (SHARD_SIZE,), generator=generator)
        content = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": labels}
        save_file(content, cache / shard_name(number))
    counts = [SHARD_SIZE] * NUM_SHARDS
    manifest(str(dtype).removeprefix("torch."), counts, SHARD_SIZE).write(cache)


def sparse(cache: Path) -> None:
    """Make the files of an ImageNet cache with headers and labels, and holes for latents."""
    cache.mkdir()
    full, rest = divmod(IMAGENET, IMAGENET_SHARD)
    counts = [IMAGENET_SHARD] * full + [rest]
    for number, count in enumerate(counts):
        header, end = '{"__metadata__":{"format":"pt"}', 0
        for key, shape, size, name in (
            ("labels", [count], 8, "I64"),
            ("latents", [count, *SHAPE], 4, "F32"),
            ("latents_flip", [count, *SHAPE], 4, "F32"),
        ):
            begin, end = end, end + size * int(np.prod(shape))
            header += f',"{key}":{{"dtype":"{name}","shape":{shape},"data_offsets":[{begin},{end}]}}'
        text = (header + "}").encode()
        text += b" " * (-len(text) % 8)
        with (cache / shard_name(number)).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(np.random.default_rng(number).integers(0, 1000, count).astype(np.int64).tobytes())
            file.truncate(8 + len(text) + end)
    manifest("float32", counts, IMAGENET_SHARD).write(cache)


def manifest(dtype: str, counts: list[int], shard_size: int) -> Manifest:
    tokenizer = {"fingerprint": "", "kind": "continuous", "latent_shape": list(SHAPE), "image_size": [256, 256]}
    images = {"source": "", "split": "train", "crop": "center", "count": sum(counts), "classes": []}
    records = [Record(shard_name(k), k * shard_size, count, [], "") for k, count in enumerate(counts)]
    statistics = {"mean": [0.0] * SHAPE[0], "std": [1.0] * SHAPE[0]}
    return Manifest(tokenizer, images, dtype, True, shard_size, statistics, shards=records)


def opening(cache: str) -> str:
    """Return the second table's values: what opening a cache, and a first batch, take in this process."""
    before = resident()
    start = time.perf_counter()
    loader = our_loader(Path(cache), 256, 0)
    seconds = time.perf_counter() - start
    next(iter(loader))
    first = time.perf_counter() - start
    after = resident()
    own, files = ((after[kind] - before[kind]) / 1024 for kind in ("Anon", "File"))
    return f"{seconds:.2f} {first:.2f} {own:.0f} {files:.0f} {sum(before.values()) / 1024:.0f}"


def resident() -> dict[str, int]:
    """Return resident memory of this process, anonymous and of files, in KiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(lines[f"Rss{kind}"].split()[0]) for kind in ("Anon", "File")}


if __name__ == "__main__":
    main()
