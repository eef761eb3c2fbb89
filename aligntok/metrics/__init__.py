"""What torchmetrics lacks."""

from aligntok.metrics.feature_sets import inception_score, kernel_distance, precision_recall
from aligntok.metrics.features import EncoderFeatures
from aligntok.metrics.frechet import FrechetDistance
from aligntok.metrics.generation import GenerationMetrics
from aligntok.metrics.inception import InceptionFeatures, SpatialFeatures
from aligntok.metrics.probe import ProbeResult, flatten_latent, linear_probe, pool_latent
from aligntok.metrics.protocol import Protocol, find_protocol
from aligntok.metrics.reference import AdmFile, FeatureStatistics, Reference

__all__ = [
    "AdmFile",
    "EncoderFeatures",
    "FeatureStatistics",
    "FrechetDistance",
    "GenerationMetrics",
    "InceptionFeatures",
    "ProbeResult",
    "Protocol",
    "Reference",
    "SpatialFeatures",
    "find_protocol",
    "flatten_latent",
    "inception_score",
    "kernel_distance",
    "linear_probe",
    "pool_latent",
    "precision_recall",
]
