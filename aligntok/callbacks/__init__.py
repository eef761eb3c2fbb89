"""What measures, draws and tells, without changing what is learned."""

from aligntok.callbacks.blocks import BlockWriter
from aligntok.callbacks.checkpoint import SaveCheckpoint
from aligntok.callbacks.codebook import CodebookHealth
from aligntok.callbacks.ema import EMA
from aligntok.callbacks.generation import GenerationQuality
from aligntok.callbacks.grids import ReconstructionGrid, SampleGrid
from aligntok.callbacks.latent_writer import LatentWriter
from aligntok.callbacks.measure import LinearProbe, ReconstructionFID, ReconstructionQuality
from aligntok.callbacks.progress import ProgressBar, RunRecord
from aligntok.callbacks.sample_writer import SampleWriter
from aligntok.callbacks.token_writer import TokenWriter

__all__ = [
    "EMA",
    "BlockWriter",
    "CodebookHealth",
    "GenerationQuality",
    "LatentWriter",
    "LinearProbe",
    "ProgressBar",
    "ReconstructionFID",
    "ReconstructionGrid",
    "ReconstructionQuality",
    "RunRecord",
    "SampleGrid",
    "SampleWriter",
    "SaveCheckpoint",
    "TokenWriter",
]
