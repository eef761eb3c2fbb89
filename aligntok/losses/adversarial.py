"""The adversarial terms of tokenizer training: hinge loss and adaptive weight.

Reference:
    Esser et al., Taming Transformers (VQGAN), arXiv:2012.09841, section 3.2: the adaptive weight.
    Lim and Ye, Geometric GAN, arXiv:1705.02894: the hinge loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import check_nonnegative
from aligntok.schedule import Schedule, check_schedule, first_nonzero_step, value_at

ADAPTIVE_EPS = 1e-4  # in the denominator of the adaptive weight, as in VQGAN and VA-VAE
WARMUP = 1000  # steps that the discriminator learns alone: an untrained one ruins reconstructions


class AdversarialTerms(NamedTuple):
    """The losses of both sides on one batch.

    Attributes:
        generator: -E[D(reconstruction)], (), to differentiate by the reconstruction; ``None`` while its weight is 0.
        discriminator: Hinge loss, (), to differentiate by the discriminator's weights.
        logs: Both losses, mean logits and accuracy, detached, by name.
    """

    generator: Tensor | None
    discriminator: Tensor
    logs: dict[str, Tensor]


class AdversarialLoss(nn.Module):
    """A discriminator, when and how fast it learns, and how much it counts in the tokenizer's loss.

    Args:
        discriminator: Image (B, 3, H, W) in [0, 1] to logits, positive for real.
        weight: Weight of the generator's term over the steps, on top of the adaptive weight.
        adaptive: Scale the term so that its gradient at the decoder's last layer is as long as the reconstruction's.
        max_adaptive_weight: Upper bound of that scale.
        discriminator_start: Step at which the discriminator begins to learn; by default 1,000 steps before ``weight``
            leaves zero.
        learning_rate: Of the discriminator, over the steps; by default that of the tokenizer.

    >>> loss = AdversarialLoss(nn.Conv2d(3, 1, 4), weight={2000: 0.0, 3000: 0.5})
    >>> loss.discriminator_start
    1001
    >>> loss(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), step=1500).generator  # its weight is 0 until step 2001
    """

    def __init__(
        self,
        discriminator: nn.Module,
        weight: Schedule = 0.5,
        adaptive: bool = True,
        max_adaptive_weight: float = 1e4,
        discriminator_start: int | None = None,
        learning_rate: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.weight = check_schedule("weight", weight)
        check_nonnegative(max_adaptive_weight=max_adaptive_weight, discriminator_start=discriminator_start)
        self.adaptive, self.max_adaptive_weight = adaptive, max_adaptive_weight
        if discriminator_start is None:
            discriminator_start = max(0, (first_nonzero_step(weight) or 0) - WARMUP)
        self.discriminator_start = discriminator_start
        self.learning_rate = None if learning_rate is None else check_schedule("learning_rate", learning_rate)

    def active(self, step: int) -> bool:
        """Whether the discriminator learns at optimizer step ``step``."""
        return step >= self.discriminator_start

    def forward(self, image: Tensor, reconstruction: Tensor, step: int) -> AdversarialTerms:
        """Return the losses of both sides from one pass of real and one of reconstructed images.

        Args:
            image: Real, (B, 3, H, W) in [0, 1].
            reconstruction: (B, 3, H, W), detached from the decoder, requires grad.
            step: Optimizer step.
        """
        if not self.active(step):
            return AdversarialTerms(None, self.idle(), {})
        counts = value_at(self.weight, step) != 0
        real = self.discriminator(image).float()  # (B, 1, h, w)
        fake = self.discriminator(reconstruction if counts else reconstruction.detach()).float()  # (B, 1, h, w)
        generator, discriminator = -fake.mean(), hinge(real, fake)  # (), ()
        logs = {
            "gan_logit_real": real.detach().mean(),
            "gan_logit_fake": fake.detach().mean(),
            "gan_accuracy": 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean()),
            "gan_discriminator": discriminator.detach(),
        }
        if counts:
            logs["gan_generator"] = generator.detach()
        return AdversarialTerms(generator if counts else None, discriminator, logs)

    def idle(self) -> Tensor:
        """Return a zero () that depends on every weight, so that distributed training finds no unused parameters."""
        return torch.stack([parameter.sum() * 0 for parameter in self.discriminator.parameters()]).sum()

    def adaptive_weight(
        self, reconstruction: Tensor, rec_grad: Tensor, adv_grad: Tensor, last_layer: Tensor | None
    ) -> Tensor:
        """Return the ratio () of both terms' gradient norms at the decoder's last layer, the same on all ranks.

        Args:
            reconstruction: The decoder's output, with its graph, (B, 3, H, W).
            rec_grad: Gradient of the reconstruction terms at the reconstruction, (B, 3, H, W).
            adv_grad: Gradient of the generator's adversarial term there, (B, 3, H, W).
            last_layer: Weight of the decoder's last layer.
        """
        if not self.adaptive:
            return rec_grad.new_ones(())
        assert last_layer is not None, "an adaptive weight is measured at the decoder's last layer"
        norms: list[Tensor] = []
        for gradient in (rec_grad, adv_grad):
            sent = gradient.to(reconstruction)
            at_layer = torch.autograd.grad(reconstruction, last_layer, sent, retain_graph=True)[0].float()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(at_layer)
                at_layer = at_layer / dist.get_world_size()
            norms.append(at_layer.norm())
        return (norms[0] / (norms[1] + ADAPTIVE_EPS)).clamp(0, self.max_adaptive_weight)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (), half for each kind of image.

    >>> hinge(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor(0.5000)
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
