"""``aligntok sample``: samples of a generator as files, PNG for the eye and one ``.npz`` for ADM's evaluator."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor

from aligntok.callbacks.generation import setting
from aligntok.data.labels import ClassLabels
from aligntok.data.sources import Indices
from aligntok.errors import UserError, check_positive
from aligntok.files import hash_tensors, write_atomically, write_text
from aligntok.messages import building
from aligntok.programs.command import make_parser, read, start
from aligntok.programs.fabric import dealt, make_fabric, on_first_rank, progress_of
from aligntok.stages.generator import GeneratorStage, generator_recipe

DESCRIPTION = """\
Draw samples of a generator into a folder. The same command goes on where it was cut off.

  aligntok sample --config dit.yaml --config sample.yaml --ckpt_path runs/dit/checkpoints/last.ckpt
  aligntok sample --config dit.yaml --config sample.yaml --ckpt_path CHECKPOINT --num_samples 64 --classes [207,360]

Of a training recipe its `model` is taken; without one, what the checkpoint says of itself. Sampler and guidance can be
changed: --model.sampler.init_args.num_steps 50."""

RECORD = "samples.json"


@torch.no_grad()
def sample(
    generator: GeneratorStage,
    labels: Sequence[int] | Indices,
    folder: str | Path,
    fabric: Fabric | None = None,
    block_size: int = 500,
    batch_size: int = 50,
    npz: bool = True,
) -> None:
    """Write a sample of each label: ``png/000042_class7.png``, and all in one ``.npz``.

    The ``.npz`` holds ``arr_0``, uint8 (N, H, W, 3), in the order of the labels, and ``arr_1``, the labels (N,); its
    name says how many. A sample depends on its place and label alone, so any number of ranks writes the same files
    (another batch size may tip the rounding of a pixel); what is there from an earlier call is not drawn again.

    Args:
        generator: With a tokenizer that decodes; it is left on the device, in eval mode.
        labels: Class of each sample, e.g. ``ClassLabels(50_000, 1000).labels``.
        folder: Where the samples are, or will be.
        fabric: Device, precision and ranks; by default one process on whatever there is.
        block_size: Samples that are dealt to a rank at once.
        batch_size: Samples of a batch on one device.
        npz: Also write the ``.npz``.

    Raises:
        UserError: The folder holds samples of something else, or the generator has no such class.
    """
    check_positive(block_size=block_size, batch_size=batch_size)
    if generator.tokenizer is None:
        raise UserError("samples are decoded by model.tokenizer: name its checkpoint")
    fabric = fabric or make_fabric(devices=1)
    generator.to(fabric.device).eval()
    files = SampleFolder(Path(folder), np.asarray(labels, dtype=np.int64))

    def begin() -> list[range]:
        if generator.network.num_classes is not None:
            generator.network.check_labels(torch.from_numpy(files.labels))
        files.check(what_decides(generator, files.labels, fabric))
        return files.unfinished(block_size)

    left = on_first_rank(fabric, begin)
    progress = progress_of(fabric, "samples", left)
    for _, ids in dealt(fabric, left, batch_size):
        label = torch.from_numpy(files.labels[ids.start : ids.stop])
        batch = fabric.to_device({"id": torch.tensor(ids), "label": label})
        with fabric.autocast():
            files.write(ids, generator.predict_step(batch, 0)["image"])
        progress.add(len(ids))
    fabric.barrier()
    on_first_rank(fabric, lambda: files.finish(npz, block_size))


class SampleFolder:
    """The pictures of a folder.

    Args:
        folder: With ``png/`` in it.
        labels: Of all samples, (N,).
    """

    def __init__(self, folder: Path, labels: Indices) -> None:
        self.folder, self.labels = folder, labels

    def path(self, id: int) -> Path:
        """Return the place of a sample."""
        return self.folder / "png" / f"{id:06d}_class{self.labels[id]}.png"

    def check(self, record: dict[str, Any]) -> None:
        """Refuse a folder that holds samples of something else."""
        path = self.folder / RECORD
        there = json.loads(path.read_text()) if path.is_file() else record
        for key, value in record.items():
            if there.get(key) != value:
                raise UserError(
                    f"{self.folder} holds samples of {key} {there.get(key)}, but this run's {key} is {value}: give"
                    " another --output"
                )
        write_text(path, json.dumps(record, indent=1))

    def unfinished(self, block_size: int) -> list[range]:
        """Return the blocks of ids of which a picture is missing; each picture was written whole or not at all."""
        count = len(self.labels)
        blocks = [range(first, min(first + block_size, count)) for first in range(0, count, block_size)]
        left = [block for block in blocks if not all(self.path(id).is_file() for id in block)]
        if len(left) < len(blocks):
            print(f"{len(blocks) - len(left)} of {len(blocks)} blocks are finished", flush=True)
        return left

    def write(self, ids: range, image: Tensor) -> None:
        """Write images (B, 3, H, W) in [0, 1]."""
        pixels = image.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        def save(id: int) -> None:
            picture = Image.fromarray(pixels[id - ids.start])
            write_atomically(self.path(id), lambda path: picture.save(path, format="png"))

        with ThreadPoolExecutor() as pool:
            list(pool.map(save, ids))

    def finish(self, npz: bool, block_size: int) -> None:
        """Write the ``.npz`` from the pictures."""
        count = len(self.labels)
        print(f"{self.folder}: {count:,} samples in png/", flush=True)
        if not npz:
            return
        with Image.open(self.path(0)) as picture:
            width, height = picture.size
        path = self.folder / f"samples_{count}x{height}x{width}x3.npz"
        write_atomically(path, lambda temporary: self.pack(temporary, (count, height, width, 3), block_size))
        print(f"{path}: arr_0 for ADM's evaluator, or `aligntok evaluate {path} --reference REFERENCE`", flush=True)

    def pack(self, path: Path, shape: tuple[int, ...], block_size: int) -> None:
        """Write the arrays one picture at a time, so that 50,000 of them need no memory."""
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor() as pool:
                np.lib.format.write_array_header_1_0(cast(BinaryIO, file), header)
                for start in range(0, shape[0], block_size):
                    for pixels in pool.map(self.read, range(start, min(start + block_size, shape[0]))):
                        file.write(pixels)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(cast(BinaryIO, file), self.labels, allow_pickle=False)

    def read(self, id: int) -> bytes:
        """Return the bytes of a sample's picture."""
        with Image.open(self.path(id)) as picture:
            return np.asarray(picture.convert("RGB")).tobytes()


