"""Pictures to look at while a tokenizer trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid, save_image

from aligntok.networks.tokenizer import Tokenizer


class ReconstructionGrid(pl.Callback):
    """Originals, reconstructions and latents of the same few validation images: to TensorBoard, and ``images/*.png``.

    The latents' three rows of numbers that vary most become red, green and blue.

    Args:
        every_n_steps: Optimizer steps between two pictures.
        num_images: Columns of the picture.
    """

    def __init__(self, every_n_steps: int = 500, num_images: int = 12) -> None:
        self.every_n_steps, self.num_images = every_n_steps, num_images
        self.last_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw every so many optimizer steps."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self.last_step:
            self.draw(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw with the averaged weights."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self.draw(trainer, pl_module)

    @torch.no_grad()
    def draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw, on the first rank."""
        tokenizer: Any = getattr(module, "tokenizer", None)
        data: Any = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(tokenizer, Tokenizer) or not hasattr(data, "preview"):
            return
        self.last_step = trainer.global_step
        image = data.preview(self.num_images).to(module.device)
        training = module.training
        module.eval()
        latent = tokenizer.encode(image)
        grid = picture(image, tokenizer.decode(latent), latent)
        module.train(training)
        folder = Path(trainer.default_root_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, folder / f"step_{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("image, reconstruction, latent", grid, trainer.global_step)


def picture(image: Tensor, reconstruction: Tensor, latent: Tensor) -> Tensor:
    """Return one picture (3, H', W') with rows of images, reconstructions (B, 3, H, W) and latents (B, C, h, w)."""
    colours = interpolate(latent_colours(latent), image.shape[-2:], mode="nearest")
    rows = torch.cat([image, reconstruction, colours]).float().cpu()
    scale = max(1, 64 // image.shape[-1])
    grid: Tensor = make_grid(
        interpolate(rows, scale_factor=scale, mode="nearest"), nrow=len(image), padding=2, pad_value=1.0
    )
    return grid


def latent_colours(latent: Tensor) -> Tensor:
    """Return three principal components over all cells of latents (B, C, h, w), as RGB (B, 3, h, w) in [0, 1]."""
    cells = latent.float().movedim(1, -1).flatten(0, 2)
    cells = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    directions = (
        directions[:3] * directions[:3].sum(1, keepdim=True).sign()
    )  # a fixed sign: colours stay over the steps
    components: Tensor = cells @ directions.T
    low, high = components.quantile(0.02, 0), components.quantile(0.98, 0)
    components = ((components - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    if components.shape[1] < 3:
        components = torch.nn.functional.pad(components, (0, 3 - components.shape[1]))
    return components.view(latent.shape[0], *latent.shape[2:], 3).movedim(-1, 1)
