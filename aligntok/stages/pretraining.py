"""A stand-in for a pretrained encoder, where none is at hand: a small backbone learns the data's own labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aligntok.errors import check, check_positive
from aligntok.files import write_atomically
from aligntok.metrics.features import EncoderFeatures
from aligntok.networks.encoders import VisionEncoder
from aligntok.protocols import HasLabels, offered_data
from aligntok.stages.optimization import Optimization
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import (
    build,
    load_strictly,
    read_checkpoint,
    rebuilding,
    recipe_of,
    without_encoder_weights,
)


class EncoderPretraining(Stage):
    """Trains an encoder to name the class of an image from the mean of its features.

    At the end it writes the backbone to ``encoder.safetensors`` in the run's folder: the tokenizer stages load that
    file with ``encoder.weights``, as they load DINOv2.

    Args:
        encoder: A small ``VisionEncoder``, ``weights: null``.
        num_classes: Classes of the data.
        label_smoothing: Of the cross-entropy, in [0, 1).
        optimization: Optimizer, learning rate, weight decay.

    >>> import torch
    >>> sizes = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    >>> encoder = VisionEncoder("vit_tiny_patch16_224", 16, 8, weights=None, model_args=sizes)
    >>> EncoderPretraining(encoder, num_classes=10)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        num_classes: int,
        label_smoothing: float = 0.0,
        optimization: Optimization = Optimization(1e-3),
    ) -> None:
        super().__init__(optimization)
        check_positive(num_classes=num_classes)
        check(0 <= label_smoothing < 1, f"label_smoothing={label_smoothing}: give a share in [0, 1)")
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits (B, num_classes) of an image (B, 3, H, W) in [0, 1]."""
        features = self.encoder(image)  # (B, width, h, w)
        return self.head(features.mean((-2, -1)))  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Refuse classes that the head does not have."""
        super().setup(stage)
        labels = offered_data(self.trainer, HasLabels)
        if labels is not None:
            labels.check_labels(self.head.out_features, "model.num_classes")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch."""
        logits = self(batch["image"])
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        self.log_terms({"loss": loss.detach(), "accuracy": accuracy(logits, batch["label"])}, len(logits))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the accuracy on held-out images."""
        logits = self(batch["image"])  # (B, num_classes)
        loss = F.cross_entropy(logits, batch["label"])
        logs = {f"{self.split}/loss": loss, f"{self.split}/accuracy": accuracy(logits, batch["label"])}
        self.log_mean(logs, len(logits))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the class probabilities (B, num_classes)."""
        return self(batch["image"]).softmax(-1)  # type: ignore[no-any-return]

    def on_fit_end(self) -> None:
        """Write the backbone's weights."""
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            state = {key: value.cpu().contiguous() for key, value in self.encoder.backbone.state_dict().items()}
            target = Path(self.trainer.default_root_dir) / "encoder.safetensors"
            write_atomically(target, lambda path: save_file(state, path))


def accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the share () of logits (B, num_classes) whose largest is at the label (B,)."""
    return (logits.argmax(-1) == label).float().mean()


def load_classifier(path: str | Path) -> EncoderPretraining:
    """Rebuild the classifier of a checkpoint of ``EncoderPretraining``, in eval mode.

    >>> classifier = load_classifier("runs/encoder/checkpoints/last.ckpt")  # doctest: +SKIP
    >>> classifier(image).argmax(-1)  # doctest: +SKIP

    Raises:
        UserError: The file is no such checkpoint.
    """
    checkpoint = read_checkpoint(path)
    recipe = without_encoder_weights(recipe_of(checkpoint, "encoder", path))
    with rebuilding(path):
        classifier = EncoderPretraining(build(recipe, VisionEncoder), checkpoint["hyper_parameters"]["num_classes"])
        load_strictly(classifier, checkpoint["state_dict"], str(path))
        return classifier.eval()


def load_features(path: str | Path, name: str) -> EncoderFeatures:
    """Return the features of such a classifier's encoder for a Fréchet distance, which is called ``val/rfd_<name>``."""
    return EncoderFeatures(load_classifier(path).encoder, name).eval()
