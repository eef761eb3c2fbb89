"""Guidance: what turns the velocity of a class into one that gives better samples of it."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_positive
from aligntok.flow.samplers import Velocity


class VelocityNetwork(Protocol):
    """What guidance needs of a network, ``aligntok.networks.DiT`` for one.

    Attributes:
        latent_shape: (C, h, w).
        null_label: Label of "no class"; None in a network that was not trained with one.
    """

    latent_shape: tuple[int, int, int]
    null_label: int | None

    def __call__(self, latent: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return the velocity (B, C, h, w) of latents (B, C, h, w) at times (B,) for labels (B,)."""


class Guidance:
    """Push the velocity of a class away from a worse one: ``worse + scale * (conditional - worse)``.

    The worse one is the null class of the same network (classifier-free guidance), or a guide network, smaller or
    trained less, with the same label (autoguidance). LightningDiT's published numbers are at ``channels=3`` with scale
    6.7 to 10; with all channels the best scale is far lower.

    >>> from aligntok.networks import DiT
    >>> network = DiT((4, 2, 2), num_classes=3, width=16, depth=1, num_heads=2)
    >>> velocity = Guidance(scale=4.0, start=0.1).velocity(network, label=torch.tensor([0, 2]))
    >>> velocity(torch.randn(2, 4, 2, 2), torch.full((2,), 0.5)).shape
    torch.Size([2, 4, 2, 2])

    Args:
        scale: 1 is no guidance, 0 the guide alone.
        start: Time from which samples are guided; before it, in the noise, only the conditional velocity is computed.
        end: Time from which they are no longer guided; 1 guides to the last step.
        channels: Guide the first channels only, this many; None guides all.
        guide: Network of autoguidance, e.g. ``class_path: aligntok.weights.load_network``, in place of the null class.

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

    def velocity(self, network: VelocityNetwork, label: Tensor) -> Velocity:
        """Return the guided velocity of the given labels, for a sampler.

        At a time in the interval the network is called once, with 2B samples (with a guide network: each once, with
        B); outside, or with scale 1, once with B.

        Args:
            network: Its velocity is guided.
            label: (B,) int64, of the batch that will be sampled.

        Raises:
            UserError: If there is neither a null class nor a guide network, or `channels` exceeds the latent's.
        """
        channels, null_label = network.latent_shape[0], network.null_label
        check((self.channels or 0) <= channels, f"channels={self.channels}: the latent has {channels} channels")
        if self.scale != 1 and self.guide is None and null_label is None:
            raise UserError(
                f"scale={self.scale}: the network has no null class to guide with: give a guide network, set scale to "
                "1, or train with null_class=true"
            )

        def guided(x: Tensor, t: Tensor) -> Tensor:
            inside = self._inside(t)
            if len(inside) == 0:
                return network(x, t, label)
            if self.guide is None:
                assert null_label is not None
                null = torch.full_like(label[inside], null_label)
                both = network(torch.cat([x, x[inside]]), torch.cat([t, t[inside]]), torch.cat([label, null]))
                conditional, worse = both.to(x.dtype).tensor_split([len(x)])
            else:
                conditional = network(x, t, label).to(x.dtype)
                worse = self.guide(x[inside], t[inside], label[inside]).to(x.dtype)
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
