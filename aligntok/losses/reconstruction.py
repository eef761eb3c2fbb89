"""The loss of a tokenizer: how far a reconstruction is from its image, and what a discriminator thinks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.losses.adversarial import AdversarialLoss
from aligntok.losses.perceptual import PerceptualDistance
from aligntok.schedule import Schedule, check_schedule, value_at

Terms = dict[str, tuple[float, Tensor]]
"""A sum that is not yet summed: name to weight and value (), so that each value can be logged."""


@dataclass(frozen=True)
class PerceptualTerm:
    """A perceptual distance and how much it weighs.

    Args:
        distance: Two batches of images (B, 3, H, W) in [0, 1] to a scalar, such as ``LPIPS``, ``LogitDistance`` or
            ``FeatureDistance``, or a module of your own; its weights do not learn.
        weight: Over the optimizer steps; at steps where it is 0, the distance is not computed.
    """

    distance: nn.Module
    weight: Schedule = 1.0


class Reference:
    """Real images that reconstructions are compared with; a frozen network sees them once, however many these are.

    >>> reference = Reference(torch.zeros(1, 3, 8, 8))
    >>> reference.distance_to(torch.ones(1, 3, 8, 8), nn.MSELoss())
    tensor(1.)

    Args:
        image: (B, 3, H, W) in [0, 1].
    """

    def __init__(self, image: Tensor) -> None:
        self.image = image.float()
        self.features: dict[PerceptualDistance, list[Tensor]] = {}  # of the reference, by the network that gave them

    def distance_to(self, image: Tensor, distance: nn.Module) -> Tensor:
        """Return the distance () of images (B, 3, H, W) to the reference, in fp32."""
        with torch.autocast(image.device.type, enabled=False):
            if not isinstance(distance, PerceptualDistance):
                return distance(image, self.image)  # type: ignore[no-any-return]
            if distance not in self.features:
                with torch.no_grad():
                    self.features[distance] = distance.features(self.image)
            return distance.compare(distance.features(image), self.features[distance])


@dataclass(frozen=True)
class LossValue:
    """What a loss gives for one batch.

    Attributes:
        value: Call ``backward`` on it, ().
        terms: Each term without its weight, by name, detached: for the log.
    """

    value: Tensor
    terms: dict[str, Tensor]


class SendGradient(torch.autograd.Function):
    """A number whose gradient with respect to a tensor was computed before.

    ``SendGradient.apply(x, gradient, value)`` returns ``value``. Where ordinary autograd would now go back through all
    that made the value, ``backward`` hands ``gradient`` to ``x`` as it is. A GAN needs this because the gradients of
    the reconstruction terms and of the adversarial term at the decoder's output are wanted one by one, to balance
    them, before their weighted sum goes through the decoder: once, instead of once for each.

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
    """Pixel term, any number of perceptual terms, and both sides of the adversarial game, in one backward pass.

    ``pixel + sum of weight * perceptual + adversarial.weight * adaptive weight * adversarial`` (AlignTok,
    arXiv:2509.25162, section 3; weights as in VA-VAE), each a mean over pixels or images, for the tokenizer; the hinge
    loss for the discriminator. Their gradients are those of the textbook's two losses with two optimizers.

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
            image: (B, 3, H, W) in [0, 1]; as a ``Reference`` where more than one reconstruction is compared with it.
            reconstruction: What the decoder made of it, with its graph, not clamped, (B, 3, H, W).
            step: Optimizer step.
            last_layer: Weight of the decoder's last layer, where an adaptive adversarial weight is measured.
        """
        reference = image if isinstance(image, Reference) else Reference(image)
        output = reconstruction.detach().float().requires_grad_()
        terms = self.terms(reference, output, step)
        logs = {name: value.detach() for name, (_, value) in terms.items()}
        value = weighted_sum(terms, like=output)
        (gradient,) = torch.autograd.grad(value, output)  # (B, 3, H, W)
        value = value.detach()
        if self.adversarial is None:
            return LossValue(SendGradient.apply(reconstruction.float(), gradient, value), logs)
        game = self.adversarial(reference.image, output, step)
        logs |= game.logs
        if game.generator is not None:
            (push,) = torch.autograd.grad(game.generator, output, retain_graph=True)  # (B, 3, H, W)
            scale = self.adversarial.adaptive_weight(reconstruction, gradient, push, last_layer)
            logs["gan_adaptive_weight"] = scale
            weight = self.adversarial.weight_at(step) * scale
            gradient, value = gradient + weight * push, value + weight * game.generator.detach()
        sent = SendGradient.apply(reconstruction.float(), gradient, value)
        return LossValue(sent + game.discriminator, logs)

    def terms(self, reference: Reference, reconstruction: Tensor, step: int, without: tuple[type, ...] = ()) -> Terms:
        """Return the terms that compare a reconstruction (B, 3, H, W), float32, with its image.

        Distances of the classes ``without`` are left out: a validation need not compute what a callback measures.
        """
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

    def load(self) -> None:
        """Fetch published weights of the distances now, so that a missing file does not stop a run later."""
        for distance in self.perceptual.values():
            load = getattr(distance, "load", None)  # published weights come at the first use: aligntok's own distances
            if load is not None:
                load()


def weighted_sum(terms: Terms, like: Tensor) -> Tensor:
    """Return the sum () of the weighted terms, in fp32 on the device of ``like``."""
    total = torch.zeros((), device=like.device)
    for weight, value in terms.values():
        total = total + weight * value
    return total
