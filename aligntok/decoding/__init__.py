"""Sampling of token sequences: the draws, the step with a cache of keys and values, the same step in C++ for CPUs."""

from aligntok.decoding.sampler import TokenSampler

__all__ = ["TokenSampler"]
