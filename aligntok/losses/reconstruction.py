"""The loss of a tokenizer: pixel, perceptual and adversarial terms of a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.losses.adversarial import AdversarialLoss
from aligntok.losses.perceptual import PerceptualDistance
from aligntok.schedule import Schedule, check_schedule, value_at

Terms = dict[str, tuple[float, Tensor]]
"""Name to weight and value () of the terms of a loss, so that each value can be logged."""


@dataclass(frozen=True)
class PerceptualTerm:
    """A perceptual distance and its weight.

    >>> PerceptualTerm(nn.MSELoss(), weight={0: 0.0, 1000: 1.0}).weight  # grows over 1,000 steps
    {0: 0.0, 1000: 1.0}

    Args:
        distance: Two batches of images (B, 3, H, W) in [0, 1] to a scalar: ``LPIPS``, ``LogitDistance``,
            ``FeatureDistance``, or a module of your own; its weights do not learn.
        weight: Over the optimizer steps; at steps where it is 0, the distance is not computed.
    """

    distance: nn.Module
    weight: Schedule = 1.0


class Reference:
    """Images to compare reconstructions with; their features are computed once for any number of reconstructions.

    >>> reference = Reference(torch.zeros(1, 3, 8, 8))
    >>> reference.distance_to(torch.ones(1, 3, 8, 8), nn.MSELoss())
    tensor(1.)

    Args:
        image: (B, 3, H, W) in [0, 1].
    """

    def __init__(self, image: Tensor) -> None:
        self.image = image.float()
        self.features: dict[PerceptualDistance, list[Tensor]] = {}

    def distance_to(self, image: Tensor, distance: nn.Module) -> Tensor:
        """Return the distance () of images (B, 3, H, W) to the reference, in fp32."""
        with torch.autocast(image.device.type, enabled=False):
            if not isinstance(distance, PerceptualDistance):
                return distance(image, self.image)  # type: ignore[no-any-return]
            if distance not in self.features:
                with torch.no_grad():
                    self.features[distance] = distance.features(self.image)
            return distance.compare(distance.features(image), self.features[distance])


class LossValue(NamedTuple):
    """The loss of one batch.

    Attributes:
        value: To call ``backward`` on, ().
        terms: Each term without its weight, by name, detached: for the log.
    """

    value: Tensor
    terms: dict[str, Tensor]


class SendGradient(torch.autograd.Function):
    """A number whose gradient with respect to a tensor was computed before.

    ``SendGradient.apply(x, gradient, value)`` returns ``value``, and its backward pass gives ``gradient`` to ``x``. A
    GAN needs it: the gradients of the reconstruction terms and of the adversarial term are computed one by one at the
    decoder's output, to balance them, and then their weighted sum goes back through the decoder in a single pass.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> SendGradient.apply(x, torch.tensor([0.5, -3.0]), torch.tensor(7.0)).backward()
    >>> x.grad
    tensor([ 0.5000, -3.0000])
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        """Return the value () and keep the gradient, which has the shape of the tensor."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Send the gradient to the tensor, and nothing to the other two."""
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


