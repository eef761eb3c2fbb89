"""Guidance: what turns the velocity of a class or a text into one that gives better samples of it."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive
from aligntok.flow.samplers import Velocity
from aligntok.networks.text import Condition, concatenate


class VelocityNetwork(Protocol):
    """What guidance needs of a network, ``aligntok.networks.DiT`` for one.

    Attributes:
        latent_shape: (C, h, w).
    """

    latent_shape: tuple[int, int, int]

    @property
    def has_null(self) -> bool:
        """Whether the network was trained with a null condition."""

    def null(self, condition: Any) -> Any:
        """Return as many null conditions as there are conditions."""

    def prepare(self, condition: Any) -> Any:
        """Return what the network takes in place of a condition, with all that does not depend on latent and time."""

    def __call__(self, latent: Tensor, t: Tensor, condition: Any, /) -> Tensor:
        """Return the velocity (B, C, h, w) of latents (B, C, h, w) at times (B,) for B conditions."""


class Guidance:
    """Push the velocity of a condition away from a worse one: ``worse + scale * (conditional - worse)``.

    The worse one is that of the null condition of the same network (classifier-free guidance), or of a guide network,
    smaller or trained less, with the same condition (autoguidance). LightningDiT's published numbers are at
    ``channels=3`` with scale 6.7 to 10; with all channels the best scale is far lower.

    >>> from aligntok.networks import DiT
    >>> network = DiT((4, 2, 2), num_classes=3, width=16, depth=1, num_heads=2)
    >>> velocity = Guidance(scale=4.0, start=0.1).velocity(network, torch.tensor([0, 2]))
    >>> velocity(torch.randn(2, 4, 2, 2), torch.full((2,), 0.5)).shape
    torch.Size([2, 4, 2, 2])

    Args:
        scale: 1 is no guidance, 0 the guide alone.
        start: Time from which samples are guided; before it, in the noise, only the conditional velocity is computed.
        end: Time from which they are no longer guided; 1 guides to the last step.
        channels: Guide the first channels only, this many; None guides all.
        guide: Network of autoguidance, e.g. ``class_path: aligntok.weights.load_network``, in place of the null
            condition.

    Reference:
        Ho and Salimans, arXiv:2207.12598; interval: Kynkäänniemi et al., arXiv:2404.07724; autoguidance: Karras et al.,
        Guiding a Diffusion Model with a Bad Version of Itself, arXiv:2406.02507.
    """

    def __init__(
        self,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        channels: int | None = None,
        guide: nn.Module | None = None,
    ) -> None:
        check(0 <= scale < math.inf, f"scale={scale}: give a number of at least 0; 1 is no guidance")
        interval = f"start={start}, end={end}: give 0 <= start < end <= 1; t = 0 is noise, t = 1 is data"
        check(0 <= start < end <= 1, interval)
        check_positive(channels=channels)
        self.scale, self.start, self.end, self.channels = scale, start, end, channels
        self._guide: Any = guide  # a record of the settings skips it: its weights say more than its name

    @property
    def guide(self) -> Any:
        """The network of autoguidance, or ``None``."""
        return self._guide

    def check(self, network: VelocityNetwork) -> None:
        """Raise a ``UserError`` where a network has no null condition to guide with, or fewer channels."""
        channels = network.latent_shape[0]
        check((self.channels or 0) <= channels, f"channels={self.channels}: the latent has {channels} channels")
        if self.scale != 1 and self.guide is None and not network.has_null:
            raise UserError(
                f"scale={self.scale}: the network has no null class to guide with: give a guide network, set scale to "
                "1, or train with null_class=true"
            )

    def velocity(self, network: VelocityNetwork, condition: Condition) -> Velocity:
        """Return the guided velocity of the given conditions, for a sampler.

        At a time in the interval the network is called once, with 2B samples (with a guide network: each once, with
        B); outside, or with scale 1, once with B. What a network makes of a condition alone is made here, once.

        Args:
            network: Its velocity is guided.
            condition: Labels (B,) int64, or a ``Text``, of the batch that will be sampled.

        Raises:
            UserError: If there is neither a null condition nor a guide network, or `channels` exceeds the latent's.
        """
        self.check(network)
        count, by_null = len(condition), self.scale != 1 and self.guide is None
        both = network.prepare(concatenate(condition, network.null(condition)) if by_null else condition)
        own = both[:count] if by_null else both
        theirs: Any = self.guide.prepare(condition) if self.scale != 1 and self.guide is not None else None

        def guided(x: Tensor, t: Tensor) -> Tensor:
            inside = self._inside(t)
            if len(inside) == 0:
                return network(x, t, own)
            if by_null:
                chosen = (
                    both if len(inside) == count else both[torch.cat([torch.arange(count).to(inside), count + inside])]
                )
                velocities = network(torch.cat([x, x[inside]]), torch.cat([t, t[inside]]), chosen)
                conditional, worse = velocities.to(x.dtype).tensor_split([len(x)])
            else:
                conditional = network(x, t, own).to(x.dtype)
                worse = self.guide(x[inside], t[inside], theirs[inside]).to(x.dtype)
            guided_rows = worse + self.scale * (conditional[inside] - worse)
            result = conditional.clone()
            result[inside, : self.channels] = guided_rows[:, : self.channels]
            return result

        return guided

    def _inside(self, t: Tensor) -> Tensor:
        """Return the indices of the samples to guide."""
        if self.scale == 1:
            return t.new_empty(0, dtype=torch.long)
        inside = t >= self.start
        if self.end < 1:
            inside &= t < self.end
        return inside.nonzero().flatten()
