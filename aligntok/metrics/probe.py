"""What frozen latents tell of the class, by a linear classifier and by neighbours, and how many dimensions they use."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import check

ROWS = 8192  # of features that are classified at once
QUERIES = 256  # whose neighbours are looked for at once: with 50,000 training images 0.1 GB
RANK_EPS = 1e-7  # of RankMe, for float32


class ProbeResult(NamedTuple):
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

    The protocol: one vector per image, no augmentation. Each feature is standardised by the mean and standard deviation
    (divisor N) of the training features; one that is constant there becomes 0. Minimise ``mean cross-entropy +
    weight_decay / 2 * |W|^2`` (scikit-learn's ``C = 1 / (N * weight_decay)``), the bias not decayed, by full-batch
    L-BFGS from zero until the largest gradient is below 1e-6: convex, so there is no seed and no learning rate. Compare
    with numbers of the same protocol only (MAE's has augmentation), and of the same features (latents flattened or
    averaged, before or after the adapter). Works under ``inference_mode``; beside the features it takes a copy of the
    training features and about four times (N, K).

    Args:
        train_features: (N, D), float.
        train_labels: (N,) integers of any values; at least 2 classes.
        test_features: (M, D).
        test_labels: (M,), all of them classes of ``train_labels``.
        weight_decay: L2 penalty of the weights, at least 0.
        max_iterations: Of L-BFGS.

    Raises:
        UserError: Features and labels that do not fit each other, features that are not finite, a number out of range.

    Reference:
        Alain and Bengio, arXiv:1610.01644; the full-batch L-BFGS of Radford et al., CLIP, arXiv:2103.00020, A.3.
    """
    wrong = f"weight_decay={weight_decay}, max_iterations={max_iterations}: give at least 0 and 1"
    check(weight_decay >= 0 and max_iterations >= 1, wrong)
    device = train_features.device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    classes = check_splits(train_features, train_labels, test_features, test_labels)
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):  # Lightning validates in the former
        inputs = train_features.to(torch.promote_types(train_features.dtype, torch.float32))
        variance, mean = torch.var_mean(inputs, dim=0, correction=0)
        resolution = torch.finfo(train_features.dtype).eps * mean.abs()  # a smaller spread is rounding, not information
        scale = torch.where(variance.sqrt() > resolution, variance.rsqrt(), 0)
        targets = torch.unique(train_labels, return_inverse=True)[1]
        weight, bias = fit_linear((inputs - mean).mul_(scale), targets, len(classes), weight_decay, max_iterations)
        shares = []
        for features, labels in ((test_features, test_labels), (train_features, train_labels)):
            rows = torch.split(features, ROWS)  # no copy of all
            best = torch.cat([F.linear((x.to(mean) - mean) * scale, weight, bias).argmax(dim=1) for x in rows])
            shares.append((classes[best] == labels).double().mean().item())
    return ProbeResult(*shares)


