"""Captioned images of Hugging Face's ``datasets``: parquet or arrow files at hand, or a name on the hub."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from aligntok.data.captions import captions_of
from aligntok.data.images import decode_image
from aligntok.data.sources import Item, weighted
from aligntok.errors import UserError, check, words_of

SAVED = ("state.json", "dataset_dict.json")  # in a folder that ``save_to_disk`` wrote


class HuggingFaceDataset(Dataset[Item]):
    """Images and captions of a dataset of Hugging Face; it is opened at the first use.

    Arrow files are read in place; of parquet files ``datasets`` writes an arrow copy into its cache, once.

    >>> HuggingFaceDataset("data/coco", captions="sentences", split="validation")  # doctest: +SKIP

    Args:
        path: Folder with parquet or arrow files, or one that ``save_to_disk`` wrote, or a name on the hub.
        captions: Column with the caption, or a list of captions; or several, each with the weight that its caption is
            chosen by, such as ``{alt: 0.2, caption: 0.8}``. Of those an image needs one.
        image: Column with the image.
        split: ``train``, ``validation``, ...
        name: Of the configuration, where the dataset has several.

    Raises:
        UserError: Weights that are negative or all 0; or, at the first use: ``datasets`` is not installed, nothing is
            found, or a column is missing.
    """

    classes = ()

    def __init__(
        self,
        path: str,
        captions: str | dict[str, float] = "caption",
        image: str = "image",
        split: str = "train",
        name: str | None = None,
    ) -> None:
        self.path, self.image, self.split, self.name = path, image, split, name
        self.captions = weighted([captions] if isinstance(captions, str) else captions, "captions")
        self.min_size: int | None = None  # of ``decode_image``

    @cached_property
    def rows(self) -> Any:
        """The columns that are read, of which images are still files."""
        try:
            import datasets
        except ImportError as error:
            raise UserError("HuggingFaceDataset needs datasets: pip install 'aligntok[datasets]'") from error
        folder = Path(self.path).expanduser()
        try:
            if any((folder / name).is_file() for name in SAVED):
                found: Any = datasets.load_from_disk(str(folder))
                found = found[self.split] if isinstance(found, dict) else found
            else:
                path = str(folder) if folder.is_dir() else self.path
                found = datasets.load_dataset(path, self.name, split=self.split)
        except Exception as error:  # of the hub, of HTTP, of arrow, of the dataset's own files
            what = f"cannot load split {self.split} of dataset {self.path} ({words_of(error, 120)})"
            raise UserError(f"{what}: name a folder with its parquet files, or check name and split") from error
        wanted = [self.image, *self.captions]
        missing = [name for name in wanted if name not in found.column_names]
        check(not missing, f"dataset {self.path} has no column {', '.join(missing)}: it has {found.column_names}")
        found = found.select_columns(wanted)
        is_image = isinstance(found.features[self.image], datasets.Image)
        return found.cast_column(self.image, datasets.Image(decode=False)) if is_image else found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row, where = self.rows[index], f"{index} of dataset {self.path}"
        return decode_image(self.content(row[self.image], where), where, self.min_size), captions_of(
            self.captions, row, where
        )

    def content(self, value: Any, where: str) -> bytes:
        """Return the file of an image, which is in the table, or which it names.

        Raises:
            UserError: There is none.
        """
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if path and value is None:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read image {where}: {words_of(error)}") from error
        check(isinstance(value, bytes), f"column {self.image} of image {where} holds {type(value).__name__}, no file")
        return bytes(value)
