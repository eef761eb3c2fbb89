"""What learns from what: the LightningModules."""

from aligntok.stages.aligntok import DecoderRefinement, LatentAlignment, PerceptualAlignment
from aligntok.stages.pretraining import EncoderPretraining
from aligntok.stages.stage import Stage
from aligntok.stages.tokenizer_stage import TokenizerStage

__all__ = [
    "DecoderRefinement",
    "EncoderPretraining",
    "LatentAlignment",
    "PerceptualAlignment",
    "Stage",
    "TokenizerStage",
]
