"""Images in, batches out."""

from aligntok.data.datamodule import LatentDataModule
from aligntok.data.shapes import Shapes
from aligntok.data.sources import Digits, ImageFolder

__all__ = ["Digits", "ImageFolder", "LatentDataModule", "Shapes"]
