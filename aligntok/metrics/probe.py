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

    The protocol, exactly:

    1. Features are given: one vector per image, no augmentation, computed once. Say which with every number: the
       flattened latent (``flatten_latent``) or the latent averaged over its grid (``pool_latent``), before or after
       the adapter. This choice changes the number more than all that follows.
    2. Each feature is standardised with the mean and the standard deviation (divisor N) of the TRAINING features. A
       feature that is constant there becomes 0.
    3. Multinomial logistic regression with a bias: minimise ``mean over images of cross-entropy + weight_decay / 2 *
       |W|^2``, the bias not decayed. It is convex: no learning rate, batch size, augmentation or seed to report. In
       scikit-learn's terms ``C = 1 / (N * weight_decay)``.
    4. From zero weights, full-batch L-BFGS (history 10, strong Wolfe line search) until the largest gradient is
       below 1e-6, the loss no longer changes, or ``max_iterations``.
    5. Accuracy = share of images whose largest logit is the label. No choice of anything on the test images.

    This is not the protocol of MAE (BatchNorm, LARS, 90 epochs with augmentation), which needs the encoder in the loop:
    compare only numbers of the same protocol. Runs on the features' device in their dtype (float32 or float64; lower
    ones become float32), also within ``inference_mode``. The same input gives the same result on the same machine.

    Memory: one standardised copy of the training features and about four times (N, classes). 50 000 x 8192 features
    and 1000 classes in float32 take 1.6 GB for the features, as much for the copy, and 1 GB beside.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers, any values; at least 2 classes.
        test_features: (M, D), M >= 1.
        test_labels: (M,) integers, all of them classes of ``train_labels``.
        weight_decay: L2 penalty of the weights on standardised features, >= 0.
        max_iterations: Upper limit of L-BFGS iterations, >= 1.

    Raises:
        UserError: Shapes that do not fit, labels that are no integers, fewer than 2 classes, a test label that the
            training labels lack, features that are not finite, or a number out of its range.

    Reference:
        Alain and Bengio, Understanding intermediate layers using linear classifier probes, arXiv:1610.01644; the
        full-batch L-BFGS of Radford et al., CLIP, arXiv:2103.00020, appendix A.3.
    """
    if weight_decay < 0 or max_iterations < 1:
        raise UserError(
            f"linear_probe takes weight_decay >= 0 and max_iterations >= 1, got {weight_decay} and {max_iterations}"
        )
    _check("train", train_features, train_labels)
    _check("test", test_features, test_labels)
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"linear_probe got training features of {train_features.shape[1]} dimensions and test features of "
            f"{test_features.shape[1]}: compute both with the same tokenizer at the same image size"
        )
    device = train_features.device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    classes = torch.unique(train_labels)
    if len(classes) < 2:
        raise UserError(f"linear_probe needs 2 or more classes, the training labels hold {classes.tolist()} only")
    unknown = torch.unique(test_labels)
    unknown = unknown[~torch.isin(unknown, classes)]
    if len(unknown):
        raise UserError(
            f"linear_probe: test labels {unknown[:10].tolist()} are not among the {len(classes)} classes of the "
            "training labels: draw both sets from the same classes"
        )
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        classifier = fit_classifier(train_features, train_labels, weight_decay, max_iterations)
        test_share, train_share = (
            (classifier.predict(features.to(device)) == labels).double().mean().item()
            for features, labels in ((test_features, test_labels), (train_features, train_labels))
        )
    return ProbeResult(accuracy=test_share, train_accuracy=train_share)


def flatten_latent(latent: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as vectors (B, C*h*w): every position has weights of its own."""
    _check_latent(latent)
    return latent.flatten(1)


def pool_latent(latent: Tensor) -> Tensor:
    """Return latents (B, C, h, w) averaged over the grid, (B, C)."""
    _check_latent(latent)
    return latent.mean(dim=(2, 3))


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted probe: logits = ((features - mean) * scale) @ weight.T + bias.

    Attributes:
        mean: (D,).
        scale: (D,), 1 / standard deviation; 0 for a constant feature.
        weight: (K, D).
        bias: (K,).
        classes: Label of each logit, (K,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor

    def predict(self, features: Tensor, chunk: int = 8192) -> Tensor:
        """Return the label of the largest logit for each row of features (M, D); ``chunk`` rows are held at a time."""
        best = [
            torch.addmm(self.bias, (rows.to(self.mean.dtype) - self.mean) * self.scale, self.weight.T).argmax(dim=1)
            for rows in torch.split(features, chunk)
        ]
        return self.classes[torch.cat(best)]


def fit_classifier(features: Tensor, labels: Tensor, weight_decay: float, max_iterations: int) -> LinearClassifier:
    """Fit the classifier of ``linear_probe`` (steps 2 to 4 there) to features (N, D) and labels (N,).

    The gradient is written out: that takes less memory than autograd, and works within ``inference_mode``, where
    Lightning runs validation.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    mean, scale = _standardisation(features)
    mean, scale = mean.to(dtype), scale.to(dtype)
    inputs = features.to(dtype).sub(mean).mul_(scale)
    classes, targets = torch.unique(labels, return_inverse=True)
    targets = targets.unsqueeze(1)
    weight = torch.zeros(len(classes), features.shape[1], dtype=dtype, device=features.device)
    bias = torch.zeros(len(classes), dtype=dtype, device=features.device)

    def loss_and_gradient() -> float:
        log_probability = F.log_softmax(torch.addmm(bias, inputs, weight.T), dim=1)
        loss = -log_probability.gather(1, targets).mean() + weight_decay / 2 * weight.square().sum()
        residual = log_probability.exp_()
        residual.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=dtype)).div_(len(inputs))
        weight.grad = torch.addmm(weight, residual.T, inputs, beta=weight_decay)
        bias.grad = residual.sum(dim=0)
        return loss.item()

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,  # torch's default
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss_and_gradient)  # type: ignore[no-untyped-call]  # torch left it without types
    return LinearClassifier(mean, scale, weight, bias, classes)


def _standardisation(features: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation of each column in float64, 0 where the column is constant."""
    parts = torch.split(features, chunk)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features)
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(dim=0)
    deviation = (squares / len(features)).sqrt()
    resolution = torch.finfo(features.dtype).eps * mean.abs()  # a smaller spread is rounding, not information
    return mean, torch.where(deviation > resolution, 1 / deviation, 0.0)


def _check(split: str, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or labels.shape != features.shape[:1] or len(features) == 0:
        raise UserError(
            f"linear_probe takes {split} features (N, D) and labels (N,), N >= 1, got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}: use flatten_latent or pool_latent on latents"
        )
    if not features.is_floating_point() or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"linear_probe takes float features and integer labels, got {features.dtype} and {labels.dtype} ({split})"
        )
    if not features.isfinite().all():
        raise UserError(f"linear_probe: {split} features contain NaN or infinity: look at the encoder that made them")


def _check_latent(latent: Tensor) -> None:
    if latent.dim() != 4:
        raise UserError(f"expected latents of shape (B, C, h, w), got {tuple(latent.shape)}")
