"""Images, latents or tokens in, batches out."""

from aligntok.data.captions import CaptionedFolder
from aligntok.data.datamodule import LatentDataModule
from aligntok.data.dataset import Augmentation
from aligntok.data.emoji import EmojiScenes, EmojiTruth
from aligntok.data.folders import Digits, ImageFolder
from aligntok.data.hugging_face import HuggingFaceDataset
from aligntok.data.labels import ClassLabels
from aligntok.data.mixture import Mixture
from aligntok.data.shapes import Shapes
from aligntok.data.shards import LatentShards, TokenShards
from aligntok.data.sources import BatchSource
from aligntok.data.tars import CaptionedTars

__all__ = [
    "Augmentation",
    "BatchSource",
    "CaptionedFolder",
    "CaptionedTars",
    "ClassLabels",
    "Digits",
    "EmojiScenes",
    "EmojiTruth",
    "HuggingFaceDataset",
    "ImageFolder",
    "LatentDataModule",
    "LatentShards",
    "Mixture",
    "Shapes",
    "TokenShards",
]
