"""Images, latents or tokens in, batches out."""

from aligntok.data.batches import BatchSource
from aligntok.data.datamodule import LatentDataModule
from aligntok.data.dataset import Augmentation
from aligntok.data.labels import ClassLabels
from aligntok.data.latents import LatentShards
from aligntok.data.shapes import Shapes
from aligntok.data.sources import Digits, ImageFolder
from aligntok.data.tokens import TokenShards

__all__ = [
    "Augmentation",
    "BatchSource",
    "ClassLabels",
    "Digits",
    "ImageFolder",
    "LatentDataModule",
    "LatentShards",
    "Shapes",
    "TokenShards",
]
