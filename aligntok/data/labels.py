"""What a generator is asked for: a label for each sample."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch

from aligntok.data.order import Indices
from aligntok.data.sources import Batch, BatchSource
from aligntok.errors import check, check_positive


class ClassLabels(BatchSource):
    """Labels to sample, those of ``aligntok sample``; item i is the label of the sample of id i.

    >>> ClassLabels(num_samples=5, num_classes=1000, classes=[207, 360]).labels
    array([207, 360, 207, 360, 207])

    Args:
        num_samples: How many.
        num_classes: Of the generator.
        policy: ``balanced`` takes the classes in turn (0, 1, 2, ..., 0, 1, 2, ...: never sorted, because the Inception
            Score of ADM's evaluator depends on the order), equally many of each where the numbers allow; ``random``
            draws each label by itself. Published FIDs use either; the first is lower by about 0.1.
        classes: Only these, in turn; all by default.
        seed: Of ``random``.

    Raises:
        UserError: A number or a class out of range.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        policy: Literal["balanced", "random"] = "balanced",
        classes: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        check_positive(num_samples=num_samples, num_classes=num_classes)
        chosen = list(range(num_classes)) if classes is None else classes
        wrong = [label for label in chosen if not 0 <= label < num_classes]
        check(bool(chosen) and not wrong, f"classes {wrong or chosen}: give labels in 0 .. {num_classes - 1}")
        self.num_classes = num_classes
        turn = np.arange(num_samples) % len(chosen)
        if policy == "random":
            turn = np.random.default_rng(seed).integers(len(chosen), size=num_samples)
        self.labels = np.asarray(chosen, dtype=np.int64)[turn]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return the ``label`` of each id, (B,)."""
        return {"label": torch.from_numpy(self.labels[ids])}

    def fingerprint(self) -> str:
        """Return a hash of all labels."""
        return hashlib.sha256(self.labels.tobytes()).hexdigest()[:16]
