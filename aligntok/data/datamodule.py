"""The one data module of all stages and generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aligntok.data import images
from aligntok.data.dataset import ImageDataset, Transform, collate
from aligntok.data.sampler import InOrderSampler, Position, ShuffledSampler, even_batch_size, shuffled
from aligntok.data.sources import Indices, Item, length, reduced, source_id, split_holdout, spread_over
from aligntok.errors import UserError
from aligntok.networks.encoders import pair

Batch = dict[str, Tensor]
WHOLE_RANGE = (0.08, 1.0)  # torchvision's RandomResizedCrop


class LatentDataModule(pl.LightningDataModule):
    """Images (later also cached latents and tokens) as batches for every stage.

    A batch is a dict: ``image`` (B, 3, H, W) in [0, 1], ``label`` (B,), ``id`` (B,): the image's index in its source.
    Loaders give bytes, which become floats on the device (``on_after_batch_transfer``), a quarter of the traffic.

    The order of training images is a function of (seed, epoch), and augmentation one of (seed, epoch, index): a resumed
    run goes on with the very next image, with any number of workers and ranks. Evaluation sees each image once, in
    order.

    Args:
        train: Items (PIL image, label): ``ImageFolder``, ``Digits``, ``Shapes``, or any torchvision dataset.
        image_size: Height and width that the network gets, in pixels; one number for a square.
        global_batch_size: Images per optimizer step, over all ranks and accumulated batches. Adding devices or
            ``accumulate_grad_batches`` makes the batch on a device smaller, never the recipe different.
        val: For validation; by default the held-out share of ``train``.
        test: For ``aligntok test``; by default ``val``.
        holdout: Share of ``train`` that is held out where ``val`` is missing.
        crop: In training: ``random`` (resize the shorter side, crop anywhere), ``random_resized`` (also scale and
            aspect), or ``center``. Evaluation always takes ADM's centre crop.
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
        crop_scale: tuple[float, float] = WHOLE_RANGE,
        flip: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_image: Literal["skip", "raise"] = "skip",
        calibration_images: int = 10_000,
    ) -> None:
        super().__init__()
        if tuple(crop_scale) != WHOLE_RANGE and crop != "random_resized":
            raise UserError(f"data.crop_scale {crop_scale} has no effect on data.crop {crop}: leave it out")
        self.given: tuple[Dataset[Item], Dataset[Item] | None, Dataset[Item] | None] = (train, val, test)
        self.image_size = pair(image_size)
        self.global_batch_size, self.holdout = global_batch_size, holdout
        self.crop, self.crop_scale, self.flip = crop, crop_scale, flip
        self.num_workers, self.seed, self.on_bad_image = num_workers, seed, on_bad_image
        self.calibration_images = calibration_images
        self.sources: dict[str, Dataset[Item]] = {}
        self.datasets: dict[str, ImageDataset] = {}
        self.position = Position()

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
        if self.global_batch_size < 1 or self.global_batch_size % share:
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
        """Open the sources, once; a new trainer's run begins at the first image."""
        if not self.datasets:
            self.open()
        self.check_counts()
        if stage == "fit" and self.trainer and self.trainer.fit_loop.total_batch_idx < 0:
            self.load_state_dict({"epoch": 0, "image": 0})  # before that of a checkpoint, if there is one

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented, from wherever the run stands."""
        dataset, batch = self.datasets["train"], self.batch_size
        sampler = ShuffledSampler(
            len(dataset), self.global_batch_size, batch, self.rank, self.world_size, self.seed, self.position
        )
        return TrainLoader(
            dataset, batch_size=batch, sampler=sampler, persistent_workers=self.num_workers > 0, **self.loading
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation image once."""
        return self.in_order(self.datasets["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        """Each test image once."""
        return self.in_order(self.datasets["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation images."""
        return self.val_dataloader()

    def calibration_dataloader(self) -> Iterator[Batch]:
        """Yield batches of ``calibration_images`` training images, always the same, with the crop of evaluation."""
        chosen = shuffled(self.num_images("train"), self.seed, -1)[: self.calibration_images]
        dataset = ImageDataset(self.sources["train"], self.center_crop, self.seed, False, self.on_bad_image)
        for batch in self.in_order(dataset, sorted(chosen)):
            yield self.on_after_batch_transfer(batch, 0)

    def preview(self, count: int) -> Tensor:
        """Return up to ``count`` validation images from all over the set, (count, 3, H, W) in [0, 1]."""
        dataset = ImageDataset(self.sources["val"], self.center_crop, self.seed, True, self.on_bad_image)
        batch = collate([dataset[index] for index in spread_over(len(dataset), count)])
        assert batch is not None  # a bad image is replaced
        return self.on_after_batch_transfer(batch, 0)["image"]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn bytes into floats in [0, 1], on the device."""
        image = batch["image"]
        if image.dtype == torch.uint8:
            image = image.to(torch.float32, memory_format=torch.contiguous_format) / 255
        return {**batch, "image": image}

    def state_dict(self) -> dict[str, int]:
        """Return where the next image of the run is."""
        return {"epoch": self.position.epoch, "image": self.position.image}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there, also with another batch size or number of ranks."""
        self.position.epoch, self.position.image = state_dict["epoch"], state_dict["image"]

    # Parts

    def open(self) -> None:
        """Open the sources.

        Raises:
            UserError: One of them is missing, empty or unreadable, or the classes have different numbers.
        """
        train, val, test = self.given
        if val is None:
            train, val = split_holdout(train, self.holdout)
        self.sources = {"train": train, "val": val, "test": val if test is None else test}
        for split, source in self.sources.items():
            if not length(source):
                raise UserError(f"data.{split} holds no image: give another dataset, or other arguments")
            self.check_classes(split)
            training = split == "train"
            if training and self.crop == "random":
                source = reduced(source, max(self.image_size))
            transform = self.train_transform() if training else self.center_crop
            dataset = ImageDataset(source, transform, self.seed, training, self.on_bad_image)
            try:
                dataset.check_readable()
            except UserError as error:
                raise UserError(f"data.{split}: {error}") from error
            self.datasets[split] = dataset

    def check_counts(self) -> None:
        """Raise a ``UserError`` where the images do not fill a step, or not every device has one to evaluate."""
        count = self.num_images("train")
        if count < self.batch_size * self.accumulation * self.world_size:
            raise UserError(
                f"{count} training images do not fill one step of data.global_batch_size {self.global_batch_size}:"
                " lower it"
            )
        for split in ("val", "test"):
            if self.num_images(split) < self.world_size:
                raise UserError(
                    f"{self.num_images(split)} images of data.{split} on {self.world_size} devices: use as many images"
                )

    def check_classes(self, split: str) -> None:
        """Raise a ``UserError`` where a class of training has another number in ``split``."""
        numbers = {str(name): label for label, name in enumerate(getattr(self.sources[split], "classes", []))}
        for label, name in enumerate(self.classes):
            if numbers.get(name, label) != label:
                raise UserError(
                    f"class '{name}' is number {label} of data.train, but {numbers[name]} of data.{split}: give"
                    " both the same class folders; empty ones count"
                )

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

    def in_order(self, dataset: ImageDataset, indices: Sequence[int] | Indices | None = None) -> DataLoader[Any]:
        """Return a loader of each image once over all ranks, equally many batches on each."""
        indices = range(len(dataset)) if indices is None else indices
        sampler = InOrderSampler(indices, self.rank, self.world_size)
        batch_size = even_batch_size(len(indices), self.world_size, self.batch_size)
        return EvaluationLoader(dataset, batch_size=batch_size, sampler=sampler, **self.loading)

    @property
    def loading(self) -> dict[str, Any]:
        """How every loader reads."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"num_workers": self.num_workers, "collate_fn": collate, "pin_memory": on_gpu}


class TrainLoader(DataLoader[Any]):
    """Batches from wherever the run stands; a pass has as many as an epoch, and may run into the next one.

    The position is kept by the data module, and counts batches handed out, not those that workers have read ahead.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begin at the first ``next``: Lightning asks for an iterator before it restores a checkpoint."""
        if not isinstance(self.sampler, ShuffledSampler):  # Lightning's overfit_batches puts in its own
            yield from super().__iter__()
            return
        # workers go on reading where the last pass ended: no wait at the start of an epoch
        batches = super().__iter__() if self._iterator is None else self._iterator
        for _ in range(len(self)):
            batch = next(batches)
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; that there is this method tells Lightning that a run can resume in mid-epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


class EvaluationLoader(DataLoader[Any]):
    """Leaves out a batch without any readable image."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches."""
        for batch in super().__iter__():
            if batch is not None:
                yield batch
            elif isinstance(self.sampler, InOrderSampler) and self.sampler.num_replicas > 1:
                raise UserError("no image of a whole evaluation batch can be read: remove the files named above")
