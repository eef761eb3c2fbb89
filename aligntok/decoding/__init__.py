"""Sampling of token sequences: the draws, the step with a cache, in C++ for CPUs, as a CUDA graph."""

from aligntok.decoding.graph import release
from aligntok.decoding.sampler import TokenSampler

__all__ = ["TokenSampler", "release"]
