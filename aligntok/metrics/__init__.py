"""What torchmetrics lacks."""

from aligntok.metrics.features import EncoderFeatures
from aligntok.metrics.frechet import FeatureStatistics, FrechetDistance, InceptionFeatures
from aligntok.metrics.probe import ProbeResult, flatten_latent, linear_probe, pool_latent

__all__ = [
    "EncoderFeatures",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionFeatures",
    "ProbeResult",
    "flatten_latent",
    "linear_probe",
    "pool_latent",
]
