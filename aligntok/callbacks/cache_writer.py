"""What the writers of latents and tokens share: shards with hashes, a manifest, repair, a look at what was written."""

from __future__ import annotations

import json
from abc import abstractmethod
from bisect import bisect_right
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import save
from torch import Tensor
from torchvision.utils import save_image

from aligntok.cache import LABELS, Layout, Manifest, Record, Shard, shard_name
from aligntok.callbacks.blocks import Block, BlockWriter
from aligntok.callbacks.grids import tiled
from aligntok.errors import UserError
from aligntok.files import hash_file, write_atomically, write_text
from aligntok.networks.tokenizer import Tokenizer

NUM_CHECKED = 16  # images of the self-check
MAX_LOSS = 1.0  # dB that a cached code may lose against a fresh one ...
INVISIBLE = 40.0  # ... below these: rounding may cost more of an almost perfect reconstruction
CHECK = "check.png"


class CacheWriter(BlockWriter):
    """Base: writes what a tokenizer encodes of ``data.predict`` as safetensors shards with a manifest.

    A shard is finished when its file and, beside it, a record with its hash are there. Every run first reads the
    finished shards and does a broken one again: running a finished cache again repairs it. At the end the records go
    into ``manifest.json``, after some rows were read back and decoded (``check.png``: images above reconstructions,
    then the same of the mirrored ones).

    An image is encoded in several views: each crop of it, then each of them mirrored.

    Args:
        shard_size: Images of a shard.
        batch_size: Images of a batch on one device.
        dtype: Of the rows in the files.
        flips: Encode the mirrored images too; by default where ``data.flip`` is on.
        min_psnr: Decibels that decoded rows must reach on average.
    """

    layout: Layout
    kind: str  # of the tokenizer
    counted: str  # how the last line says what was written
    crops = "center"

    def __init__(self, shard_size: int, batch_size: int, dtype: str, flips: bool | None, min_psnr: float) -> None:
        super().__init__(shard_size, batch_size)
        self.dtype, self.flips, self.min_psnr = dtype, flips, min_psnr
        self.shard: dict[str, Tensor] = {}
        self.filled = 0
        self.records: dict[str, Record] = {}
        self.manifest: Manifest | None = None

    # What a subclass says

    @abstractmethod
    def rows(self, codes: list[Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a shard, as they are stored, from what the tokenizer made of each view."""

    @abstractmethod
    def statistics(self, shards: list[Shard], tokenizer: Tokenizer) -> tuple[dict[str, list[float]], str]:
        """Return the ``statistics`` of the manifest, and the same in words."""

    @abstractmethod
    def view_name(self, view: int) -> str:
        """Return what messages call the rows of a view."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose rows no generator could use, with a ``UserError``."""

    def cut(self, image: Tensor) -> list[Tensor]:
        """Return the crops of images (B, 3, H, W) that the data gave."""
        return [image]

    # Blocks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out what is left."""
        if stage == "predict":
            tokenizer = getattr(pl_module, "tokenizer", None)
            ours = f"{type(self).__name__} writes what a {self.kind} tokenizer encodes"
            if not isinstance(tokenizer, Tokenizer):
                raise UserError(f"{ours}, but {type(pl_module).__name__} has none")
            if tokenizer.spec.kind != self.kind:
                raise UserError(f"{ours}, but model.tokenizer is {tokenizer.spec.kind}: use the other writer")
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and self.flips is None:
            self.flips = bool(self.data.flip)

    def unfinished(self) -> list[Block]:
        """Return the blocks that are missing or broken."""
        manifest = Manifest.read(self.folder)
        self.records = {record.file: record for record in manifest.shards} if manifest else {}
        return super().unfinished()

    def name(self, block: Block) -> str:
        """Return the name of the shard."""
        return shard_name(block.number, self.layout)

    def finished(self, block: Block) -> bool:
        """Tell whether a shard and its record are there, and its header as it should be."""
        record = self.record(block)
        try:
            shard = Shard.open(self.folder / self.name(block), self.layout)
        except UserError:
            return False
        return record is not None and shard.shape[0] == record.count == len(block.ids) - len(record.missing)

    def intact(self, block: Block) -> bool:
        """Tell whether a shard has the recorded hash."""
        record = self.record(block)
        return record is not None and hash_file(self.folder / record.file) == record.sha256

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse a folder with other rows; begin the manifest of a new one."""
        self.manifest = self.new_manifest(trainer, module)
        manifest = Manifest.read(self.folder)
        if manifest is None:
            self.manifest.write(self.folder)
            return
        difference = manifest.difference(self.manifest)
        if difference is not None:
            what, there, here = difference
            raise UserError(
                f"{self.folder} holds {self.layout.name} of {what} {there}, but this run's {what} is {here}: give"
                " another --output, or run it as it was"
            )

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse a source without images."""
        if "image" not in batch:
            raise UserError("data.predict gives no images to encode: name a source of images, or a split that is one")

    def add(self, block: Block, outputs: Any, batch: Any, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep a batch: the outputs, which are of the first view, and the other views, encoded now."""
        tokenizer: Any = module.tokenizer
        with trainer.precision_plugin.predict_step_context():
            others = [tokenizer.encode(view) for view in self.views(batch["image"])[1:]]
        rows = {**self.rows([outputs, *others]), LABELS: batch["label"], "id": batch["id"]}
        if not self.shard:
            self.shard = {
                key: torch.empty(len(block.ids), *value.shape[1:], dtype=value.dtype) for key, value in rows.items()
            }
        for key, value in rows.items():
            self.shard[key][self.filled : self.filled + len(value)] = value
        self.filled += len(batch["id"])

    def views(self, image: Tensor) -> list[Tensor]:
        """Return the views of images (B, 3, H, W): the crops, then, where they are wanted, the same mirrored."""
        crops = self.cut(image)
        return crops + [crop.flip(-1) for crop in crops] if self.flips else crops

    def write(self, block: Block) -> None:
        """Write the shard, then its record."""
        shard = {key: value[: self.filled] for key, value in self.shard.items()}  # an unreadable image has no row
        self.shard, self.filled = {}, 0
        missing = sorted(set(block.ids) - set(shard.pop("id").tolist()))
        if not all(bool(value.isfinite().all()) for value in shard.values() if value.is_floating_point()):
            raise UserError(
                f"{self.layout.name} of the images {block.ids.start} to {block.ids.stop - 1} are not finite"
            )
        path = self.folder / self.name(block)

        def write(temporary: Path) -> None:
            temporary.write_bytes(save(shard))  # safetensors' save_file makes files that only their owner may read

        write_atomically(path, write)
        record = Record(path.name, block.ids.start, len(shard[LABELS]), missing, hash_file(path))
        write_text(record_path(path), json.dumps(asdict(record)))

    def record(self, block: Block) -> Record | None:
        """Return what is known of a shard: its own record, written since, or that of the manifest."""
        path = record_path(self.folder / self.name(block))
        if not path.is_file():
            return self.records.get(self.name(block))
        try:
            return Record(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            return None

    # The end

    def complete(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check what was written, and write the manifest."""
        assert self.manifest is not None
        tokenizer: Any = module.tokenizer
        records = [record for block in self.blocks if (record := self.record(block)) is not None]
        shards = [Shard.open(self.folder / record.file, self.layout) for record in records]
        statistics, about = self.statistics(shards, tokenizer)
        words = self.self_check(records, shards, trainer, module)
        self.manifest.shards, self.manifest.statistics = records, statistics
        self.manifest.write(self.folder)
        for record in records:
            record_path(self.folder / record.file).unlink(missing_ok=True)
        count = self.counted.format(sum(record.count for record in records))
        print(f"{self.folder}: {count} in {len(shards)} shards, {words}, {about}", flush=True)

    @torch.no_grad()
    def self_check(
        self, records: list[Record], shards: list[Shard], trainer: pl.Trainer, module: pl.LightningModule
    ) -> str:
        """Decode some cached rows, draw them, and return their PSNR in words.

        Raises:
            UserError: They decode to something else than their images.
        """
        tokenizer: Any = module.tokenizer
        *starts, total = accumulate([0] + [record.count for record in records])
        chosen = sorted({i * total // NUM_CHECKED for i in range(NUM_CHECKED)})
        places = [(k, i - starts[k]) for i in chosen for k in [bisect_right(starts, i) - 1]]
        image = self.data.read("predict", [image_id(records[k], row) for k, row in places])["image"].to(module.device)
        maps = [shard.map() for shard in shards]
        pictures, found = [], []
        for view, turned in enumerate(self.views(image)):
            stored = torch.cat([shards[k].tensor([maps[k][view].bytes[row]]) for k, row in places]).to(module.device)
            with trainer.precision_plugin.predict_step_context():
                decoded = tokenizer.decode(stored.float() if stored.is_floating_point() else stored.long()).float()
                fresh = tokenizer.decode(tokenizer.encode(turned)).float()
            found.append((psnr(decoded, turned), psnr(fresh, turned)))
            pictures.append(torch.cat([turned, decoded]))
        num_crops = len(maps[0]) // (2 if self.flips else 1)
        picture = tiled(torch.cat(pictures[::num_crops]), len(places))
        write_atomically(self.folder / CHECK, lambda path: save_image(picture, path, format="png"))
        for view, (quality, best) in enumerate(found):
            if quality < min(best, INVISIBLE) - MAX_LOSS:
                raise UserError(
                    f"{self.view_name(view)} in {self.folder} decode to {quality:.2f} dB, but the tokenizer reaches"
                    f" {best:.2f} dB on the same images: these are not their {self.layout.name} (see {CHECK}), write"
                    " them into another --output"
                )
            if quality < self.min_psnr:
                raise UserError(
                    f"{self.view_name(view)} in {self.folder} decode to {quality:.2f} dB, less than min_psnr"
                    f" {self.min_psnr}: look at {CHECK}, train the tokenizer further, or lower min_psnr of"
                    f" {type(self).__name__}"
                )
        means = [sum(q for q, _ in found[i : i + num_crops]) / num_crops for i in range(0, len(found), num_crops)]
        words = " and ".join(f"{mean:.2f} dB{' mirrored' * turned}" for turned, mean in enumerate(means))
        return f"PSNR {words} on {len(places)} images ({CHECK})"

    def new_manifest(self, trainer: pl.Trainer, module: pl.LightningModule) -> Manifest:
        """Return the manifest of this run, without results.

        Raises:
            UserError: No generator could use these rows.
        """
        tokenizer: Any = module.tokenizer
        self.check_tokenizer(tokenizer)
        if str(trainer.precision).startswith(("bf16-true", "16-true")):
            raise UserError(
                f"trainer.precision {trainer.precision} rounds the tokenizer's weights, and the cache would belong to"
                " no checkpoint: use 32-true or bf16-mixed"
            )
        spec = {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(tokenizer.spec).items()}
        images = {
            "source": self.data.fingerprint("predict"),
            "split": self.data.predict if isinstance(self.data.predict, str) else "predict",
            "crop": self.crops,
            "count": self.data.num_images("predict"),
            "classes": self.data.classes,
        }
        about = {"fingerprint": tokenizer.fingerprint(), **{key: x for key, x in spec.items() if x is not None}}
        return Manifest(about, images, self.dtype, bool(self.flips), self.block_size)


def record_path(shard: Path) -> Path:
    """Return the place of a shard's record."""
    return shard.with_suffix(".json")


def image_id(record: Record, row: int) -> int:
    """Return the image of a row of a shard."""
    kept = sorted(set(range(record.first, record.first + record.count + len(record.missing))) - set(record.missing))
    return kept[row]


def psnr(image: Tensor, reference: Tensor) -> float:
    """Return the mean PSNR in dB of images (B, 3, H, W) in [0, 1]."""
    error = (image - reference).square().flatten(1).mean(1).clamp_min(1e-10)
    return float(-10 * error.log10().mean())
