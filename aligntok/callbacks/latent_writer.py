"""The latent cache: what a tokenizer makes of images, written once, for generators and the last decoder."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from safetensors.torch import save
from torch import Tensor
from torchvision.utils import save_image

from aligntok.cache import (
    LABELS,
    LATENTS,
    MIRRORED,
    Manifest,
    Record,
    Shard,
    hash_file,
    latent_statistics,
    shard_name,
)
from aligntok.callbacks.blocks import Block, BlockWriter
from aligntok.callbacks.grids import tiled
from aligntok.errors import UserError
from aligntok.networks.tokenizer import Tokenizer
from aligntok.weights.checkpoint import write_atomically, write_text

NUM_CHECKED = 16  # images of the self-check
MAX_LOSS = 1.0  # dB that a cached latent may lose against a fresh one ...
INVISIBLE = 40.0  # ... below these: bf16 may cost more of an almost perfect reconstruction
CHECK = "check.png"


class LatentWriter(BlockWriter):
    """Writes the latents of ``data.predict`` as safetensors shards in LightningDiT's layout, with a manifest.

    A shard is finished when its file and, beside it, a record with its hash are there. Every run first reads the
    finished shards and does a broken one again: running a finished cache again repairs it. At the end the records go
    into ``manifest.json``, after some latents were read back and decoded (``check.png``: images above reconstructions,
    then the same of the mirrored ones).

    Args:
        shard_size: Images of a shard; 10,000 in LightningDiT.
        batch_size: Images of a batch on one device.
        dtype: Of the latents in the files.
        flips: Encode the mirrored images too; by default where ``data.flip`` is on.
        min_psnr: Decibels that decoded latents must reach on average. The default is about what one flat colour in
            place of the image reaches: below it, nothing of the images is left.
    """

    def __init__(
        self,
        shard_size: int = 10_000,
        batch_size: int = 50,
        dtype: Literal["float32", "bfloat16"] = "float32",
        flips: bool | None = None,
        min_psnr: float = 10.0,
    ) -> None:
        super().__init__(shard_size, batch_size)
        self.dtype, self.flips, self.min_psnr = dtype, flips, min_psnr
        self.shard: dict[str, Tensor] = {}
        self.filled = 0
        self.records: dict[str, Record] = {}
        self.manifest: Manifest | None = None

    # Blocks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out what is left."""
        if stage == "predict" and not isinstance(getattr(pl_module, "tokenizer", None), Tokenizer):
            raise UserError(f"LatentWriter writes what a tokenizer encodes, but {type(pl_module).__name__} has none")
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
        return shard_name(block.number)

    def finished(self, block: Block) -> bool:
        """Tell whether a shard and its record are there, and its header as it should be."""
        record = self.record(block)
        try:
            shard = Shard.open(self.folder / shard_name(block.number))
        except UserError:
            return False
        return record is not None and shard.shape[0] == record.count == len(block.ids) - len(record.missing)

    def intact(self, block: Block) -> bool:
        """Tell whether a shard has the recorded hash."""
        record = self.record(block)
        return record is not None and hash_file(self.folder / record.file) == record.sha256

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse a folder with other latents; begin the manifest of a new one."""
        self.manifest = self.new_manifest(trainer, module)
        manifest = Manifest.read(self.folder)
        if manifest is None:
            self.manifest.write(self.folder)
            return
        difference = manifest.difference(self.manifest)
        if difference is not None:
            what, there, here = difference
            raise UserError(
                f"{self.folder} holds latents of {what} {there}, but this run's {what} is {here}: give another"
                " --output, or run it as it was"
            )

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse a source without images."""
        if "image" not in batch:
            raise UserError("data.predict gives no images to encode: name a source of images, or a split that is one")

    def add(self, block: Block, outputs: Any, batch: Any, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep a batch, with its mirrored images encoded too."""
        rows = {LATENTS: outputs, LABELS: batch["label"], "id": batch["id"]}
        if self.flips:
            tokenizer: Any = module.tokenizer
            with trainer.precision_plugin.predict_step_context():
                rows[MIRRORED] = tokenizer.encode(batch["image"].flip(-1))
        if not self.shard:
            dtypes = {key: torch.int64 if key in (LABELS, "id") else getattr(torch, self.dtype) for key in rows}
            self.shard = {
                key: torch.empty(len(block.ids), *value.shape[1:], dtype=dtypes[key]) for key, value in rows.items()
            }
        for key, value in rows.items():
            self.shard[key][self.filled : self.filled + len(value)] = value
        self.filled += len(batch["id"])

    def write(self, block: Block) -> None:
        """Write the shard, then its record."""
        shard = {key: value[: self.filled] for key, value in self.shard.items()}  # an unreadable image has no latent
        self.shard, self.filled = {}, 0
        missing = sorted(set(block.ids) - set(shard.pop("id").tolist()))
        if not all(bool(shard[key].isfinite().all()) for key in shard):
            raise UserError(f"latents of the images {block.ids.start} to {block.ids.stop - 1} are not finite")
        path = self.folder / shard_name(block.number)

        def write(temporary: Path) -> None:
            temporary.write_bytes(save(shard))  # safetensors' save_file makes files that only their owner may read

        write_atomically(path, write)
        record = Record(path.name, block.ids.start, len(shard[LABELS]), missing, hash_file(path))
        write_text(record_path(path), json.dumps(asdict(record)))

    def record(self, block: Block) -> Record | None:
        """Return what is known of a shard: its own record, written since, or that of the manifest."""
        path = record_path(self.folder / shard_name(block.number))
        if not path.is_file():
            return self.records.get(shard_name(block.number))
        try:
            return Record(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            return None

    # The end

    def complete(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check what was written, and write the manifest."""
        assert self.manifest is not None
        records = [record for block in self.blocks if (record := self.record(block)) is not None]
        shards = [Shard.open(self.folder / record.file) for record in records]
        mean, std = latent_statistics(shards)
        words = self.self_check(records, shards, trainer, module)
        self.manifest.shards = records
        self.manifest.statistics = {
            key: [round(x, 6) for x in value.tolist()] for key, value in (("mean", mean), ("std", std))
        }
        self.manifest.write(self.folder)
        for record in records:
            record_path(self.folder / record.file).unlink(missing_ok=True)
        print(
            f"{self.folder}: {sum(r.count for r in records):,} latents in {len(shards)} shards, {words}, channels with"
            f" mean {mean.min():.2f} to {mean.max():.2f} and std {std.min():.2f} to {std.max():.2f}",
            flush=True,
        )

    @torch.no_grad()
    def self_check(
        self, records: list[Record], shards: list[Shard], trainer: pl.Trainer, module: pl.LightningModule
    ) -> str:
        """Decode some cached latents, draw them, and return their PSNR in words.

        Raises:
            UserError: They decode to something else than their images.
        """
        tokenizer: Any = module.tokenizer
        *starts, total = accumulate([0] + [record.count for record in records])
        chosen = sorted({i * total // NUM_CHECKED for i in range(NUM_CHECKED)})
        places = [(k, i - starts[k]) for i in chosen for k in [bisect_right(starts, i) - 1]]
        image = self.data.read("predict", [image_id(records[k], row) for k, row in places])["image"].to(module.device)
        maps = [shard.map() for shard in shards]
        rows, found = [], {}
        for key, turned in ((LATENTS, image), (MIRRORED, image.flip(-1))):
            if key not in maps[0]:
                continue
            latent = torch.cat([shards[k].tensor([maps[k][key].bytes[row]]) for k, row in places]).to(module.device)
            with trainer.precision_plugin.predict_step_context():
                decoded = tokenizer.decode(latent.float()).float()
                fresh = tokenizer.decode(tokenizer.encode(turned)).float()
            found[key] = psnr(decoded, turned), psnr(fresh, turned)
            rows += [turned, decoded]
        picture = tiled(torch.cat(rows), len(places))
        write_atomically(self.folder / CHECK, lambda path: save_image(picture, path, format="png"))
        for key, (quality, best) in found.items():
            if quality < min(best, INVISIBLE) - MAX_LOSS:
                raise UserError(
                    f"{key} in {self.folder} decode to {quality:.2f} dB, but the tokenizer reaches {best:.2f} dB on the"
                    f" same images: these are not their latents (see {CHECK}), write them into another --output"
                )
            if quality < self.min_psnr:
                raise UserError(
                    f"{key} in {self.folder} decode to {quality:.2f} dB, less than min_psnr {self.min_psnr}: look at"
                    f" {CHECK}, train the tokenizer further, or lower min_psnr of LatentWriter"
                )
        words = " and ".join(
            f"{quality:.2f} dB{' mirrored' * (key == MIRRORED)}" for key, (quality, _) in found.items()
        )
        return f"PSNR {words} on {len(places)} images ({CHECK})"

    def new_manifest(self, trainer: pl.Trainer, module: pl.LightningModule) -> Manifest:
        """Return the manifest of this run, without results.

        Raises:
            UserError: No generator could use these latents.
        """
        tokenizer: Any = module.tokenizer
        if not tokenizer.is_measured:
            raise UserError(
                "the latents of this tokenizer were never measured, so they would be cached unscaled: stages 2 and 3"
                " measure them; run one, e.g. aligntok fit --config stage3.yaml --init_from CHECKPOINT"
            )
        if str(trainer.precision).startswith(("bf16-true", "16-true")):
            raise UserError(
                f"trainer.precision {trainer.precision} rounds the tokenizer's weights, and the cache would belong to"
                " no checkpoint: use 32-true or bf16-mixed"
            )
        spec = {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(tokenizer.spec).items()}
        images = {
            "source": self.data.fingerprint("predict"),
            "split": self.data.predict if isinstance(self.data.predict, str) else "predict",
            "crop": "center",
            "count": self.data.num_images("predict"),
            "classes": self.data.classes,
        }
        return Manifest(
            {"fingerprint": tokenizer.fingerprint(), **spec}, images, self.dtype, bool(self.flips), self.block_size
        )


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
