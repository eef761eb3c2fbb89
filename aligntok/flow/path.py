"""Straight path between noise and data: training pairs, training times, loss terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import check, check_nonnegative

COSINE_EPS = 0.1  # see velocity_terms


def sample_path(noise: Tensor, latent: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point and the velocity at time ``t`` on the line from noise to data.

    >>> point, velocity = sample_path(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 8.0), t=torch.tensor([0.25]))
    >>> point.item(), velocity.item()
    (2.0, 8.0)

    Args:
        noise: Standard normal, (B, C, h, w).
        latent: Normalised latents, (B, C, h, w).
        t: One time per sample in [0, 1], (B,); 0 is noise, 1 is data.

    Returns:
        Point at ``t`` and the velocity to predict there, both (B, C, h, w).

    Reference:
        Liu et al., arXiv:2209.03003.
    """
    t = per_sample(t, latent)
    return (1 - t) * noise + t * latent, latent - noise


def velocity_terms(prediction: Tensor, velocity: Tensor) -> dict[str, Tensor]:
    """Return how far a predicted velocity is from the true one, in float32 whatever the precision of the network.

    The published code takes the cosine with eps 1e-8: at the zero of the last layer's start its gradient is 1e8 per
    position, and Adam needs hundreds of steps to forget it. With COSINE_EPS the gradient stays below 10 (a true
    velocity is about sqrt(2 C) long).

    Args:
        prediction: (B, C, h, w), any float dtype.
        velocity: (B, C, h, w), from ``sample_path``.

    Returns:
        ``mse``: mean square over (C, h, w); ``cosine``: 1 - cosine similarity along C, mean over (h, w). Both (B,).

    Reference:
        Yao et al., LightningDiT, arXiv:2501.01423, trains on the sum of both, RAE (arXiv:2510.11690) on ``mse`` alone.
    """
    prediction, velocity = prediction.float(), velocity.float()
    cosine = 1 - F.cosine_similarity(prediction, velocity, dim=1, eps=COSINE_EPS)
    return {"mse": (prediction - velocity).square().flatten(1).mean(1), "cosine": cosine.flatten(1).mean(1)}


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return ``shift * t / (1 + (shift - 1) * t)``: below 1 times move towards the noise, above 1 towards the data.

    0 and 1 stay where they are, and ``shift_time(., 1 / shift)`` is the inverse.

    >>> shift_time(torch.tensor([0.0, 0.5, 1.0]), 0.25)
    tensor([0.0000, 0.2000, 1.0000])

    Args:
        t: Times in [0, 1], any shape.
        shift: Above 0; 1 changes nothing. LightningDiT samples with 0.3.

    Reference:
        Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv:2403.03206, section 5.3.2.
    """
    check(0 < shift < math.inf, f"shift={shift}: give a number above 0; 1 leaves the times as they are")
    return shift * t / (shift * t + (1 - t))  # the same formula, and exactly 1 at 1


def dimension_shift(latent_shape: Sequence[int], base: int = 4096) -> float:
    """Return the ``shift_time`` of latents (C, h, w) of more than `base` numbers, in training and in sampling.

    The same t destroys less of a larger latent. RAE's time u = 1 - t is noise at 1, and u' = s u / (1 + (s - 1) u) with
    s = sqrt(dim / base) is our shift by 1 / s: 0.144 for RAE's 768 x 16 x 16.

    >>> dimension_shift((32, 16, 16))
    0.7071067811865476

    Reference:
        Zheng et al., RAE, arXiv:2510.11690, section 4.
    """
    return math.sqrt(base / math.prod(latent_shape))


class TimeSampling:
    """Turn standard normal numbers (B,) into training times in [0, 1], (B,).

    >>> TimeSampling("uniform", shift=0.25)(torch.zeros(2))
    tensor([0.2000, 0.2000])

    Args:
        distribution: Of the times; ``logit_normal`` is sigmoid(N(0, 1)) (LightningDiT, RAE; arXiv:2403.03206,
            section 3.1).
        shift: Applied to them, see ``shift_time``; RAE trains with ``dimension_shift``, LightningDiT with 1.
    """

    def __init__(self, distribution: Literal["uniform", "logit_normal"] = "logit_normal", shift: float = 1.0) -> None:
        known = ("uniform", "logit_normal")
        check(distribution in known, f"distribution={distribution!r}: give 'uniform' or 'logit_normal'")
        shift_time(torch.zeros(()), shift)  # refuses a bad shift
        self.distribution, self.shift = distribution, shift

    def __call__(self, normal: Tensor) -> Tensor:
        """Return the times."""
        t = normal.sigmoid() if self.distribution == "logit_normal" else torch.special.ndtr(normal)
        return shift_time(t, self.shift)


@dataclass(frozen=True)
class FlowMatching:
    """The objective of flow matching: at which times a network learns, and how far its velocity may be off.

    >>> objective = FlowMatching(cosine_weight=0.0)
    >>> objective(torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8))["loss"]
    tensor([1., 1.])

    Args:
        time_sampling: How times are drawn in training; by default from the logit-normal distribution.
        uniform_from: From this step on, times are uniform (LightningDiT's long run: late in training).
        cosine_weight: Of the cosine term, 1 in LightningDiT, 0 in RAE.
    """

    time_sampling: TimeSampling | None = None
    uniform_from: int | None = None
    cosine_weight: float = 1.0

    def __post_init__(self) -> None:
        check_nonnegative(uniform_from=self.uniform_from, cosine_weight=self.cosine_weight)

    def times(self, step: int) -> TimeSampling:
        """Return how times are drawn at an optimizer step."""
        given = self.time_sampling or TimeSampling()
        late = self.uniform_from is not None and step >= self.uniform_from
        return TimeSampling("uniform", given.shift) if late else given

    def __call__(self, prediction: Tensor, velocity: Tensor) -> dict[str, Tensor]:
        """Return ``mse``, ``cosine`` and their weighted sum ``loss``, each (B,), of two velocities (B, C, h, w)."""
        terms = velocity_terms(prediction, velocity)
        return terms | {"loss": terms["mse"] + self.cosine_weight * terms["cosine"]}


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Return (B,) as (B, 1, ..., 1), to be broadcast against `x`."""
    return value.reshape(-1, *[1] * (x.ndim - 1))
