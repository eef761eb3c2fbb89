"""Callbacks that measure, draw and report; none of them changes the training."""

from aligntok.callbacks.checkpoint import SaveCheckpoint
from aligntok.callbacks.codebook import CodebookHealth
from aligntok.callbacks.ema import EMA
from aligntok.callbacks.generation import GenerationQuality
from aligntok.callbacks.grids import PromptGrid, ReconstructionGrid, SampleGrid
from aligntok.callbacks.measure import LinearProbe, ReconstructionFID, ReconstructionQuality
from aligntok.callbacks.progress import ProgressBar, RunRecord

__all__ = [
    "EMA",
    "CodebookHealth",
    "GenerationQuality",
    "LinearProbe",
    "ProgressBar",
    "PromptGrid",
    "ReconstructionFID",
    "ReconstructionGrid",
    "ReconstructionQuality",
    "RunRecord",
    "SampleGrid",
    "SaveCheckpoint",
]
