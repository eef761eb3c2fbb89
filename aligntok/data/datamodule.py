"""The one data module of all stages and generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aligntok.data import images
from aligntok.data.dataset import ImageDataset, Transform, collate
from aligntok.data.sampler import InOrderSampler, Position, ShuffledSampler, shuffled
from aligntok.data.sources import ImageFolder, Item, length, source_id, split_holdout
from aligntok.errors import UserError
from aligntok.networks.encoders import pair


class LatentDataModule(pl.LightningDataModule):
    """Images (later also cached latents and tokens) as batches for every stage.

    A batch is a dict: ``image`` (B, 3, H, W) in [0, 1], ``label`` (B,), ``id`` (B,): the image's index in its source. Loaders
    give bytes; the module turns them into floats on the device (``on_after_batch_transfer``), a quarter of the traffic.

    The order of training images is a function of (seed, epoch), and augmentation one of (seed, epoch, index): a resumed run
    goes on with the very next image, with any number of workers and ranks. Evaluation sees each image once, in order.

    Args:
        train: Items (PIL image, label): ``ImageFolder``, ``Digits``, ``Shapes``, or any torchvision dataset.
        image_size: Height and width that the network gets, in pixels; one number for a square.
        global_batch_size: Images per optimizer step, over all ranks and accumulated batches. Adding devices or
            ``accumulate_grad_batches`` makes the batch on a device smaller, never the recipe different.
        val: For validation; by default the held-out share of ``train``.
        test: For ``aligntok test``; by default ``val``.
        holdout: Share of ``train`` that is held out where ``val`` is missing.
        crop: In training: ``random`` (resize the shorter side, crop anywhere), ``random_resized`` (also scale and aspect), or
            ``center``. Evaluation always takes ADM's centre crop.
        crop_scale: Range of the area that ``random_resized`` keeps, as a share of the image's.
        flip: Mirror half of the training images.
        num_workers: Processes per rank that read images; 0 reads in the training process.
        seed: Of order and augmentation.
        on_bad_image: ``skip`` (name, count and skip; more than 1 % is an error) or ``raise``.
        calibration_images: At most so many training images serve to measure latents and to fit the linear probe.

    Raises:
        UserError: In ``setup``: no folder, no readable image, a batch size that does not divide.
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse takes any subclass of the bare class
        image_size: int | tuple[int, int],
        global_batch_size: int,
        val: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        holdout: float = 0.1,
        crop: Literal["random", "random_resized", "center"] = "random",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_image: Literal["skip", "raise"] = "skip",
        calibration_images: int = 10_000,
    ) -> None:
        super().__init__()
        self.sources: dict[str, Dataset[Item]] = {}
        self.given: dict[str, Dataset[Item] | None] = {"train": train, "val": val, "test": test}
        self.image_size = pair(image_size)
        self.global_batch_size, self.holdout = global_batch_size, holdout
        self.crop, self.crop_scale, self.flip = crop, crop_scale, flip
        self.num_workers, self.seed, self.on_bad_image = num_workers, seed, on_bad_image
        self.calibration_images = calibration_images
        self.datasets: dict[str, ImageDataset] = {}
        self.resumed_at = {"epoch": 0, "image": 0, "batches": 0}

    # What others ask

    @property
    def classes(self) -> list[str]:
        """Names of the classes of the training images; empty if the source does not name any."""
        return [str(name) for name in getattr(self.sources["train"], "classes", [])]

    def num_images(self, split: str) -> int:
        """Return the number of images of ``train``, ``val`` or ``test``."""
        return length(self.sources[split])

    def fingerprint(self, split: str) -> str:
        """Return a hash of the images that evaluation sees: their source and their crop."""
        text = f"{source_id(self.sources[split])} center crop {self.image_size}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def batch_size(self) -> int:
        """Images per batch on one rank."""
        share = self.world_size * self.accumulation
        if self.global_batch_size % share:
            raise UserError(
                f"data.global_batch_size {self.global_batch_size} is not divisible by {self.world_size} devices x"
                f" {self.accumulation} accumulated batches: use a multiple of {share}"
            )
        return self.global_batch_size // share

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def accumulation(self) -> int:
        """Batches per optimizer step."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    # Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        """Open the sources, once."""
        if self.datasets:
            return
        train, val = self.given["train"], self.given["val"]
        assert train is not None
        if val is None:
            train, val = split_holdout(train, self.holdout)
        self.sources = {"train": train, "val": val, "test": self.given["test"] or val}
        if self.crop == "random" and isinstance(train, ImageFolder):
            train.draft_size = max(self.image_size)
        for split, source in self.sources.items():
            transform = self.train_transform() if split == "train" else self.center_crop
            dataset = ImageDataset(source, transform, self.seed, split == "train", self.on_bad_image)
            dataset.check_readable()
            self.datasets[split] = dataset
        if self.num_images("train") < self.batch_size * self.world_size:
            raise UserError(
                f"{self.num_images('train')} training images do not fill one batch of {self.batch_size} on {self.world_size}"
                " devices: lower data.global_batch_size"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented, from wherever the run stands."""
        dataset = self.datasets["train"]
        sampler = ShuffledSampler(
            len(dataset), self.batch_size, self.rank, self.world_size, self.seed, self.position
        )
        return self.loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation image once."""
        return self.in_order(self.datasets["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        """Each test image once."""
        return self.in_order(self.datasets["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation images."""
        return self.val_dataloader()

    def calibration_dataloader(self) -> Any:
        """Yield batches of training images with the crop of evaluation: always the same ``calibration_images`` of them."""
        count = self.num_images("train")
        chosen = sorted(shuffled(count, self.seed, -1)[: self.calibration_images])
        dataset = ImageDataset(self.sources["train"], self.center_crop, self.seed, False, self.on_bad_image)
        for batch in self.in_order(dataset, chosen):
            yield self.on_after_batch_transfer(batch, 0)

    def preview(self, count: int) -> Tensor:
        """Return about ``count`` validation images from all over the set, (count, 3, H, W) in [0, 1]."""
        dataset = self.datasets["val"]
        found: list[Tensor] = []
        for index in spread_over(len(dataset), count):
            sample = dataset[index]
            if sample is not None:
                found.append(sample["image"])
        return torch.stack(found).float() / 255

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Turn bytes into floats in [0, 1], on the device."""
        if batch["image"].dtype == torch.uint8:
            batch["image"] = batch["image"].float() / 255
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return where the next image of the run is: epoch, images of that epoch taken, batches taken in the whole run."""
        epoch, batch = self.position()
        return {"epoch": epoch, "image": batch * self.batch_size * self.world_size, "batches": self.batches_taken()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there, also with another batch size or number of ranks."""
        self.resumed_at = dict(state_dict)

    # Parts

    def batches_taken(self) -> int:
        """Batches that this rank has taken since the run began."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready) if self.trainer else 0

    def position(self) -> Position:
        """Return the epoch and the number of its batches already taken."""
        batch = self.batch_size * self.world_size
        per_epoch = self.num_images("train") // batch
        taken = self.resumed_at["image"] // batch + self.batches_taken() - self.resumed_at["batches"]
        epochs, rest = divmod(taken, per_epoch)
        return self.resumed_at["epoch"] + epochs, rest

    def train_transform(self) -> Transform:
        """Return crop and flip for training."""
        crops: dict[str, Callable[..., Image.Image]] = {
            "random": images.random_crop,
            "random_resized": partial(images.random_resized_crop, scale=self.crop_scale),
        }
        crop = crops.get(self.crop)
        size, flip = self.image_size, self.flip

        def transform(image: Image.Image, generator: random.Random) -> Image.Image:
            image = crop(image, size, generator) if crop else images.center_crop(image, size)
            return images.random_flip(image, generator) if flip else image

        return transform

    def center_crop(self, image: Image.Image, generator: random.Random) -> Image.Image:
        """ADM's centre crop."""
        return images.center_crop(image, self.image_size)

    def in_order(self, dataset: ImageDataset, indices: list[int] | None = None) -> DataLoader[Any]:
        """Return a loader of each image once over all ranks."""
        indices = list(range(len(dataset))) if indices is None else indices
        return self.loader(dataset, InOrderSampler(indices, self.rank, self.world_size))

    def loader(self, dataset: ImageDataset, sampler: Any) -> DataLoader[Any]:
        """Return a loader of batches of this rank's size."""
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )


def spread_over(total: int, count: int) -> list[int]:
    """Return up to ``count`` numbers evenly spread over ``range(total)``."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


class ResumableLoader(DataLoader[Any]):
    """Tells Lightning that it resumes in mid-epoch; the position itself is the data module's."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""
