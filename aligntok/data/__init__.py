"""Images, latents or tokens in, batches out."""

from aligntok.data.captions import CaptionedFolder
from aligntok.data.datamodule import LatentDataModule
from aligntok.data.dataset import Augmentation
from aligntok.data.folders import Digits, ImageFolder
from aligntok.data.labels import ClassLabels
from aligntok.data.shapes import Shapes
from aligntok.data.shards import LatentShards, TokenShards
from aligntok.data.sources import BatchSource

__all__ = [
    "Augmentation",
    "BatchSource",
    "CaptionedFolder",
    "ClassLabels",
    "Digits",
    "ImageFolder",
    "LatentDataModule",
    "LatentShards",
    "Shapes",
    "TokenShards",
]
