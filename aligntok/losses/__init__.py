"""What is minimised: plain modules and functions that know no trainer."""

from aligntok.losses.adversarial import AdversarialLoss, hinge
from aligntok.losses.perceptual import LPIPS, FeatureDistance, LogitDistance
from aligntok.losses.representation import RepresentationAlignment
from aligntok.losses.semantic import semantic_preservation

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "FeatureDistance",
    "LogitDistance",
    "RepresentationAlignment",
    "hinge",
    "semantic_preservation",
]
