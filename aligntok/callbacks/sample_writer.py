"""Samples of a generator as files: PNG for the eye, one ``.npz`` for ADM's evaluator."""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aligntok.callbacks.blocks import Block, BlockWriter
from aligntok.errors import UserError
from aligntok.files import hash_tensors, write_atomically, write_text

RECORD = "samples.json"


class SampleWriter(BlockWriter):
    """Writes the samples that ``data.predict`` (``ClassLabels``) asks for: ``png/000042_class7.png``, and one ``.npz``.

    The ``.npz`` holds ``arr_0``, uint8 (N, H, W, 3), in the order of the ids, and ``arr_1``, the labels (N,); its name
    says how many. A sample depends on its id and label alone, so any number of ranks writes the same files (another
    batch size may tip the rounding of a pixel), and a run that was cut off goes on: blocks that are there are not drawn
    again.

    Args:
        block_size: Samples that are dealt to a rank at once.
        batch_size: Samples of a batch on one device.
        npz: Also write the ``.npz``.
    """

    def __init__(self, block_size: int = 500, batch_size: int = 50, npz: bool = True) -> None:
        super().__init__(block_size, batch_size)
        self.npz = npz
        self.labels: Tensor = torch.empty(0)
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out what is left."""
        if stage != "predict":
            return
        if not hasattr(pl_module, "sample"):
            raise UserError(f"SampleWriter writes what a generator draws, but {type(pl_module).__name__} draws nothing")
        if getattr(pl_module, "tokenizer", None) is None:
            raise UserError("SampleWriter needs model.tokenizer, which decodes the samples: name its checkpoint")
        data: Any = getattr(trainer, "datamodule", None)
        source: Any = data.sources["predict"] if hasattr(data, "sources") else None
        if not hasattr(source, "labels") or not hasattr(source, "num_classes"):
            raise UserError(
                "SampleWriter needs data.predict to be an aligntok.data.ClassLabels: which classes, how many"
            )
        self.labels = torch.from_numpy(source.labels)
        super().setup(trainer, pl_module, stage)

    def path(self, id: int) -> Path:
        """Return the place of a sample."""
        return self.folder / "png" / f"{id:06d}_class{int(self.labels[id])}.png"

    def finished(self, block: Block) -> bool:
        """Tell whether all samples of a block are there; each was written whole or not at all."""
        return all(self.path(id).is_file() for id in block.ids)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse a folder that holds samples of something else."""
        record = self.record(trainer, module)
        path = self.folder / RECORD
        there = json.loads(path.read_text()) if path.is_file() else record
        for key, value in record.items():
            if there.get(key) != value:
                raise UserError(
                    f"{self.folder} holds samples of {key} {there.get(key)}, but this run's {key} is {value}: give"
                    " another --output"
                )
        write_text(path, json.dumps(record, indent=1))

    def record(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        """Return what decides on the samples."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "network": hash_tensors(module.network.state_dict()),
            "guide": None if module.guide is None else hash_tensors(module.guide.network.state_dict()),
            "tokenizer": hash_tensors(module.tokenizer.state_dict()),  # its fingerprint leaves out the decoder
            **{name: setting(part) for name, part in module.sampling().items()},
            "seed": module.seed,
            "precision": str(trainer.precision),
            "count": len(self.labels),
            "labels": data.fingerprint("predict"),
        }

    def add(self, block: Block, outputs: Any, batch: Any, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep a batch as bytes."""
        image: Tensor = outputs["image"].float().clamp(0, 1).mul(255).round().to(torch.uint8)
        self.waiting.append((batch["id"].cpu(), image.permute(0, 2, 3, 1).cpu()))

    def write(self, block: Block) -> None:
        """Write the pictures of a block."""
        ids, images = (torch.cat(column) for column in zip(*self.waiting, strict=True))
        self.waiting = []

        def save(id: int, image: Tensor) -> None:
            picture = Image.fromarray(image.numpy())
            write_atomically(self.path(id), lambda path: picture.save(path, format="png"))

        with ThreadPoolExecutor() as pool:
            list(pool.map(save, ids.tolist(), images))

    def complete(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the ``.npz`` from the pictures."""
        count = len(self.labels)
        print(f"{self.folder}: {count:,} samples in png/", flush=True)
        if not self.npz:
            return
        with Image.open(self.path(0)) as picture:
            width, height = picture.size
        path = self.folder / f"samples_{count}x{height}x{width}x3.npz"
        write_atomically(path, lambda temporary: self.pack(temporary, (count, height, width, 3)))
        print(f"{path}: arr_0 for ADM's evaluator, or `aligntok evaluate {path} --reference REFERENCE`", flush=True)

    def pack(self, path: Path, shape: tuple[int, ...]) -> None:
        """Write the arrays one picture at a time, so that 50,000 of them need no memory."""
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor() as pool:
                np.lib.format.write_array_header_1_0(cast(BinaryIO, file), header)
                for start in range(0, shape[0], self.block_size):
                    for pixels in pool.map(self.read, range(start, min(start + self.block_size, shape[0]))):
                        file.write(pixels)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(cast(BinaryIO, file), self.labels.numpy(), allow_pickle=False)

    def read(self, id: int) -> bytes:
        """Return the bytes of a sample's picture."""
        with Image.open(self.path(id)) as picture:
            return np.asarray(picture.convert("RGB")).tobytes()


def setting(part: object) -> str:
    """Return a class and its plain values; what begins with an underscore is no setting."""
    numbers = {key: value for key, value in vars(part).items() if not isinstance(value, list) and key[0] != "_"}
    return f"{type(part).__name__}({', '.join(f'{key}={value}' for key, value in numbers.items())})"
