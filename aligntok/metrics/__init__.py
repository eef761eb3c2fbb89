"""What torchmetrics lacks."""

from aligntok.metrics.alignment import CaptionAlignment
from aligntok.metrics.feature_sets import inception_score, kernel_distance, monge_distance, precision_recall
from aligntok.metrics.features import EncoderFeatures, TimmFeatures
from aligntok.metrics.fidelity import FidelityFeatures
from aligntok.metrics.frechet import FeatureSums, frechet_distance
from aligntok.metrics.generation import GenerationMetrics
from aligntok.metrics.inception import InceptionFeatures
from aligntok.metrics.probe import ProbeResult, knn_accuracy, linear_probe, rank_me
from aligntok.metrics.protocol import Protocol, find_protocol
from aligntok.metrics.reference import AdmFile, Reference
from aligntok.metrics.scenes import SceneJudge

__all__ = [
    "AdmFile",
    "CaptionAlignment",
    "EncoderFeatures",
    "FeatureSums",
    "FidelityFeatures",
    "GenerationMetrics",
    "InceptionFeatures",
    "ProbeResult",
    "Protocol",
    "Reference",
    "SceneJudge",
    "TimmFeatures",
    "find_protocol",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "knn_accuracy",
    "linear_probe",
    "monge_distance",
    "precision_recall",
    "rank_me",
]