class ReconstructionLoss(nn.Module):
    """Pixel term, any number of perceptual terms, and the adversarial losses of both sides, in one backward pass.

    For the tokenizer ``pixel + sum of weight * perceptual + adversarial.weight * adaptive weight * adversarial``
    (AlignTok, arXiv:2509.25162, section 3; weights as in VA-VAE), each a mean over pixels or images; for the
    discriminator the hinge loss. The gradients are those of the two losses computed one after the other.

    Args:
        pixel: ``l1``, the mean absolute difference, or ``mse``, the mean squared one.
        perceptual: By name, which is also that in the log.
        adversarial: The discriminator and its weight, or ``None`` for no adversarial term.

    >>> loss = ReconstructionLoss("mse", {"coarse": PerceptualTerm(nn.MSELoss(), weight={0: 0.0, 100: 1.0})})
    >>> image, reconstruction = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8, requires_grad=True)
    >>> {name: value.item() for name, value in loss(image, reconstruction, step=50).terms.items()}
    {'mse': 1.0, 'coarse': 1.0}
    >>> loss(image, reconstruction, step=50).value.item()
    1.5
    """

    def __init__(
        self,
        pixel: Literal["l1", "mse"] = "l1",
        perceptual: dict[str, PerceptualTerm] | None = None,
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        super().__init__()
        terms = perceptual or {}
        self.pixel = pixel
        self.perceptual = nn.ModuleDict({name: term.distance.requires_grad_(False) for name, term in terms.items()})
        self.weights = {name: check_schedule(f"weight of {name}", term.weight) for name, term in terms.items()}
        self.adversarial = adversarial

    def forward(
        self, image: Tensor | Reference, reconstruction: Tensor, step: int, last_layer: Tensor | None = None
    ) -> LossValue:
        """Return the loss of tokenizer and discriminator together.

        Args:
            image: (B, 3, H, W) in [0, 1]; a ``Reference`` where several reconstructions are compared with it.
            reconstruction: The decoder's output, not clamped, (B, 3, H, W).
            step: Optimizer step.
            last_layer: Weight of the decoder's last layer, needed for an adaptive adversarial weight.
        """
        reference = image if isinstance(image, Reference) else Reference(image)
        output = reconstruction.detach().float().requires_grad_()  # (B, 3, H, W)
        terms = self.terms(reference, output, step)
        logs = {name: value.detach() for name, (_, value) in terms.items()}
        value = weighted_sum(terms, like=output)
        (gradient,) = torch.autograd.grad(value, output)  # (B, 3, H, W)
        value = value.detach()  # ()
        if self.adversarial is None:
            return LossValue(SendGradient.apply(reconstruction.float(), gradient, value), logs)
        adversarial = self.adversarial(reference.image, output, step)
        logs |= adversarial.logs
        if adversarial.generator is not None:
            (push,) = torch.autograd.grad(adversarial.generator, output, retain_graph=True)  # (B, 3, H, W)
            scale = self.adversarial.adaptive_weight(reconstruction, gradient, push, last_layer)
            logs["gan_adaptive_weight"] = scale
            weight = value_at(self.adversarial.weight, step) * scale
            gradient, value = gradient + weight * push, value + weight * adversarial.generator.detach()
        sent = SendGradient.apply(reconstruction.float(), gradient, value)
        return LossValue(sent + adversarial.discriminator, logs)

    @torch.no_grad()
    def try_out(self, reference: Reference, reconstruction: Tensor) -> None:
        """Compute what will count only later in a run: all perceptual terms, and the discriminator's logits."""
        for distance in self.perceptual.values():
            reference.distance_to(reconstruction, distance)
        if self.adversarial is not None:
            self.adversarial.discriminator(reconstruction)

    def terms(self, reference: Reference, reconstruction: Tensor, step: int, without: tuple[type, ...] = ()) -> Terms:
        """Return pixel and perceptual terms of a reconstruction (B, 3, H, W), float32, but for classes ``without``."""
        pixel = F.l1_loss if self.pixel == "l1" else F.mse_loss
        terms = self.perceptual_terms(reference, reconstruction, step, without)
        return {self.pixel: (1.0, pixel(reconstruction, reference.image))} | terms

    def perceptual_terms(
        self, reference: Reference, reconstruction: Tensor, step: int, without: tuple[type, ...] = ()
    ) -> Terms:
        """Return the perceptual terms that count at this step, in fp32, of a reconstruction (B, 3, H, W)."""
        terms: Terms = {}
        for name, distance in self.perceptual.items():
            weight = value_at(self.weights[name], step)
            if weight and not isinstance(distance, without):
                terms[name] = (weight, reference.distance_to(reconstruction, distance))
        return terms


def weighted_sum(terms: Terms, like: Tensor) -> Tensor:
    """Return the sum () of the weighted terms, in fp32 on the device of ``like``."""
    return sum((weight * value for weight, value in terms.values()), start=torch.zeros((), device=like.device))