def fit_linear(
    inputs: Tensor, targets: Tensor, num_classes: int, weight_decay: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Return weight (K, D) and bias (K,) of ``linear_probe`` for standardised inputs (N, D) and classes (N,) from 0."""
    weight = inputs.new_zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(num_classes, requires_grad=True)
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
        loss = F.cross_entropy(F.linear(inputs, weight, bias), targets) + weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch left it without types
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch left it without types
    return weight.detach(), bias.detach()


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the share of test features, in [0, 1], whose class the nearest training features vote for.

    DINO's protocol: the ``num_neighbours`` of largest cosine similarity each vote with ``exp(similarity /
    temperature)``. No augmentation, nothing is trained, no randomness.

    >>> train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> knn_accuracy(train, torch.tensor([0, 0, 1]), torch.tensor([[2.0, 0.5], [0.1, 1.0]]), torch.tensor([0, 1]))
    1.0

    Args:
        train_features: (N, D), float.
        train_labels: (N,) integers of any values; at least 2 classes.
        test_features: (M, D).
        test_labels: (M,), all of them classes of ``train_labels``.
        num_neighbours: At least 1; all training features where there are fewer.
        temperature: Of the votes, above 0.

    Raises:
        UserError: As ``linear_probe``.

    Reference:
        Caron et al., DINO, arXiv:2104.14294, section 4.1 and appendix F; Wu et al., arXiv:1805.01978, section 3.4.
    """
    wrong = f"num_neighbours={num_neighbours}, temperature={temperature}: give at least 1 and more than 0"
    check(num_neighbours >= 1 and temperature > 0, wrong)
    device = train_features.device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    classes = check_splits(train_features, train_labels, test_features, test_labels)
    targets, right = torch.searchsorted(classes, train_labels.contiguous()), 0
    with torch.autocast(device.type, enabled=False):
        train = F.normalize(train_features.to(torch.promote_types(train_features.dtype, torch.float32)))
        for features, labels in zip(*(torch.split(x, QUERIES) for x in (test_features, test_labels)), strict=True):
            similarity = F.normalize(features.to(train)) @ train.T
            nearest, rows = similarity.topk(min(num_neighbours, len(train)))
            weights = (nearest / temperature).exp().unsqueeze(1)  # (B, 1, num_neighbours)
            votes = (weights @ F.one_hot(targets[rows], len(classes)).to(weights)).squeeze(1)  # (B, K)
            right += int((classes[votes.argmax(dim=1)] == labels).sum())
    return right / len(test_labels)


def rank_me(features: Tensor) -> float:
    """Return how many dimensions features (N, D) use, between 1 and the smaller of N and D.

    The exponential of the entropy of their singular values' shares. The features are not centred, as published. Fewer
    rows than dimensions bound the rank, so compare at an equal number of images.

    >>> round(rank_me(torch.eye(4)), 3), round(rank_me(torch.ones(4, 4)), 3)
    (4.0, 1.0)

    Raises:
        UserError: No float features (N, D), N at least 1, or one that is not finite.

    Reference:
        Garrido et al., RankMe, arXiv:2210.02885, section 3.1, with its eps of 1e-7; the singular values are the roots
        of the Gram matrix's eigenvalues, in float64.
    """
    shape = tuple(features.shape)
    check(
        len(shape) == 2 and shape[0] > 0 and features.is_floating_point(), f"RankMe: give features (N, D), not {shape}"
    )
    check(
        bool(features.isfinite().all()), "RankMe: features contain NaN or infinity: look at the encoder that made them"
    )
    with torch.autocast(features.device.type, enabled=False):
        tall = features if features.shape[0] >= features.shape[1] else features.T
        gram = torch.zeros(2 * tall.shape[1:], dtype=torch.float64, device=features.device)
        for rows in torch.split(tall, ROWS):
            gram += rows.double().T @ rows.double()
        singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny) + RANK_EPS
    return float((shares * shares.log()).sum().neg().exp())


def check_splits(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Return the classes, sorted; refuse features and labels that do not fit each other, or classes never seen."""
    check_split("train", train, train_labels, train.shape[-1])
    check_split("test", test, test_labels, train.shape[-1])
    classes: Tensor = torch.unique(train_labels)
    unknown = torch.unique(test_labels[~torch.isin(test_labels, classes)])[:10].tolist()
    problem = f"the training labels hold {len(classes)} classes, the test labels {unknown or 'no'} others"
    check(len(classes) >= 2 and not unknown, f"{problem}: give 2 or more classes, the same in both")
    return classes


def check_split(split: str, features: Tensor, labels: Tensor, width: int) -> None:
    """Refuse features and labels that do not fit each other."""
    found = f"{split} features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}"
    fits = features.shape == (len(labels), width) and labels.ndim == 1 and len(labels) > 0
    check(fits, f"{found}: give (N, D) and (N,), N at least 1, of the {width} dimensions of the training features")
    integer = not labels.is_floating_point() and not labels.is_complex()
    found = f"not {features.dtype} and {labels.dtype}"
    check(features.is_floating_point() and integer, f"{split}: give float features and integer labels, {found}")
    finite = bool(features.isfinite().all())
    check(finite, f"{split} features contain NaN or infinity: look at the encoder that made them")
