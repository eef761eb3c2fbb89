"""Writing a cache shard by shard: whole or not at all, and going on where a run was killed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from aligntok.cache.manifest import RECORD, Manifest, Record
from aligntok.cache.reader import CacheReader
from aligntok.cache.shards import LABELS, Shard, shard_name
from aligntok.errors import UserError, check
from aligntok.files import hash_file, read_json, write_atomically, write_text


class CacheWriter:
    """The shards of a cache as they are written.

    Shard k holds the images k * shard_size to (k + 1) * shard_size - 1. It is finished when its file is there and,
    beside it, a record with the file's hash; at the end the records go into ``manifest.json``.

    >>> tokenizer, images = {"kind": "discrete", "latent_shape": [8, 1, 3]}, {"crop": "center", "count": 5}
    >>> writer = CacheWriter(getfixture("tmp_path"), Manifest(tokenizer, images, "uint16", False, shard_size=4))
    >>> writer.blocks, writer.path(range(4, 5)).name
    ([range(0, 4), range(4, 5)], 'tokens_rank00_shard001.safetensors')

    Args:
        folder: Of the cache.
        manifest: What will be in it, without shards and statistics.

    Raises:
        UserError: The folder holds a cache of something else.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.layout = folder, manifest, manifest.layout
        there = Manifest.read(folder)
        self.known = {record.file: record for record in there.shards} if there else {}
        if there is None:
            manifest.write(folder)
            return
        theirs = there.conditions()
        for what, ours in manifest.conditions().items():
            held = f"{folder} holds {there.layout.name} of {what} {theirs.get(what)!s:.90}"
            remedy = "give another --output, or run it as it was"
            check(ours == theirs.get(what), f"{held}, but this run's {what} is {ours!s:.90}: {remedy}")

    @property
    def blocks(self) -> list[range]:
        """Image ids of each shard."""
        ids, size = range(self.manifest.count), self.manifest.shard_size
        return [ids[first : first + size] for first in ids[::size]]

    def path(self, ids: range) -> Path:
        """Return the file of a shard."""
        return self.folder / shard_name(ids.start // self.manifest.shard_size, self.layout)

    def record(self, ids: range) -> Record | None:
        """Return what is known of a shard: its own record, or what the manifest says of it."""
        path = self.path(ids)
        own = path.with_suffix(".json")
        try:
            record = Record(**read_json(own, RECORD)) if own.exists() else self.known.get(path.name)
        except (UserError, TypeError):
            return None
        return record if record and record.file == path.name and record.is_of(ids) else None

    def is_finished(self, ids: range) -> bool:
        """Tell whether a shard and its record are there, and whether the file, read in full, has the recorded hash."""
        record, path = self.record(ids), self.path(ids)
        try:
            shard = Shard.open(path, self.layout)
        except UserError:
            return False
        if record is None or shard.shape[0] != record.count:
            return False
        intact = hash_file(path) == record.sha256
        if not intact:
            print(f"{path.name} is not what was written, and is written again", flush=True)
        return intact

    def write(self, ids: range, rows: dict[str, Tensor]) -> None:
        """Write a shard, then its record.

        Args:
            ids: Of the shard's images.
            rows: The tensors of the file, and ``id`` (N,) of the images that could be read.

        Raises:
            UserError: Values that are not finite, or the disk is full.
        """
        tensors = {key: value.contiguous() for key, value in rows.items() if key != "id"}
        finite = all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())
        check(finite, f"{self.layout.name} of the images {ids.start} to {ids.stop - 1} are not finite")
        path, missing = self.path(ids), sorted(set(ids) - set(rows["id"].tolist()))

        # not safetensors' save_file, which makes files that only their owner may read
        write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors)))
        record = Record(path.name, ids.start, len(tensors[LABELS]), missing, hash_file(path))
        write_text(path.with_suffix(".json"), json.dumps(asdict(record)))

    def written(self) -> CacheReader:
        """Return all shards, opened, before the manifest names them."""
        self.manifest.shards = [record for ids in self.blocks if (record := self.record(ids)) is not None]
        return CacheReader(self.folder, self.layout, manifest=self.manifest)

    def finish(self, statistics: dict[str, list[float]]) -> None:
        """Write the manifest with all records, and remove these."""
        self.manifest.statistics = statistics
        self.manifest.write(self.folder)
        for ids in self.blocks:
            self.path(ids).with_suffix(".json").unlink(missing_ok=True)
