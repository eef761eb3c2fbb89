"""A stand-in for a pretrained encoder, where none is at hand: a small backbone learns the data's own labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aligntok.files import write_atomically
from aligntok.metrics.features import EncoderFeatures
from aligntok.networks.encoders import VisionEncoder
from aligntok.stages.optimization import Optimization
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import build, load_strictly, read_checkpoint, recipe_of


class EncoderPretraining(Stage):
    """Trains an encoder to name the class of an image from the mean of its features.

    At the end it writes the backbone to ``encoder.safetensors`` in the run's folder: the tokenizer stages load that
    file with ``encoder.weights``, as they load DINOv2.

    Args:
        encoder: A small ``VisionEncoder``, ``weights: null``.
        num_classes: Classes of the data.
        label_smoothing: Of the cross-entropy, in [0, 1).
        optimization: Optimizer, learning rate, weight decay.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        num_classes: int,
        label_smoothing: float = 0.0,
        optimization: Optimization = Optimization(1e-3),
    ) -> None:
        super().__init__(optimization)
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits (B, num_classes) of an image (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(image).mean((-2, -1)))  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch."""
        logits = self(batch["image"])
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        self.log_terms({"loss": loss.detach(), "accuracy": accuracy(logits, batch["label"])}, len(logits))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the accuracy on held-out images."""
        logits = self(batch["image"])
        prefix = "test" if self.trainer.testing else "val"
        logs = {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": accuracy(logits, batch["label"])}
        self.log_mean({f"{prefix}/{name}": value for name, value in logs.items()}, len(logits))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure on the test images what validation measures."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the class probabilities (B, num_classes)."""
        return self(batch["image"]).softmax(-1)  # type: ignore[no-any-return]

    def on_fit_end(self) -> None:
        """Write the backbone's weights."""
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            state = {
                key: value.detach().cpu().contiguous() for key, value in self.encoder.backbone.state_dict().items()
            }
            write_atomically(
                Path(self.trainer.default_root_dir) / "encoder.safetensors", lambda path: save_file(state, path)
            )


def accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the share () of logits (B, num_classes) whose largest is at the label (B,)."""
    return (logits.argmax(-1) == label).float().mean()


def load_classifier(path: str | Path) -> EncoderPretraining:
    """Rebuild the classifier of a checkpoint of ``EncoderPretraining``, in eval mode.

    Raises:
        UserError: The file is no such checkpoint.
    """
    checkpoint = read_checkpoint(path)
    recipe = recipe_of(checkpoint, "encoder", path)
    recipe["init_args"]["weights"] = None  # they are in the checkpoint
    encoder = build(recipe, VisionEncoder)
    classifier = EncoderPretraining(encoder, int(checkpoint["hyper_parameters"]["num_classes"]))
    load_strictly(classifier, checkpoint["state_dict"], str(path))
    return classifier.eval()


def load_features(path: str | Path, name: str) -> EncoderFeatures:
    """Return the features of the encoder in a checkpoint of ``EncoderPretraining``, for a Fréchet distance.

    Args:
        path: The checkpoint.
        name: What the metric is called after (``val/rfd_<name>``).

    Raises:
        UserError: The file is no such checkpoint.
    """
    return EncoderFeatures(load_classifier(path).encoder, name).eval()
