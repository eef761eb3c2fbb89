import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from aligntok.errors import UserError
from aligntok.metrics import knn_accuracy, linear_probe, probe, rank_me
from aligntok.metrics.probe import fit_linear

pytestmark = pytest.mark.kernels


def blobs(spread: float, classes: int = 5, dim: int = 20, count: int = 900, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + spread * torch.randn(count, dim, generator=generator)
    half = 2 * count // 3
    return features[:half], labels[:half], features[half:], labels[half:]


def standardised(train, *sets):
    return [(features - train.mean(0)) / train.std(0, correction=0) for features in sets]


def test_separable_classes_are_all_right():
    result = linear_probe(*blobs(spread=0.05))
    assert result.accuracy == 1.0
    assert result.train_accuracy == 1.0


@pytest.mark.parametrize("weight_decay", [1e-4, 1e-2])
def test_equals_scikit_learn(weight_decay):
    train, train_labels, test, test_labels = blobs(spread=2.0)
    inputs, test_inputs = standardised(train, train, test)
    ours = linear_probe(train, train_labels, test, test_labels, weight_decay=weight_decay)
    theirs = LogisticRegression(C=1 / (len(train) * weight_decay), tol=1e-8, max_iter=5000)
    theirs.fit(inputs.double().numpy(), train_labels.numpy())
    predicted = theirs.predict(test_inputs.double().numpy())
    assert 0.3 < ours.accuracy < 0.95  # a task where classifiers differ
    assert ours.accuracy == pytest.approx((predicted == test_labels.numpy()).mean(), abs=0.01)
    weight, bias = fit_linear(inputs, train_labels, 5, weight_decay, 200)
    ours = (test_inputs @ weight.T + bias).argmax(1)
    assert (ours.numpy() == predicted).mean() >= 0.99
    weight = weight - weight.mean(0)  # what is common to all classes changes no probability
    np.testing.assert_allclose(weight, theirs.coef_ - theirs.coef_.mean(0), atol=2e-3)


def test_gradient_vanishes_at_the_solution():
    train, train_labels, *_ = blobs(spread=2.0)
    (inputs,) = standardised(train.double(), train.double())
    weight, bias = (x.clone().requires_grad_() for x in fit_linear(inputs, train_labels, 5, 1e-3, 200))
    loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, train_labels)
    loss = loss + 1e-3 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs().max() < 1e-5


def test_same_input_same_result_also_in_inference_mode():
    data = blobs(spread=2.0)
    first = linear_probe(*data)
    with torch.inference_mode():
        assert linear_probe(*data) == first
        assert linear_probe(*(x.clone() for x in data)) == first
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert linear_probe(*data) == first
    torch.set_rng_state(state)


def test_order_of_samples_does_not_matter():
    train, train_labels, test, test_labels = blobs(spread=2.0)
    a, b = torch.randperm(len(train)), torch.randperm(len(test))
    permuted = linear_probe(train[a].double(), train_labels[a], test[b].double(), test_labels[b])
    assert permuted == linear_probe(train.double(), train_labels, test.double(), test_labels)


def test_scale_and_offset_of_a_feature_do_not_matter():
    train, train_labels, test, test_labels = (x.double() if x.is_floating_point() else x for x in blobs(spread=2.0))
    expected = linear_probe(train, train_labels, test, test_labels)
    scale = torch.logspace(-3, 3, train.shape[1], dtype=torch.float64)
    assert linear_probe(train * scale + 7, train_labels, test * scale + 7, test_labels) == expected


def test_constant_feature_has_no_effect():
    train, train_labels, test, test_labels = blobs(spread=2.0)
    expected = linear_probe(train, train_labels, test, test_labels)
    train = torch.cat([train, torch.full((len(train), 1), 0.1)], dim=1)
    test = torch.cat([test, torch.randn(len(test), 1) * 1e6], dim=1)
    assert linear_probe(train, train_labels, test, test_labels) == expected


def test_shuffled_labels_give_chance():
    train, train_labels, test, test_labels = blobs(spread=0.05, count=3000)
    shuffled = train_labels[torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))]
    assert abs(linear_probe(train, shuffled, test, test_labels).accuracy - 0.2) < 0.1


