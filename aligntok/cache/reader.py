"""Reading a cache: the rows of all its shards, in any order."""

from __future__ import annotations

import errno
import mmap
import sys
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aligntok.cache.manifest import Manifest
from aligntok.cache.shards import TEXT_DTYPES, Indices, Layout, Shard, numbered_shards
from aligntok.errors import UserError, check
from aligntok.files import hash_file


class CacheReader:
    """The shards of a cache, opened: sizes and headers are checked, labels read, rows mapped into memory.

    >>> from aligntok.cache import LATENT_LAYOUT
    >>> CacheReader(Path("runs/nowhere"), LATENT_LAYOUT)
    Traceback (most recent call last):
    aligntok.errors.UserError: there is no latent cache runs/nowhere: write it with aligntok encode ...

    Args:
        folder: Where the shards are.
        layout: What they are.
        on_bad_shard: What to do about a shard that is missing, truncated or altered: ``raise``, or ``skip`` (name it
            and serve the others).
        verify: Read every shard in full and compare its hash.
        manifest: Of a cache that is being written; by default the one in the folder, which must be finished.

    Raises:
        UserError: No cache, an unfinished one, one of another kind, broken shards.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        on_bad_shard: Literal["raise", "skip"] = "raise",
        verify: bool = False,
        manifest: Manifest | None = None,
    ) -> None:
        self.folder, self.layout, self.manifest = folder, layout, manifest or finished_manifest(folder, layout)
        check(not verify or self.manifest is not None, f"{folder} has no manifest with hashes to verify its shards by")
        self.records = {record.file: record for record in self.manifest.shards} if self.manifest else {}
        paths = [folder / file for file in self.records] if self.manifest else numbered_shards(folder, layout)
        self.shards: list[Shard] = []
        problems: dict[str, str] = {}
        for path in paths:
            try:
                self.shards.append(self.open(path, verify))
            except UserError as error:
                problems[path.name] = str(error)
        if problems:
            if on_bad_shard == "raise" or not self.shards:
                repair = f"`aligntok repair {folder}` encodes again what is broken, and only that"
                raise UserError(
                    f"{summary(problems)}. {repair if self.manifest else f'Extract the {layout.name} again'}"
                )
            print(f"aligntok: shards skipped: {summary(problems)}", file=sys.stderr, flush=True)
        try:
            self.files = [(shard.memory, shard.content) for shard in self.shards]
            self.labels: Indices = np.concatenate([shard.labels() for shard in self.shards])
        except OSError as error:
            many = f": more than `ulimit -n` allows, {len(self.shards)}" if error.errno == errno.EMFILE else ""
            raise UserError(f"cannot map the shards of {folder} ({error}){many}") from error
        self.starts: Indices = np.cumsum([0] + [shard.shape[0] for shard in self.shards])[:-1]
        self.views: Indices = np.array([shard.starts for shard in self.shards]).T  # (V, shards), bytes into the file

    def open(self, path: Path, verify: bool) -> Shard:
        """Open a shard, which must be as the manifest says; without one, all must be alike.

        Raises:
            UserError: It is not.
        """
        shard = Shard.open(path, self.layout)
        if self.manifest:
            record = self.records[path.name]
            check(not verify or hash_file(path) == record.sha256, f"{path} is altered: its hash is not the manifest's")
            expected = self.manifest.form(record.count)
        else:
            (_, *row), dtype, num_views = (self.shards or [shard])[0].form
            expected = (shard.shape[0], *row), dtype, num_views
        check(shard.form == expected, f"{path} is altered: it holds {shard.form}, not {expected}")
        texts = {name: (dtype, shape) for name, (dtype, shape, _) in shard.texts.items()}
        wanted = self.manifest.text_form(record.count) if self.manifest else {}
        check(not self.manifest or texts == wanted, f"{path} is altered: of texts it holds {texts}, not {wanted}")
        return shard

    @cached_property
    def image_ids(self) -> Indices:
        """Index of each row's image in its source."""
        if self.manifest is None:
            return np.arange(len(self.labels))
        return np.concatenate([self.records[shard.path.name].image_ids for shard in self.shards])

    def read(self, ids: Indices, views: Indices) -> tuple[Tensor, Tensor]:
        """Return some rows as they are stored, each of one view, and their labels (B,)."""
        shards = np.searchsorted(self.starts, ids, "right") - 1
        for shard in set(shards.tolist()):
            self.shards[shard].check_whole()
        size, stride = self.shards[0].row_size, self.shards[0].stride
        begins = self.views[views.astype(np.int64), shards] + (ids - self.starts[shards]) * stride
        files = [(*self.files[shard], begin) for shard, begin in zip(shards.tolist(), begins.tolist(), strict=True)]
        for memory, _, begin in files:  # the disk reads them all at once: touched one by one, each is waited for
            page = begin - begin % mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, page, begin + size - page)
        rows = [content[begin : begin + size] for _, content, begin in files]
        return self.shards[0].tensor(rows), torch.from_numpy(self.labels[ids])

    def read_texts(self, ids: Indices) -> dict[str, Tensor]:
        """Return the texts of some rows by name: (B, L) ids, (B, L, W) features; nothing where there are none."""
        shards, texts = np.searchsorted(self.starts, ids, "right") - 1, {}
        for name, (dtype, shape, _) in self.shards[0].texts.items():
            texts[name] = torch.empty(len(ids), *shape[1:], dtype=TEXT_DTYPES[dtype])
            for number in set(shards.tolist()):
                rows = np.flatnonzero(shards == number)
                texts[name][rows] = self.shards[number].text(name, ids[rows] - self.starts[number])
        return texts


def finished_manifest(folder: Path, layout: Layout) -> Manifest | None:
    """Return the manifest of a finished cache of this kind, none of a folder that LightningDiT wrote."""
    kind = layout.name.removesuffix("s")
    check(folder.is_dir(), f"there is no {kind} cache {folder}: write it with {layout.write}")
    manifest = Manifest.read(folder)
    if manifest is not None:
        check(manifest.layout is layout, f"{folder} holds {manifest.layout.name}, not {layout.name}")
        go_on = f"the same `aligntok encode` goes on with it, or `aligntok repair {folder}`"
        check(manifest.statistics is not None, f"the {kind} cache {folder} is unfinished: {go_on}")
    return manifest


def summary(problems: dict[str, str]) -> str:
    """Return the first problem, and the names of the other shards that have one."""
    first, *others = problems
    shown = f"; also {', '.join(others[:3])}" if others else ""
    return f"{problems[first]}{shown}" + (f" and {len(others) - 3} more" if len(others) > 3 else "")