def what_decides(generator: Any, labels: Indices, fabric: Fabric) -> dict[str, Any]:
    """Return what decides on the samples."""
    return {
        "network": hash_tensors(generator.network.state_dict()),
        "guide": None if generator.guide is None else hash_tensors(generator.guide.network.state_dict()),
        "tokenizer": hash_tensors(generator.tokenizer.state_dict()),  # its fingerprint leaves out the decoder
        **{name: setting(part) for name, part in generator.sampling().items()},
        "seed": generator.seed,
        "precision": fabric.strategy.precision.precision,
        "count": len(labels),
        "labels": hashlib.sha256(labels.tobytes()).hexdigest()[:16],
    }


def sample_command(arguments: list[str]) -> None:
    """Run ``aligntok sample`` with the words that follow it.

    Raises:
        UserError: What the user can mend.
    """
    parser = make_parser("sample", "runs/samples", DESCRIPTION)
    add = parser.add_argument
    parser.add_subclass_arguments(GeneratorStage, "model", required=True, help="The generator's stage.")
    add("--ckpt_path", type=str | None, help="Checkpoint of its run.")
    add("--ema", type=float | None, help="Decay of the average to take; 0 for none. By default the first.")
    add("--init_from", type=str | None, help="Weights alone, such as LightningDiT's, in place of --ckpt_path.")
    parser.add_class_arguments(ClassLabels, skip={"num_classes"}, instantiate=False)
    parser.add_function_arguments(sample, skip={"generator", "labels", "folder", "fabric"})
    labels = ("num_samples", "policy", "classes", "seed")
    keys = ("block_size", "batch_size", "npz")
    options = read(parser, arguments, {*labels, *keys}, {"model", "ckpt_path", "ema", "init_from"}, generator_recipe)
    if options.ckpt_path is None and options.init_from is None:
        raise UserError("aligntok sample needs the weights: --ckpt_path CHECKPOINT, or else --init_from FILE")
    if options.ckpt_path is None and options.ema is not None:
        raise UserError("--ema picks an average of --ckpt_path CHECKPOINT, and --init_from has none: leave it out")
    fabric = start(parser, "sample", options)
    with building():
        generator: GeneratorStage = parser.instantiate(options).model
    if options.ckpt_path is None:
        generator.init_from(options.init_from)
    else:
        generator.load(options.ckpt_path, options.ema)
    num_classes = generator.network.num_classes or 1
    wanted = ClassLabels(num_classes=num_classes, **{key: options[key] for key in labels})
    sample(generator, wanted.labels, options.output, fabric, **{key: options[key] for key in keys})
