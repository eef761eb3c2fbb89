"""Images/s of the training data path against torchvision's ``ImageFolder`` and transforms, on the same JPEG files.

Both give batches of 256 x 256 crops, mirrored in half of the cases: ours (bicubic, as ADM resizes) bytes, the plain one
(``Resize``, bilinear, ``RandomCrop``, ``RandomHorizontalFlip``, ``ToTensor``) floats. The files are made in a temporary
folder: ``small`` is 500 x 375, ``large`` 2000 x 1500. The two take turns in one process; medians over the rounds. The
second table says what bounds ours: the resize of small files; of large ones the decoding, though it is done at 1/2, 1/4
or 1/8 where that suffices. Run it on an idle machine:

    python benchmarks/data_path.py
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from aligntok.data import ImageFolder, LatentDataModule

SIZES = {"small": (500, 375, 192), "large": (2000, 1500, 48)}  # width, height, number of files
NUM_CLASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)  # decoding uses one thread; more would only be in the way of the workers
    print(f"{os.cpu_count()} CPUs, {args.image_size} x {args.image_size} crops, batches of {args.batch_size}\n")
    print("| files | workers | aligntok, images/s | torchvision, images/s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height, count) in SIZES.items():
            make_files(Path(folder) / name, width, height, count)
            for workers in args.workers:
                rates = {our_loader: [], plain_loader: []}
                for _ in range(args.rounds):
                    for make, values in rates.items():
                        loader = make(Path(folder) / name, args.image_size, args.batch_size, workers)
                        values.append(images_per_second(loader, workers))
                        del loader  # and with it its workers
                ours, plain = (statistics.median(values) for values in rates.values())
                print(f"| {name} | {workers} | {ours:.0f} | {plain:.0f} | {ours / plain:.2f} |", flush=True)
        print("\nOne image, one process, ms:\n")
        print("| files | full decode | ours, all | of it decode | crop, resize, flip |\n|---|---|---|---|---|")
        for name in SIZES:
            print(parts(Path(folder) / name, args.image_size))


def make_files(folder: Path, width: int, height: int, count: int) -> None:
    """Write JPEGs with the detail of photographs: noise at several scales."""
    rng = np.random.default_rng(0)
    for index in range(count):
        image = Image.new("RGB", (width, height), "grey")
        for scale in (128, 32, 8):
            noise = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            image = Image.blend(image, layer, 0.4)
        image = image.filter(ImageFilter.DETAIL)
        path = folder / f"class{index % NUM_CLASSES}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def our_loader(folder: Path, size: int, batch_size: int, workers: int) -> DataLoader:
    source = ImageFolder(str(folder))
    data = LatentDataModule(source, batch_size, size, val=source, num_workers=workers)
    data.setup()
    return data.train_dataloader()


def plain_loader(folder: Path, size: int, batch_size: int, workers: int) -> DataLoader:
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    dataset = datasets.ImageFolder(folder, transform)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)


def images_per_second(loader: DataLoader, workers: int) -> float:
    """Return the rate of a pass, once its workers run: from batch ``workers`` to the last one."""
    times = [time.perf_counter() for _ in loader]
    warm = max(1, workers)
    return loader.batch_size * (len(times) - warm) / (times[-1] - times[warm - 1])


def parts(folder: Path, size: int) -> str:
    """Return a row of the table of where the time of one image goes."""
    source = ImageFolder(str(folder))
    data = LatentDataModule(source, 1, size, val=source)
    data.setup()
    dataset = data.datasets["train"]
    indices = range(0, len(source), max(1, len(source) // 32))
    images = [dataset.source[index][0] for index in indices]

    full = milliseconds(lambda: [source[index] for index in indices])
    ours = milliseconds(lambda: [dataset[(0, index)] for index in indices])
    decode = milliseconds(lambda: [dataset.source[index] for index in indices])
    rng = np.random.default_rng(0)
    crop = milliseconds(lambda: [dataset.augmentation(image, (size, size), rng) for image in images])
    values = [value / len(indices) for value in (full, ours, decode, crop)]
    return f"| {folder.name} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


def milliseconds(function: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main()
