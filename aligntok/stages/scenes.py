"""The judge of a quickstart's scenes, trained on real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from aligntok.errors import check_nonnegative
from aligntok.metrics.scenes import SceneJudge
from aligntok.stages.optimization import Optimization
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import build, load_strictly, read_checkpoint, rebuilding, recipe_of


class SceneJudging(Stage):
    """Trains a judge to say what is where in pictures of which that is known.

    Batches hold ``image`` (B, 3, H, W) in [0, 1], ``objects`` (B, 5) and ``ground`` (B,): see ``EmojiTruth``.

    Args:
        judge: What learns.
        noise: Most standard deviation of the noise on a training picture, so that no single pixel decides.
        optimization: Optimizer, learning rate, weight decay.

    >>> import torch
    >>> stage = SceneJudging(SceneJudge(num_objects=40, num_grounds=8, width=8))
    >>> stage(torch.rand(2, 3, 32, 32)).objects.shape
    torch.Size([2, 5, 41])
    """

    def __init__(self, judge: SceneJudge, noise: float = 0.05, optimization: Optimization = Optimization(3e-3)) -> None:
        super().__init__(optimization)
        check_nonnegative(noise=noise)
        self.judge, self.noise = judge, noise

    def forward(self, image: Tensor) -> Any:
        """Return what the judge says of images (B, 3, H, W) in [0, 1]."""
        return self.judge(image)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        image = batch["image"]
        most = self.noise * self.uniform(batch, "most noise").to(image)[:, None, None, None]
        image = (image + most * self.normal(batch, "noise", image.shape[1:]).to(image)).clamp(0, 1)
        loss = self.judge.loss(image, batch["objects"], batch["ground"])
        self.log_terms({"loss": loss.detach()}, len(image))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the share of pictures in which all objects and the ground are named right."""
        objects, ground = self.judge(batch["image"]).named()
        right = (objects == batch["objects"]).all(1) & (ground == batch["ground"])
        self.log_mean({f"{self.split}/accuracy": right.float().mean()}, len(right))


def load_scene_judge(path: str | Path) -> SceneJudge:
    """Rebuild the judge of a checkpoint of ``SceneJudging``, in eval mode.

    >>> judge = load_scene_judge("runs/quickstart_text/judge/checkpoints/last.ckpt")  # doctest: +SKIP

    Raises:
        UserError: The file is no such checkpoint.
    """
    checkpoint = read_checkpoint(path)
    with rebuilding(path):
        judge = build(recipe_of(checkpoint, "judge", path), SceneJudge)
        prefix = "judge."
        state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()}
        load_strictly(judge, state, str(path))
        return judge.eval()
