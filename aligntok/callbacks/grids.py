"""Pictures to look at while a tokenizer or a generator trains."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.utils import make_grid, save_image

from aligntok.callbacks.measurement import Measurement, evaluation, tokenizer_of
from aligntok.errors import check, check_nonnegative, check_positive
from aligntok.files import write_atomically
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasPreview, needed_data
from aligntok.sharding import whole_weights


class Grid(Measurement):
    """Base: draws a picture every so many steps and at validation, to ``images/<name>_<step>.png`` and the loggers.

    Args:
        every_n_steps: Optimizer steps between two pictures; null draws at validation alone. Validation draws with the
            averaged weights.
    """

    needs = ()  # it draws images of its own
    on_all_ranks = False  # whether all ranks draw a share of the picture
    name = "step"
    title = ""

    def __init__(self, every_n_steps: int | None) -> None:
        check_nonnegative(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.last_step = -1

    @abstractmethod
    def picture(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor | None:
        """Return the picture (3, H, W) in [0, 1], or nothing where this module has none."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare, for training without validation too."""
        if stage != "predict":
            self.prepare(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Draw every so many optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self.last_step:
            self.start(trainer, pl_module)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw, on the first rank or on all, and write on the first."""
        if not (trainer.is_global_zero or self.on_all_ranks):
            return
        picture = self.picture(trainer, module)
        if picture is None or trainer.sanity_checking:
            return
        self.last_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "images" / f"{self.name}_{trainer.global_step:07d}.png"
        write_atomically(path, lambda temporary: save_image(picture, temporary, format="png"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(self.title, picture, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(self.title, [str(path)], step=trainer.global_step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(path), "images")


class ReconstructionGrid(Grid):
    """Originals, reconstructions and latents of the same few validation images.

    The latents' three principal components become red, green and blue; of a discrete tokenizer, those of the codes of
    the grid's tokens.

    >>> ReconstructionGrid(num_images=8).name  # writes images/step_0000500.png, ...
    'step'

    Args:
        every_n_steps: Optimizer steps between two pictures.
        num_images: Columns of the picture.
    """

    title = "image, reconstruction, latent"

    def __init__(self, every_n_steps: int | None = 500, num_images: int = 12) -> None:
        super().__init__(every_n_steps)
        check_positive(num_images=num_images)
        self.num_images = num_images

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the tokenizer and the images."""
        self.tokenizer = tokenizer_of(module, "ReconstructionGrid")
        self.data = needed_data(trainer, HasPreview, "ReconstructionGrid", "remove the callback")

    def picture(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """Return the three rows."""
        image = self.data.preview(self.num_images).to(module.device)
        with evaluation(trainer, module):
            code = self.tokenizer.encode(image)
            return rows_of(image, self.tokenizer.decode(code), latent_of(self.tokenizer, code))


class SampleGrid(Grid):
    """Samples of a generator, a row for each class; the same randomness every time.

    >>> SampleGrid(num_classes=4).name  # writes images/samples_0005000.png, ...
    'samples'

    Args:
        every_n_steps: Optimizer steps between two pictures; null draws at validation alone.
        num_classes: Rows: the first classes, at most so many.
        per_class: Columns.
    """

    on_all_ranks = True
    name = "samples"
    title = "samples, a row for each class"

    def __init__(self, every_n_steps: int | None = None, num_classes: int = 10, per_class: int = 8) -> None:
        super().__init__(every_n_steps)
        check_positive(num_classes=num_classes, per_class=per_class)
        self.num_classes, self.per_class = num_classes, per_class

    def prepare(self, trainer: pl.Trainer, module: Any) -> None:
        """Say where nothing will be drawn: a generator may train on a cache whose tokenizer is not here."""
        who = type(module).__name__
        check(hasattr(module, "sample"), f"SampleGrid needs a generator, {who} is none: remove the callback")
        if module.tokenizer is None:
            rank_zero_warn("SampleGrid draws nothing: the generator has no tokenizer to decode its samples")

    def picture(self, trainer: pl.Trainer, module: Any) -> Tensor | None:
        """Return the rows; each rank draws its share of the samples."""
        if module.tokenizer is None:
            return None
        count, world = self.num_rows(module) * self.per_class, trainer.world_size
        ids = torch.arange(trainer.global_rank, -(-count // world) * world, world) % count  # as many on every rank
        with evaluation(trainer, module), whole_weights(trainer):
            condition = self.conditions(module, ids // self.per_class)
            image = module.tokenizer.decode(module.sample(ids, condition)).float()
        if world > 1:
            image = trainer.strategy.all_gather(image).transpose(0, 1).flatten(0, 1)[:count]
        return tiled(image, self.per_class)

    def num_rows(self, module: Any) -> int:
        """Return the number of rows."""
        return min(self.num_classes, module.network.num_classes or 1)

    def conditions(self, module: Any, rows: Tensor) -> Any:
        """Return what the samples of some rows (B,) are asked to be."""
        return rows


class PromptGrid(SampleGrid):
    """Samples of a generator that reads, a row for each prompt; the same randomness every time.

    >>> PromptGrid(["two foxes", "a pizza"], per_prompt=4).per_class  # writes images/samples_0005000.png, ...
    4

    Args:
        prompts: One for each row.
        every_n_steps: Optimizer steps between two pictures; null draws at validation alone.
        per_prompt: Columns.
    """

    title = "samples, a row for each prompt"

    def __init__(self, prompts: list[str], every_n_steps: int | None = None, per_prompt: int = 4) -> None:
        super().__init__(every_n_steps, len(prompts), per_prompt)
        self.prompts = prompts

    def prepare(self, trainer: pl.Trainer, module: Any) -> None:
        """Refuse a generator that does not read these prompts."""
        super().prepare(trainer, module)
        reads = getattr(module, "text_encoder", None) is not None
        check(reads, f"PromptGrid: this {type(module).__name__} has no text_encoder: set one, or remove the callback")

    def num_rows(self, module: Any) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    def conditions(self, module: Any, rows: Tensor) -> Any:
        """Return the texts of some rows (B,)."""
        return module.text([self.prompts[row] for row in rows.tolist()])


def rows_of(image: Tensor, reconstruction: Tensor, latent: Tensor) -> Tensor:
    """Return one picture (3, H', W') with rows of images, reconstructions (B, 3, H, W) and latents (B, C, h, w)."""
    colours = interpolate(latent_colours(latent), image.shape[-2:], mode="nearest")
    return tiled(torch.cat([image, reconstruction, colours]), len(image))


def latent_of(tokenizer: Tokenizer, code: Tensor) -> Tensor:
    """Return the latent (B, C, h, w) of what a tokenizer encoded; of tokens, the codes of the grid."""
    if tokenizer.quantizer is None:
        return code
    spec = tokenizer.spec
    codes: Tensor = tokenizer.quantizer.lookup(code[:, spec.num_prefix :])
    return codes.view(*codes.shape[:2], *spec.grid)


def tiled(image: Tensor, columns: int) -> Tensor:
    """Return images (B, 3, H, W) side by side, (3, H', W'); small ones enlarged."""
    image = image.float().clamp(0, 1).cpu()
    scale = max(1, 64 // image.shape[-1])
    larger = interpolate(image, scale_factor=scale, mode="nearest")
    grid: Tensor = make_grid(larger, nrow=columns, padding=2, pad_value=1.0)
    return grid


def latent_colours(latent: Tensor) -> Tensor:
    """Return three principal components over all cells of latents (B, C, h, w), as RGB (B, 3, h, w) in [0, 1]."""
    cells = latent.float().movedim(1, -1).flatten(0, 2)
    cells = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    directions = directions[:3] * directions[:3].sum(1, keepdim=True).sign()  # so colours stay over the steps
    components: Tensor = cells @ directions.T
    low, high = components.quantile(0.02, 0), components.quantile(0.98, 0)
    components = ((components - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    components = pad(components, (0, 3 - components.shape[1]))
    return components.view(latent.shape[0], *latent.shape[2:], 3).movedim(-1, 1)
