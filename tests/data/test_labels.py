"""Labels to sample: in turn or at random, exactly as many as asked."""

import numpy as np
import pytest
import torch

from aligntok.data import ClassLabels
from aligntok.errors import UserError


def test_balanced_takes_the_classes_in_turn():
    labels = ClassLabels(7, 3)
    assert len(labels) == 7
    assert labels.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert np.bincount(ClassLabels(50_000, 1000).labels).tolist() == [50] * 1000
    assert ClassLabels(5, 10, classes=[7, 2]).labels.tolist() == [7, 2, 7, 2, 7]


def test_random_draws_each_label_by_itself():
    first, again, other = (ClassLabels(20_000, 10, policy="random", seed=seed).labels for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    counts = np.bincount(first, minlength=10)
    assert 1800 < counts.min() < counts.max() < 2200
    assert len(set(counts.tolist())) > 5  # not balanced
    assert 0.08 < (first[1:] == first[:-1]).mean() < 0.12
    chosen = ClassLabels(1000, 10, policy="random", classes=[3, 4]).labels
    assert set(chosen.tolist()) == {3, 4}


def test_batch_gives_the_labels_of_ids_in_any_order():
    batch = ClassLabels(8, 5).batch(np.array([6, 0, 4]), np.zeros(3, bool))
    assert batch["label"].tolist() == [1, 0, 4]
    assert batch["label"].dtype == torch.int64


def test_fingerprint_is_of_the_labels():
    prints = [
        ClassLabels(8, 5).fingerprint(),
        ClassLabels(9, 5).fingerprint(),
        ClassLabels(8, 4).fingerprint(),
        ClassLabels(8, 5, "random").fingerprint(),
        ClassLabels(8, 5, "random", seed=1).fingerprint(),
    ]
    assert len(set(prints)) == 5
    assert ClassLabels(8, 5, classes=[0, 1, 2, 3, 4]).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "num_samples=0: give at least 1"),
        ({"num_classes": 0}, "num_classes=0: give at least 1"),
        ({"classes": [1, 5, -1]}, r"classes \[5, -1\]: give labels in 0 \.\. 4"),
        ({"classes": []}, r"classes \[\]"),
    ],
)
def test_out_of_range(options, words):
    with pytest.raises(UserError, match=words):
        ClassLabels(**{"num_samples": 8, "num_classes": 5, **options})
