"""The adversarial game of tokenizer training: hinge loss, adaptive weight, one discriminator pass for both players.

Reference:
    Esser et al., Taming Transformers (VQGAN), arXiv:2012.09841, section 3.2: the adaptive weight.
    Lim and Ye, Geometric GAN, arXiv:1705.02894: the hinge loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.schedule import Schedule, check_schedule, first_nonzero_step, value_at

ADAPTIVE_EPS = 1e-4  # in the denominator of the adaptive weight, as in VQGAN and VA-VAE


@dataclass(frozen=True)
class AdversarialTerms:
    """What one batch gives to generator and discriminator.

    Attributes:
        generator: -E[D(reconstruction)], (), or ``None`` at steps where the generator does not hear the discriminator;
            its gradient is wanted at the reconstruction only.
        discriminator: Hinge loss, (); its gradient is for the discriminator's weights only.
        logs: Both losses, mean logits and accuracy, detached, by the name that they have in the log.
    """

    generator: Tensor | None
    discriminator: Tensor
    logs: dict[str, Tensor]


class AdversarialLoss(nn.Module):
    """A discriminator, when it learns and how fast, and how much its opinion weighs.

    Args:
        discriminator: Image (B, 3, H, W) in [0, 1] to logits, positive for real.
        weight: Weight of the generator's term over the steps, on top of the adaptive weight.
        adaptive: Scale the term so that its gradient at the decoder's last layer is as long as the reconstruction's.
        max_adaptive_weight: Upper bound of that scale.
        discriminator_start: Step at which the discriminator begins to learn; by default 1,000 steps before ``weight``
            leaves zero, because an untrained critic ruins reconstructions.
        learning_rate: Of the discriminator, over the steps; by default that of the tokenizer.

    >>> loss = AdversarialLoss(nn.Conv2d(3, 1, 4), weight={2000: 0.0, 3000: 0.5})
    >>> loss.discriminator_start, loss.weight_at(2500)
    (1001, 0.25)
    """

    WARMUP = 1000

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
        self.adaptive, self.max_adaptive_weight = adaptive, max_adaptive_weight
        if discriminator_start is None:
            discriminator_start = max(0, (first_nonzero_step(weight) or 0) - self.WARMUP)
        self.discriminator_start = discriminator_start
        self.learning_rate = None if learning_rate is None else check_schedule("learning_rate", learning_rate)

    def active(self, step: int) -> bool:
        """Whether the discriminator learns at optimizer step ``step``."""
        return step >= self.discriminator_start

    def weight_at(self, step: int) -> float:
        """Weight of the generator's term at optimizer step ``step``."""
        return value_at(self.weight, step)

    def forward(self, image: Tensor, reconstruction: Tensor, step: int) -> AdversarialTerms:
        """Show real and reconstructed images to the discriminator, once each, where it learns at this step.

        Args:
            image: Real, (B, 3, H, W) in [0, 1].
            reconstruction: Without the decoder's graph, (B, 3, H, W); it requires grad itself. One pass of the
                discriminator serves both losses; the caller takes from each the gradients that it is for.
            step: Optimizer step.
        """
        if not self.active(step):
            return AdversarialTerms(None, self.idle(), {})
        heard = bool(self.weight_at(step))
        real = self.discriminator(image).float()
        fake = self.discriminator(reconstruction if heard else reconstruction.detach()).float()
        generator, discriminator = -fake.mean(), hinge(real, fake)
        logs = {
            "gan_logit_real": real.detach().mean(),
            "gan_logit_fake": fake.detach().mean(),
            "gan_accuracy": 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean()),
            "gan_discriminator": discriminator.detach(),
        }
        if not heard:
            return AdversarialTerms(None, discriminator, logs)
        return AdversarialTerms(generator, discriminator, logs | {"gan_generator": generator.detach()})

    def idle(self) -> Tensor:
        """Return a zero that touches every weight: distributed training then finds no unused parameters."""
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
            (at_layer,) = torch.autograd.grad(
                reconstruction, last_layer, gradient.to(reconstruction), retain_graph=True
            )
            at_layer = at_layer.float()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(at_layer)  # the sum: a common factor cancels in the ratio, up to the eps
                at_layer = at_layer / dist.get_world_size()
            norms.append(at_layer.norm())
        ratio = norms[0] / (norms[1] + ADAPTIVE_EPS)
        return ratio.clamp(0, self.max_adaptive_weight)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (), half for each kind of image."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
