"""What is minimised: plain modules and functions that know no trainer."""

from aligntok.losses.adversarial import AdversarialLoss, hinge
from aligntok.losses.perceptual import LPIPS, FeatureDistance, LogitDistance, PerceptualDistance
from aligntok.losses.reconstruction import LossValue, PerceptualTerm, ReconstructionLoss, Reference, SendGradient
from aligntok.losses.representation import RepresentationAlignment
from aligntok.losses.semantic import SemanticPreservation, semantic_preservation

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "FeatureDistance",
    "LogitDistance",
    "LossValue",
    "PerceptualDistance",
    "PerceptualTerm",
    "ReconstructionLoss",
    "Reference",
    "RepresentationAlignment",
    "SemanticPreservation",
    "SendGradient",
    "hinge",
    "semantic_preservation",
]
