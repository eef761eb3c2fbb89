"""The manifest of a cache: what it holds, where it comes from, and which shards are whole.

LightningDiT writes its folders without a manifest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aligntok.cache.shards import LATENT_LAYOUT, TEXT_FEATURES, TEXT_IDS, TOKEN_LAYOUT, Indices, Layout
from aligntok.errors import check
from aligntok.files import misfit, read_json, write_text

FORMAT = 1
MANIFEST = "manifest.json"
CROPS = {"center": 1, "ten": 5}  # places that an image is cut out at; each may be there mirrored too
RECORD = {"file": str, "first": int, "count": int, "missing": [int], "sha256": str}
CONTENT = {  # of the file, see ``misfit``
    "tokenizer": {"fingerprint": str, "kind": ("continuous", "discrete"), "latent_shape": [int], "image_size": [int]},
    "images": {"source": str, "crop": tuple(CROPS), "count": int, "classes": [str]},
    "dtype": ("float32", "bfloat16", "uint16"),
    "flips": bool,
    "shard_size": int,
    "statistics": ({str: [float]}, None),
    "text": ({"fingerprint": str, "max_tokens": int, "width": int, "features": bool}, None),
    "shards": [RECORD],
}


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

    def is_of(self, ids: range) -> bool:
        """Tell whether it can be the record of a shard of these images."""
        missing = set(self.missing)
        whole = self.first == ids.start and 0 < self.count == len(ids) - len(missing)
        return whole and len(missing) == len(self.missing) and all(id in ids for id in missing)


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
        text: Of captioned images: the ``fingerprint`` of the text encoder, its ``max_tokens`` and ``width``, and
            whether ``features`` are stored beside the ids. Else it is not in the file.
        shards: In order.
    """

    tokenizer: dict[str, Any]
    images: dict[str, Any]
    dtype: str
    flips: bool
    shard_size: int
    statistics: dict[str, list[float]] | None = None
    text: dict[str, Any] | None = None
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
        content = read_json(path, {"format": int})
        version = content.pop("format")
        check(version == FORMAT, f"{path} is of format {version}, this aligntok reads {FORMAT}: encode again")
        problem = misfit(content, CONTENT, "it")
        try:
            manifest = cls(**{**content, "shards": [Record(**shard) for shard in content["shards"]]})
            problem = problem or manifest.contradiction()
        except (ValueError, KeyError, TypeError) as error:
            problem = problem or repr(error)
        check(not problem, f"{path} is no manifest of a cache ({problem}): restore it, or encode again")
        return manifest

    def write(self, folder: Path) -> None:
        """Write it, atomically."""
        content = {key: value for key, value in asdict(self).items() if key != "text" or value is not None}
        write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **content}, indent=1))

    def contradiction(self) -> str:
        """Return what in it cannot be; nothing in one that was written by us."""
        channels, h, w = self.tokenizer["latent_shape"]
        height, width = self.tokenizer["image_size"]
        if min(channels, h, w, height, width, self.count, self.shard_size) < 1:
            return "a size or count is below 1"
        if self.text is not None and min(self.text["max_tokens"], self.text["width"]) < 1:
            return "a size of its text is below 1"
        if self.statistics is not None and not self.shards:
            return "it names no shards"
        for shard in self.shards:
            ids = range(self.count)[shard.first : shard.first + shard.count + len(shard.missing)]
            if not shard.is_of(ids) or Path(shard.file).name != shard.file:
                return f"its record of {shard.file[:60]!r} cannot be"
        return ""

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

    def text_form(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of the texts in a shard of ``count`` images, by the names of the tensors."""
        form: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.text is not None:
            form[TEXT_IDS] = "I32", (count, self.text["max_tokens"])
            if self.text["features"]:
                form[TEXT_FEATURES] = "BF16", (count, self.text["max_tokens"], self.text["width"])
        return form

    @property
    def count(self) -> int:
        """Number of images of the source."""
        return int(self.images["count"])

    def conditions(self) -> dict[str, Any]:
        """Return what decides on the rows, such as ``tokenizer fingerprint``: equal in all runs that go on with it."""
        none = {"fingerprint": None, "features": None}
        parts = {"tokenizer": self.tokenizer, "images": self.images, "text encoder": self.text or none}
        values = {f"{part} {key}": value for part, entries in parts.items() for key, value in entries.items()}
        return dict(sorted({**values, "dtype": self.dtype, "flips": self.flips, "shard_size": self.shard_size}.items()))
