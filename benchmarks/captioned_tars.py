"""Images/s of captioned tar shards against webdataset and litdata on the same pictures; 1e8 rows; resume in mid-epoch.

The three read the same JPEGs, 500 x 375, and make the same random crops of 256 px; what differs is how they read and
shuffle: webdataset the tars from front to back with a buffer of 200, litdata its own chunks, ours the tars at random.
Then the time to the first batch of a run that goes on in the middle of an epoch: webdataset, which keeps no position,
reads up to there. The last line opens an index of 10,000 tars with 10,000 rows each, in sparse files. Run it on an idle
machine (pip install webdataset litdata):

    python benchmarks/captioned_tars.py
"""

import argparse
import io
import json
import os
import resource
import statistics
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
import webdataset
from data_path import make_files
from PIL import Image
from torch.utils.data import Dataset

from aligntok.data import Augmentation, CaptionedTars, LatentDataModule
from aligntok.data.images import random_crop
from aligntok.data.loaders import Position, ShuffledSampler
from aligntok.data.order import shuffled_keys

NUM_SHARDS, CROP = 4, (256, 256)
ROWS, TARS = 10_000, 10_000  # of a tar, and tars: 1e8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tars(folder, args.images)
        make_chunks(folder)
        print(f"{os.cpu_count()} CPUs, {args.images} images\n")
        print("| workers | aligntok, images/s | webdataset | litdata |\n|---|---|---|---|")
        for workers in args.workers:
            rates: dict[Callable[..., Iterator[Any]], list[float]] = {ours: [], theirs_tars: [], theirs_chunks: []}
            for _ in range(args.rounds):
                for make, values in rates.items():
                    values.append(images_per_second(make(folder, args.batch_size, workers)))
            print(
                f"| {workers} | " + " | ".join(f"{statistics.median(v):.0f}" for v in rates.values()) + " |", flush=True
            )
        print("\n| resume in mid-epoch, seconds to the first batch | 0 workers |\n|---|---|")
        half = args.images // 2
        print(f"| aligntok | {first_batch(ours(folder, args.batch_size, 0, half)):.2f} |")
        print(f"| webdataset, by reading up to there | {skipped(folder, args.batch_size, half):.2f} |")
        print(f"| litdata, by its own state | {litdata_resume(folder, args.batch_size, half):.2f} |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        print("\n" + hundred_million(Path(name)))


def make_tars(folder: Path, count: int) -> None:
    make_files(folder / "files", 500, 375, count)
    files = sorted((folder / "files").rglob("*.jpg"))
    (folder / "tars").mkdir()
    for number in range(NUM_SHARDS):
        with tarfile.open(folder / f"tars/{number:05d}.tar", "w") as tar:
            for path in files[number::NUM_SHARDS]:
                tar.add(path, path.name)
                text = tarfile.TarInfo(f"{path.stem}.txt")
                text.size = len(caption := f"a picture of noise, number {path.stem}".encode())
                tar.addfile(text, io.BytesIO(caption))


def row(source: tuple[str, int]) -> dict[str, Any]:
    """Return what litdata stores of an image."""
    folder, index = source
    path = sorted(Path(folder).rglob("*.jpg"))[index]
    return {"image": path.read_bytes(), "caption": f"a picture of noise, number {path.stem}"}


def make_chunks(folder: Path) -> None:
    files = folder / "files"
    count = len(list(files.rglob("*.jpg")))
    inputs = [(str(files), index) for index in range(count)]
    litdata.optimize(row, inputs, str(folder / "chunks"), chunk_bytes="8MB", num_workers=1)


def ours(folder: Path, batch_size: int, workers: int, image: int = 0) -> Iterator[Any]:
    source = CaptionedTars(str(folder / "tars"))
    augmentation = Augmentation(flip=False)
    data = LatentDataModule(source, batch_size, CROP, val=source, augmentation=augmentation, num_workers=workers)
    data.setup()
    data.load_state_dict({"epoch": 0, "image": image})
    while True:
        for batch in data.train_dataloader():
            yield batch["image"], batch["caption"]


def cropped(content: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(content))
    image.draft(None, CROP)  # as ours
    pixels = np.array(random_crop(image.convert("RGB"), CROP, np.random.default_rng()))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def theirs_tars(folder: Path, batch_size: int, workers: int) -> Iterator[Any]:
    pattern = f"{folder}/tars/{{00000..{NUM_SHARDS - 1:05d}}}.tar"
    found = webdataset.WebDataset(pattern, shardshuffle=NUM_SHARDS, nodesplitter=webdataset.split_by_node)
    rows = found.shuffle(200).to_tuple("jpg", "txt").map_tuple(cropped, bytes.decode).batched(batch_size)
    while True:
        yield from webdataset.WebLoader(rows, batch_size=None, num_workers=workers)


class Chunks(litdata.StreamingDataset):
    """litdata's chunks, cropped."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return cropped(found["image"]), found["caption"]


def chunk_loader(folder: Path, batch_size: int, workers: int) -> Any:
    return litdata.StreamingDataLoader(Chunks(str(folder / "chunks"), shuffle=True), batch_size, num_workers=workers)


def theirs_chunks(folder: Path, batch_size: int, workers: int) -> Iterator[Any]:
    loader = chunk_loader(folder, batch_size, workers)
    while True:
        yield from loader


def images_per_second(batches: Iterator[Any], seconds: float = 4.0) -> float:
    """Count images for some seconds after the first batches."""
    for _ in range(4):
        next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        count += len(next(batches)[0])
    rate = count / (time.perf_counter() - begin)
    batches.close()  # type: ignore[attr-defined]
    return rate


def first_batch(batches: Iterator[Any]) -> float:
    begin = time.perf_counter()
    next(batches)
    return time.perf_counter() - begin


def skipped(folder: Path, batch_size: int, images: int) -> float:
    begin, batches = time.perf_counter(), theirs_tars(folder, batch_size, 0)
    for _ in range(images // batch_size + 1):
        next(batches)
    return time.perf_counter() - begin


def litdata_resume(folder: Path, batch_size: int, images: int) -> float:
    loader = chunk_loader(folder, batch_size, 1)  # its state needs a worker
    batches = iter(loader)
    for _ in range(images // batch_size):
        next(batches)
    state = loader.state_dict()
    del batches
    begin, loader = time.perf_counter(), chunk_loader(folder, batch_size, 1)
    loader.load_state_dict(state)
    next(iter(loader))
    return time.perf_counter() - begin


class One(Dataset):
    """An image, so that there is something to validate on."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return Image.new("RGB", CROP), "grey"


def hundred_million(folder: Path) -> str:
    """Open 1e8 rows, of which the first tar alone holds images."""
    make_files(folder / "files", 64, 64, 8)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for path in sorted((folder / "files").rglob("*.jpg")):
            tar.add(path, path.name)
            tar.addfile(tarfile.TarInfo(f"{path.stem}.txt"))
    for number in range(1, TARS):
        tar, index = folder / f"{number:05d}.tar", folder / f"{number:05d}.tar.index"
        tar.touch()
        os.truncate(tar, 1 << 30)
        about = {"size": 1 << 30, "mtime": tar.stat().st_mtime_ns, "suffixes": ["txt"], "problem": ""}
        size = ROWS * 2 * 2 * 8
        header = json.dumps(
            {
                "__metadata__": {"format": "1", "index": json.dumps(about)},
                "members": {"dtype": "I64", "shape": [ROWS, 2, 2], "data_offsets": [0, size]},
            }
        ).encode()
        index.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(index, 8 + len(header) + size)
    before, begin = memory(), time.perf_counter()
    data = LatentDataModule(CaptionedTars(str(folder)), 1024, CROP, val=One())
    data.setup()
    opened, count = time.perf_counter() - begin, data.num_images("train")
    begin = time.perf_counter()
    sampler = ShuffledSampler(count, 1024, 1024, 0, 1, 0, Position(2, count // 2))
    keys = iter(sampler)
    for _ in range(100_000):
        next(keys)
    order, after = time.perf_counter() - begin, memory()
    begin = time.perf_counter()
    shuffled_keys(count, 0, 3)(np.arange(count - 1024, count))
    last = time.perf_counter() - begin
    return (
        f"{count:,} rows in {TARS:,} tars: opened in {opened:.1f} s, 100,000 keys from mid-epoch in {order:.2f} s,"
        f" the last 1,024 of an epoch in {last * 1000:.1f} ms; peak memory + {after - before:.0f} MB"
    )


def memory() -> float:
    """Return the peak of resident memory, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
