"""Linear probe: how well a linear classifier reads the class from frozen latents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError


@dataclass(frozen=True)
class ProbeResult:
    """Outcome of a linear probe, top-1 accuracies in [0, 1].

    >>> features, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    >>> linear_probe(features, labels, features, labels)
    ProbeResult(accuracy=1.0, train_accuracy=1.0)

    Attributes:
        accuracy: On the test features: the number to report.
        train_accuracy: On the training features; far above ``accuracy`` means more dimensions than images can support.
    """

    accuracy: float
    train_accuracy: float


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted probe: logits (M, K) = ((features - mean) * scale) @ weight.T + bias, whose columns are ``classes``."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Return the label of the largest logit for each row of features (M, D)."""
        best = [
            torch.addmm(self.bias, (rows.to(self.mean) - self.mean) * self.scale, self.weight.T).argmax(dim=1)
            for rows in torch.split(features, 8192)  # no copy of all
        ]
        return self.classes[torch.cat(best)]


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    weight_decay: float = 1e-4,
    max_iterations: int = 200,
) -> ProbeResult:
    """Train a linear classifier on frozen features and return its top-1 accuracies.

    The protocol: one vector per image, no augmentation. Each feature is standardised by the mean and standard deviation
    (divisor N) of the training features; one that is constant there becomes 0. Minimise ``mean cross-entropy +
    weight_decay / 2 * |W|^2`` (scikit-learn's ``C = 1 / (N * weight_decay)``), the bias not decayed, by full-batch
    L-BFGS from zero until the largest gradient is below 1e-6: convex, so there is no seed and no learning rate. Compare
    with numbers of the same protocol only (MAE's has augmentation), of the same features: say with each number whether
    they are ``flatten_latent`` or ``pool_latent``, before or after the adapter. Works under ``inference_mode``; beside
    the features it takes a copy of the training features and about four times (N, K).

    Args:
        train_features: (N, D), float.
        train_labels: (N,) integers of any values; at least 2 classes.
        test_features: (M, D).
        test_labels: (M,), all of them classes of ``train_labels``.
        weight_decay: L2 penalty of the weights on standardised features, at least 0.
        max_iterations: Of L-BFGS.

    Raises:
        UserError: Features and labels that do not fit each other, features that are not finite, a number out of range.

    Reference:
        Alain and Bengio, arXiv:1610.01644; the full-batch L-BFGS of Radford et al., CLIP, arXiv:2103.00020, A.3.
    """
    if weight_decay < 0 or max_iterations < 1:
        raise UserError(f"weight_decay={weight_decay}, max_iterations={max_iterations}: give at least 0 and 1")
    _check("train", train_features, train_labels, train_features.shape[-1])
    _check("test", test_features, test_labels, train_features.shape[-1])
    device, classes = train_features.device, torch.unique(train_labels)
    unknown = torch.unique(test_labels)
    unknown = unknown[~torch.isin(unknown, classes.to(unknown.device))][:10].tolist()
    if len(classes) < 2 or unknown:
        raise UserError(
            f"the training labels hold {len(classes)} classes, the test labels {unknown or 'no'} others: give 2 or more"
            " classes, the same in both"
        )
    with torch.autocast(device.type, enabled=False):
        classifier = fit_classifier(train_features, train_labels.to(device), weight_decay, max_iterations)
        shares = [
            (classifier.predict(features.to(device)) == labels.to(device)).double().mean().item()
            for features, labels in ((test_features, test_labels), (train_features, train_labels))
        ]
    return ProbeResult(*shares)


def fit_classifier(features: Tensor, labels: Tensor, weight_decay: float, max_iterations: int) -> LinearClassifier:
    """Fit the classifier of ``linear_probe`` to features (N, D) and labels (N,)."""
    with torch.inference_mode(False), torch.enable_grad():  # Lightning validates in inference mode
        inputs = features.to(torch.promote_types(features.dtype, torch.float32))
        variance, mean = torch.var_mean(inputs, dim=0, correction=0)
        resolution = torch.finfo(features.dtype).eps * mean.abs()  # a smaller spread is rounding, not information
        scale = torch.where(variance.sqrt() > resolution, variance.rsqrt(), 0)
        inputs = (inputs - mean).mul_(scale)
        classes, targets = torch.unique(labels, return_inverse=True)
        weight = inputs.new_zeros(len(classes), inputs.shape[1], requires_grad=True)
        bias = inputs.new_zeros(len(classes), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=1e-6,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(torch.addmm(bias, inputs, weight.T), targets)
            loss = loss + weight_decay / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]  # torch left it without types
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch left it without types
    return LinearClassifier(mean, scale, weight.detach(), bias.detach(), classes)


def flatten_latent(latent: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as vectors (B, C * h * w): every position has weights of its own."""
    _check_latent(latent)
    return latent.flatten(1)


def pool_latent(latent: Tensor) -> Tensor:
    """Return latents (B, C, h, w) averaged over the grid, (B, C)."""
    _check_latent(latent)
    return latent.mean(dim=(2, 3))


def _check_latent(latent: Tensor) -> None:
    if latent.ndim != 4:
        raise UserError(f"latents have shape {tuple(latent.shape)}: give (B, C, h, w)")


def _check(split: str, features: Tensor, labels: Tensor, dim: int) -> None:
    if features.shape != (len(labels), dim) or labels.ndim != 1 or not len(labels):
        raise UserError(
            f"{split} features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}: give (N, D) and"
            f" (N,), N at least 1, of the {dim} dimensions of the training features"
        )
    if not features.is_floating_point() or labels.is_floating_point() or labels.is_complex():
        raise UserError(f"{split}: give float features and integer labels, not {features.dtype} and {labels.dtype}")
    if not features.isfinite().all():
        raise UserError(f"{split} features contain NaN or infinity: look at the encoder that made them")
