"""Flow matching on a straight path: training times and loss terms, samplers, guidance, noise of a sample id.

t = 0 is noise and t = 1 is data, everywhere. LightningDiT counts like this; RAE, SiT and REPA count the other way.

Reference:
    Liu et al., Flow Straight and Fast, arXiv:2209.03003; Lipman et al., Flow Matching for Generative Modeling,
    arXiv:2210.02747.
"""

from aligntok.flow.guidance import Guidance, VelocityNetwork
from aligntok.flow.path import FlowMatching, TimeSampling, dimension_shift, sample_path, shift_time, velocity_terms
from aligntok.flow.samplers import Adaptive, Euler, FixedSteps, Heun, Sampler, Velocity

__all__ = [
    "Adaptive",
    "Euler",
    "FixedSteps",
    "FlowMatching",
    "Guidance",
    "Heun",
    "Sampler",
    "TimeSampling",
    "Velocity",
    "VelocityNetwork",
    "dimension_shift",
    "sample_path",
    "shift_time",
    "velocity_terms",
]
