"""Straight path between noise and data: training pairs, training times, loss terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError

COSINE_EPS = 0.1  # see velocity_terms


def sample_path(noise: Tensor, latent: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point and the velocity at time ``t`` on the line from noise to data.

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

    The published code takes the cosine with the usual eps of 1e-8 for each norm. The last layer starts at zero, so
    its first gradient is then 1e8 per position, and Adam's second moment needs hundreds of steps to forget it. Here
    vectors shorter than COSINE_EPS (a true one is about sqrt(2 C) long) are scaled by it: the gradient stays below
    10.

    Args:
        prediction: (B, C, h, w), any float dtype.
        velocity: (B, C, h, w), from ``sample_path``.

    Returns:
        ``mse``: mean square over (C, h, w); ``cosine``: 1 - cosine similarity along C, mean over (h, w). Both (B,).

    Reference:
        Yao et al., Reconstruction vs. Generation (LightningDiT), arXiv:2501.01423, trains on the sum of both, RAE
        (arXiv:2510.11690) on ``mse`` alone.
    """
    prediction, velocity = prediction.float(), velocity.float()
    cosine = 1 - F.cosine_similarity(prediction, velocity, dim=1, eps=COSINE_EPS)
    return {"mse": (prediction - velocity).square().flatten(1).mean(1), "cosine": cosine.flatten(1).mean(1)}


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return ``shift * t / (1 + (shift - 1) * t)``: below 1 times move towards the noise, above 1 towards the data.

    0 and 1 stay where they are, and ``shift_time(., 1 / shift)`` is the inverse.

    Args:
        t: Times in [0, 1], any shape.
        shift: Above 0; 1 changes nothing. LightningDiT samples with 0.3.

    Raises:
        UserError: If `shift` is not a positive number.

    Reference:
        Esser et al., Scaling Rectified Flow Transformers (SD3), arXiv:2403.03206, section 5.3.2.
    """
    if not 0 < shift < math.inf:
        raise UserError(f"shift={shift}: give a number above 0; 1 leaves the times as they are")
    return shift * t / (shift * t + (1 - t))  # the same formula, and exactly 1 at 1


def dimension_shift(latent_shape: Sequence[int], base: int = 4096) -> float:
    """Return the shift that a latent with more numbers than ``base`` asks for, in training and in sampling.

    The same t destroys less of a larger latent. RAE writes s = sqrt(dim / base) and u' = s u / (1 + (s - 1) u) for
    u = 1 - t, which is noise at 1. With t' = 1 - u' that is t' = t / (s - (s - 1) t), our ``shift_time`` with
    ``shift = 1 / s = sqrt(base / dim)``: 0.144 for RAE's 768 x 16 x 16, 0.707 for 32 x 16 x 16.

    Args:
        latent_shape: (C, h, w).
        base: Numbers of a latent that needs no shift.

    Reference:
        Zheng et al., RAE, arXiv:2510.11690, section 4.
    """
    return math.sqrt(base / math.prod(latent_shape))


class TimeSampling:
    """Draw training times.

    >>> TimeSampling("uniform", shift=0.5)(4, "cpu").shape
    torch.Size([4])

    Args:
        distribution: ``logit_normal`` is sigmoid(N(0, 1)) (LightningDiT, RAE; arXiv:2403.03206, section 3.1).
        shift: Applied to what was drawn, see ``shift_time``; RAE trains with ``dimension_shift``, LightningDiT with 1.

    Raises:
        UserError: If an argument is none of these.
    """

    def __init__(self, distribution: Literal["uniform", "logit_normal"] = "logit_normal", shift: float = 1.0) -> None:
        if distribution not in ("uniform", "logit_normal"):
            raise UserError(f"distribution={distribution!r}: give 'uniform' or 'logit_normal'")
        shift_time(torch.zeros(()), shift)  # refuses a bad shift
        self.distribution, self.shift = distribution, shift

    def __call__(self, count: int, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
        """Return ``count`` times in [0, 1], (count,) float32; the generator, if any, lives on ``device``."""
        if self.distribution == "uniform":
            t = torch.rand(count, device=device, generator=generator)
        else:
            t = torch.randn(count, device=device, generator=generator).sigmoid()
        return shift_time(t, self.shift)

    def of(self, normal: Tensor) -> Tensor:
        """Return the times in [0, 1] that standard normal numbers (B,) stand for: as good a draw as ``__call__``'s."""
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
