"""The manifest of a cache: what it holds, where it comes from, and which shards are whole.

LightningDiT writes its folders without a manifest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aligntok.cache.shards import LATENT_LAYOUT, TOKEN_LAYOUT, Indices, Layout
from aligntok.errors import UserError, check
from aligntok.files import write_text

FORMAT = 1
MANIFEST = "manifest.json"
CROPS = {"center": 1, "ten": 5}  # places that an image is cut out at; each may be there mirrored too


@dataclass(frozen=True)
class Record:
    """What the manifest says of a shard.

    >>> Record("latents_rank00_shard000.safetensors", first=0, count=3, missing=[1], sha256="").image_ids
    array([0, 2, 3])

    Attributes:
        file: Its name.
        first: Id of its first image in the source.
        count: Number of its images.
        missing: Ids of images that could not be read; they have no row.
        sha256: Of the whole file.
    """

    file: str
    first: int
    count: int
    missing: list[int]
    sha256: str

    @property
    def image_ids(self) -> Indices:
        """Image of each row, (count,)."""
        return np.setdiff1d(np.arange(self.first, self.first + self.count + len(self.missing)), self.missing)


@dataclass
class Manifest:
    """What a cache holds and where it comes from; without ``statistics`` it is unfinished.

    >>> manifest = Manifest({"kind": "continuous"}, {"crop": "center", "count": 9}, "float32", True, shard_size=4)
    >>> manifest.layout.name, manifest.statistics is None  # so it is unfinished
    ('latents', True)

    Attributes:
        tokenizer: ``fingerprint`` and the fields of its ``spec``.
        images: ``source`` (hash of images and crop), ``crop`` (a key of ``CROPS``), ``count``, ``classes``.
        dtype: ``float32`` or ``bfloat16`` of latents, ``uint16`` of tokens.
        flips: Whether there are rows of the mirrored images.
        shard_size: Images of a shard; shard k begins at image k * shard_size.
        statistics: ``mean`` and ``std`` per channel of the latents as stored (not mirrored); of tokens, ``usage`` and
            ``perplexity`` of the codes in the first views.
        shards: In order.
    """

    tokenizer: dict[str, Any]
    images: dict[str, Any]
    dtype: str
    flips: bool
    shard_size: int
    statistics: dict[str, list[float]] | None = None
    shards: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read the manifest of a folder, if there is one.

        Raises:
            UserError: It is damaged, or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            version = content.pop("format")
            check(version == FORMAT, f"{path} is of format {version}, this aligntok reads {FORMAT}: encode again")
            manifest = cls(**{**content, "shards": [Record(**shard) for shard in content["shards"]]})
            _ = manifest.count, manifest.form(0)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no manifest of a cache ({error!r}): restore it, or encode again") from error
        return manifest

    def write(self, folder: Path) -> None:
        """Write it, atomically."""
        write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @property
    def layout(self) -> Layout:
        """Of the shards."""
        return TOKEN_LAYOUT if self.dtype == "uint16" else LATENT_LAYOUT

    def form(self, count: int) -> tuple[tuple[int, ...], str, int]:
        """Return what a shard of ``count`` images must be: shape of its rows, dtype, number of views of an image."""
        num_views = CROPS[self.images["crop"]] * (1 + self.flips)
        channels, h, w = self.tokenizer["latent_shape"]
        latents = self.layout is LATENT_LAYOUT
        return (count, channels, h, w) if latents else (count, num_views, h * w), f"torch.{self.dtype}", num_views

    @property
    def count(self) -> int:
        """Number of images of the source."""
        return int(self.images["count"])

    def conditions(self) -> dict[str, Any]:
        """Return what decides on the rows, such as ``tokenizer fingerprint``: equal in all runs that go on with it."""
        parts = {"tokenizer": self.tokenizer, "images": self.images}
        values = {f"{part} {key}": value for part, entries in parts.items() for key, value in entries.items()}
        return dict(sorted({**values, "dtype": self.dtype, "flips": self.flips, "shard_size": self.shard_size}.items()))
