"""The loss in pixel space: reconstruction terms and both sides of the adversarial game, in one backward.

The reconstruction is cut off from the decoder; the gradients of the reconstruction terms and of the adversarial term at
the cut are taken once each. Through the decoder's last layer they give the adaptive weight, and their weighted sum is
what goes on into the decoder. The same discriminator pass serves its own loss. One backward, one step: accumulation,
mixed precision, clipping, DDP without unused parameters, and one honest ``global_step`` come from Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aligntok.losses import AdversarialLoss

Terms = dict[str, tuple[float, Tensor]]  # a loss: name to weight and value ()


def image_loss(
    image: Tensor,
    reconstruction: Tensor,
    reconstruction_terms: Callable[[Tensor, Tensor], Terms],
    adversarial: AdversarialLoss | None,
    last_layer: Tensor,
    step: int,
    logs: dict[str, Tensor],
) -> Tensor:
    """Return the loss () of generator and discriminator together.

    Args:
        image: (B, 3, H, W) in [0, 1].
        reconstruction: The decoder's output with its graph, (B, 3, H, W), not clamped.
        reconstruction_terms: Image and reconstruction, both float32, to terms.
        adversarial: The game, if there is one.
        last_layer: Weight of the decoder's last layer.
        step: Optimizer step.
        logs: Gets each term.
    """
    cut = reconstruction.detach().float().requires_grad_()
    terms = reconstruction_terms(image.float(), cut)
    logs |= {name: value.detach() for name, (_, value) in terms.items()}
    total = weighted_sum(terms, like=cut)
    (gradient,) = torch.autograd.grad(total, cut)
    value, discriminator_loss = total.detach(), total.new_zeros(())
    if adversarial is not None:
        step_gradient, generator_value, discriminator_loss = adversarial_step(
            adversarial, image, cut, reconstruction, gradient, last_layer, step, logs
        )
        gradient, value = gradient + step_gradient, value + generator_value
    onward = (reconstruction.float() * gradient).sum()  # its gradient at the decoder's output is `gradient`
    return onward - onward.detach() + value + discriminator_loss


def adversarial_step(
    adversarial: AdversarialLoss,
    image: Tensor,
    cut: Tensor,
    reconstruction: Tensor,
    gradient: Tensor,
    last_layer: Tensor,
    step: int,
    logs: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the adversarial gradient at the cut, the generator's value and the discriminator's loss."""
    zero = gradient.new_zeros(())
    weight = adversarial.weight_at(step)
    if not adversarial.active(step):
        return zero, zero, adversarial.idle()
    if not weight:
        cut = cut.detach()
    terms = adversarial(image, cut)
    logs |= {f"gan_{name}": value for name, value in terms.health.items()}
    logs["gan_discriminator"] = terms.discriminator.detach()
    if not weight:
        return zero, zero, terms.discriminator
    (adversarial_gradient,) = torch.autograd.grad(terms.generator, cut, retain_graph=True)
    scale = adversarial.adaptive_weight(reconstruction, gradient, adversarial_gradient, last_layer)
    logs |= {"gan_generator": terms.generator.detach(), "gan_adaptive_weight": scale}
    return weight * scale * adversarial_gradient, (weight * scale * terms.generator).detach(), terms.discriminator


def weighted_sum(terms: Terms, like: Tensor) -> Tensor:
    """Return the sum () of the weighted terms, in fp32 on the device of ``like``."""
    total = torch.zeros((), device=like.device)
    for weight, value in terms.values():
        total = total + weight * value
    return total
