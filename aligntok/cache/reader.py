"""Reading a cache: the rows of all its shards, in any order."""

from __future__ import annotations

import errno
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aligntok.cache.manifest import Manifest, open_shards
from aligntok.cache.shards import Indices, Layout
from aligntok.errors import UserError
from aligntok.files import hash_file

REPAIR = "`aligntok repair {folder}` encodes again what is broken, and only that"


class CacheReader:
    """The shards of a cache, opened: sizes and headers are checked, labels read, rows mapped into memory.

    Args:
        folder: Where the shards are.
        layout: What they are.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).

    Raises:
        UserError: No cache, an unfinished one, one of another kind, broken shards.
    """

    def __init__(self, folder: Path, layout: Layout, on_bad_shard: Literal["raise", "skip"] = "raise") -> None:
        name = layout.name
        if not folder.is_dir():
            raise UserError(f"there is no {name[:-1]} cache {folder}: write it with {layout.write}")
        self.manifest = Manifest.read(folder)
        if self.manifest is not None and self.manifest.layout is not layout:
            raise UserError(f"{folder} holds {self.manifest.layout.name}, not {name}")
        if self.manifest is not None and self.manifest.statistics is None:
            raise UserError(
                f"the {name[:-1]} cache {folder} is unfinished: the same `aligntok encode` goes on with it, or"
                f" `aligntok repair {folder}`"
            )
        self.shards, problems = open_shards(folder, self.manifest, layout)
        if problems:
            if on_bad_shard == "raise" or not self.shards:
                remedy = REPAIR.format(folder=folder) if self.manifest else f"extract the {name} again"
                raise UserError(f"{brief(problems)}. {remedy}")
            print(f"aligntok: shards skipped: {brief(problems)}", file=sys.stderr, flush=True)
        try:
            self.views = list(zip(*(shard.views for shard in self.shards), strict=True))  # of each view, its shards
            self.labels: Indices = np.concatenate([shard.labels() for shard in self.shards])
        except OSError as error:
            many = f": its {len(self.shards)} shards are more than `ulimit -n` allows"
            raise UserError(
                f"cannot map the shards of {folder} ({error}){many if error.errno == errno.EMFILE else ''}"
            ) from error
        self.starts: Indices = np.cumsum([0] + [shard.shape[0] for shard in self.shards])[:-1]

    @cached_property
    def image_ids(self) -> Indices:
        """Index of each row's image in its source."""
        if self.manifest is None:
            return np.arange(len(self.labels))
        records = {record.file: record for record in self.manifest.shards}
        return np.concatenate([records[shard.path.name].image_ids for shard in self.shards])

    def read(self, ids: Indices, views: Indices) -> tuple[Tensor, Tensor]:
        """Return some rows as they are stored, each of one view, and their labels (B,)."""
        shards = np.searchsorted(self.starts, ids, "right") - 1
        places = zip(views.tolist(), shards.tolist(), (ids - self.starts[shards]).tolist(), strict=True)
        rows = [(self.views[view][shard], row) for view, shard, row in places]
        for view, row in rows:
            view.prefetch(row)
        return self.shards[0].tensor([view.rows[row] for view, row in rows]), torch.from_numpy(self.labels[ids])


def verify(folder: Path, layout: Layout) -> None:
    """Read every shard in full.

    Raises:
        UserError: Some are not what was written; they are named.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest with hashes to verify its shards by")
    shards, problems = open_shards(folder, manifest, layout)
    hashes = {record.file: record.sha256 for record in manifest.shards}
    with ThreadPoolExecutor() as pool:
        for shard, value in zip(shards, pool.map(lambda shard: hash_file(shard.path), shards), strict=True):
            if value != hashes[shard.path.name]:
                problems[shard.path.name] = f"{shard.path} is altered: its hash is not that of the manifest"
    if problems:
        raise UserError(f"{brief(problems)}. {REPAIR.format(folder=folder)}")


def brief(problems: dict[str, str]) -> str:
    """Return the first problem, and the names of the other shards that have one."""
    first, *others = problems
    shown = f"; also {', '.join(others[:3])}" if others else ""
    return f"{problems[first]}{shown}" + (f" and {len(others) - 3} more" if len(others) > 3 else "")
