"""From noise to latents along a velocity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aligntok.errors import UserError, check
from aligntok.flow.path import per_sample, shift_time

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (B, C, h, w), t (B,) -> velocity (B, C, h, w)


class Sampler(ABC):
    """Carry noise at t = 0 to a latent at t = 1 along a velocity; a sample does not depend on the others of its batch.

    >>> class OneStep(Sampler):
    ...     def integrate(self, velocity, x):
    ...         return x + velocity(x, x.new_zeros(len(x)))
    >>> OneStep()(lambda x, t: 3 - x, torch.randn(1, 1, 1, 1)).item()
    3.0
    """

    @torch.no_grad()
    def __call__(self, velocity: Velocity, noise: Tensor) -> Tensor:
        """Return latents at t = 1 from standard normal noise, both (B, C, h, w), without gradients.

        They are float32 (float64 from such noise), and so is the state all the way, whatever the dtype of the velocity:
        under autocast it may be bfloat16.
        """
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        return self.integrate(lambda x, t: velocity(x, t).to(x.dtype), x)

    @abstractmethod
    def integrate(self, velocity: Velocity, x: Tensor) -> Tensor:
        """Return the state at t = 1 from the state ``x`` at t = 0, both (B, C, h, w); the velocity has its dtype."""


class FixedSteps(Sampler):
    """Base of the samplers on a grid of times that is chosen beforehand.

    Args:
        num_steps: Updates of the state, at least 1, on ``num_steps + 1`` times. LightningDiT's "250 steps" are 250
            times, so 249 here, and RAE's "50" are 49.
        shift: Of the even grid on [0, 1], see ``shift_time``.
    """

    def __init__(self, num_steps: int, shift: float = 1.0) -> None:
        whole = isinstance(num_steps, int) and num_steps >= 1
        check(whole, f"num_steps={num_steps}: give a whole number of at least 1")
        self.num_steps, self.shift = num_steps, shift
        even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device="cpu")  # also under another default
        self.times: list[float] = shift_time(even, shift).tolist()

    def integrate(self, velocity: Velocity, x: Tensor) -> Tensor:
        """See ``Sampler``."""

        def slope(x: Tensor, t: float) -> Tensor:
            return velocity(x, x.new_full((len(x),), t))

        for now, later in zip(self.times[:-1], self.times[1:], strict=True):
            x = self.step(slope, x, now, later)
        return x

    @abstractmethod
    def step(self, slope: Callable[[Tensor, float], Tensor], x: Tensor, now: float, later: float) -> Tensor:
        """Return the state at time ``later`` from the state ``x`` at time ``now``; `slope` is the velocity there."""


class Euler(FixedSteps):
    """Straight steps along the velocity at their start: order 1, one evaluation a step.

    >>> Euler(num_steps=4)(lambda x, t: 2 * t.view(-1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()  # of t^2
    0.75
    """

    def step(self, slope: Callable[[Tensor, float], Tensor], x: Tensor, now: float, later: float) -> Tensor:
        """See ``FixedSteps``."""
        return x + (later - now) * slope(x, now)


class Heun(FixedSteps):
    """Steps along the mean of the velocities at their two ends: order 2, two evaluations a step.

    >>> Heun(num_steps=4)(lambda x, t: 2 * t.view(-1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()  # of t^2
    1.0
    """

    def step(self, slope: Callable[[Tensor, float], Tensor], x: Tensor, now: float, later: float) -> Tensor:
        """See ``FixedSteps``."""
        first = slope(x, now)
        second = slope(x + (later - now) * first, later)
        return x + (later - now) / 2 * (first + second)


class Adaptive(Sampler):
    """Steps as long as the tolerance allows (dopri5), each sample with its own.

    `velocity` sees a different time in each row; samples that are done wait for the last one. Steps are powers of two,
    which costs up to a third more evaluations: otherwise the rounding of the network, which may differ between batch
    sizes, would change every step a little, as in torchode. In bfloat16 it may still change one. No adaptive method is
    sure to see a jump of the velocity in time: with a guidance interval, sample with Euler or Heun.

    >>> grow = Adaptive()(lambda x, t: x, torch.ones(1, 1, 1, 1))
    >>> f"{grow.item():.3f}"  # e
    '2.718'

    Args:
        atol: Absolute error allowed in a step.
        rtol: Error allowed in a step relative to the state; the sum of both bounds the root mean square over (C, h, w).

    Raises:
        UserError: If a tolerance is not above 0; when called, if the velocity is not finite or too rough.

    Reference:
        Dormand and Prince, A family of embedded Runge-Kutta formulae, 1980.
    """

    NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
    STAGES = (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # order 5, the new state
    )
    ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4
    FIRST_STEP = 2**-4
    SHORTEST_STEP = 2**-20  # well above the resolution of float32 at t = 1
    SHRINK, GROW = -2, 3  # most that a step changes at once, in powers of two

    def __init__(self, atol: float = 1e-6, rtol: float = 1e-3) -> None:
        check(0 < atol < math.inf and 0 < rtol < math.inf, f"atol={atol}, rtol={rtol}: give numbers above 0")
        self.atol, self.rtol = atol, rtol

    def integrate(self, velocity: Velocity, x: Tensor) -> Tensor:
        """See ``Sampler``."""
        t = x.new_zeros(len(x))
        step = torch.full_like(t, self.FIRST_STEP)
        slope = velocity(x, t)
        while (t < 1).any():
            step = torch.minimum(step, 1 - t)
            h = per_sample(step, x)
            slopes, point = [slope], x
            for node, weights in zip(self.NODES, self.STAGES, strict=True):
                point = x + h * _combine(weights, slopes)
                slopes.append(velocity(point, t + node * step))
            tolerance = self.atol + self.rtol * torch.maximum(x.abs(), point.abs())
            error = (h * _combine(self.ERROR, slopes) / tolerance).square().flatten(1).mean(1).sqrt()
            good = error <= 1
            if (~good & ~(step > self.SHORTEST_STEP)).any():
                raise UserError(
                    "Adaptive: the velocity is not finite, or too rough for any step: check the network, or sample "
                    "with Euler"
                )
            keep = per_sample(good, x)
            x, slope = torch.where(keep, point, x), torch.where(keep, slopes[-1], slope)
            t = torch.where(good, t + step, t)
            step = step * (-error.log2() / 5).floor().clamp(self.SHRINK, self.GROW).exp2()  # error ~ step^5
        return x


def _combine(weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
    """Return the weighted sum of the slopes."""
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True)]
    return sum(terms[1:], start=terms[0])
