"""The LightningModules: which parts of a model learn in a run, and from which loss."""

from aligntok.stages.aligntok import DecoderRefinement, LatentAlignment, PerceptualAlignment
from aligntok.stages.autoregression import AutoregressiveGeneration
from aligntok.stages.causal import CausalTokenization
from aligntok.stages.diffusion import LatentDiffusion
from aligntok.stages.generator import GeneratorStage, load_generator
from aligntok.stages.optimization import Optimization
from aligntok.stages.pretraining import EncoderPretraining, load_classifier, load_features
from aligntok.stages.scenes import SceneJudging, load_scene_judge
from aligntok.stages.stage import Stage
from aligntok.stages.text_diffusion import TextDiffusion
from aligntok.stages.tokenizer_stage import TokenizerStage

__all__ = [
    "AutoregressiveGeneration",
    "CausalTokenization",
    "DecoderRefinement",
    "EncoderPretraining",
    "GeneratorStage",
    "LatentAlignment",
    "LatentDiffusion",
    "Optimization",
    "PerceptualAlignment",
    "SceneJudging",
    "Stage",
    "TextDiffusion",
    "TokenizerStage",
    "load_classifier",
    "load_features",
    "load_generator",
    "load_scene_judge",
]