def test_label_values_are_arbitrary_and_half_features_are_taken():
    train, train_labels, test, test_labels = blobs(spread=0.05)
    assert linear_probe(train.bfloat16(), 100 - 7 * train_labels, test.bfloat16(), 100 - 7 * test_labels).accuracy == 1


def test_more_weight_decay_fits_less():
    data = blobs(spread=2.0)
    loose, tight = (linear_probe(*data, weight_decay=w).train_accuracy for w in (1e-4, 10.0))
    assert tight < loose


def with_nan(x):
    x = x.clone()
    x[3, 1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: (a, b.clamp(max=3), c, d), "test labels \\[4\\]"),
        (lambda a, b, c, d: (a, b * 0, c, d * 0), "2 or more classes"),
        (lambda a, b, c, d: (with_nan(a), b, c, d), "train features contain NaN"),
        (lambda a, b, c, d: (a, b, with_nan(c), d), "test features contain NaN"),
        (lambda a, b, c, d: (a, b[1:], c, d), "train features"),
        (lambda a, b, c, d: (a, b, c[:0], d[:0]), "test features"),
        (lambda a, b, c, d: (a, b.float(), c, d), "integer labels"),
        (lambda a, b, c, d: (a, b, c[:, 1:], d), "20 dimensions"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        linear_probe(*change(*blobs(spread=1.0)))
    with pytest.raises(UserError, match=message):
        knn_accuracy(*change(*blobs(spread=1.0)))
    with pytest.raises(UserError, match="weight_decay"):
        linear_probe(*blobs(spread=1.0), weight_decay=-1)


# Neighbours


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (20, 10.0), (600, 0.07)])
def test_neighbours_vote_as_in_scikit_learn(neighbours, temperature):
    train, train_labels, test, test_labels = blobs(spread=2.0)
    theirs = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda far: np.exp((1 - far) / temperature))
    expected = theirs.fit(train.double(), train_labels).score(test.double(), test_labels)
    found = knn_accuracy(train, train_labels, test, test_labels, num_neighbours=neighbours, temperature=temperature)
    assert 0.3 < found < 0.95
    assert found == pytest.approx(expected, abs=0.5 / len(test))


def test_neighbours_are_the_same_in_any_order_number_of_queries_and_precision(monkeypatch):
    train, train_labels, test, test_labels = blobs(spread=2.0)
    expected = knn_accuracy(train, train_labels, test, test_labels)
    order = torch.randperm(len(train))
    assert knn_accuracy(train[order], train_labels[order], test, test_labels) == expected
    monkeypatch.setattr(probe, "QUERIES", 7)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn_accuracy(train, 100 - 7 * train_labels, 1000 * test, 100 - 7 * test_labels) == expected
    with pytest.raises(UserError, match="num_neighbours=0"):
        knn_accuracy(train, train_labels, test, test_labels, num_neighbours=0)


# Effective rank


def with_spectrum(singular, rows):
    """Features (rows, D) of these singular values, in a random basis."""
    values = torch.tensor(singular, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (rows, len(values)))
    return left * values @ right.T


def test_rank_of_known_spectra():
    torch.manual_seed(0)
    assert rank_me(with_spectrum([3.0] * 12, 40)) == pytest.approx(12, rel=1e-4)
    assert rank_me(torch.randn(50, 1) * torch.randn(1, 12)) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.randn(20000, 16)) == pytest.approx(16, rel=1e-3)  # white
    assert rank_me(with_spectrum([2.0, 1.0, 1.0], 10)) == pytest.approx(2**1.5, rel=1e-4)  # shares 1/2, 1/4, 1/4
    assert rank_me(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)


def test_rank_is_that_of_the_singular_values_however_many_rows(monkeypatch):
    features = torch.randn(30, 50) * torch.logspace(0, -2, 50)
    for wide in (features, features.T):
        values = torch.linalg.svdvals(wide.double())
        shares = values / values.sum() + 1e-7
        expected = float((-shares * shares.log()).sum().exp())
        assert rank_me(wide) == pytest.approx(expected, rel=1e-6)
        monkeypatch.setattr(probe, "ROWS", 7)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert rank_me(wide * 100) == pytest.approx(expected, rel=1e-6)  # the scale does not matter
    for wrong, match in ((with_nan(features), "NaN"), (features[0], r"\(N, D\), not \(50,\)")):
        with pytest.raises(UserError, match=match):
            rank_me(wrong)
