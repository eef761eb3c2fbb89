"""The one data module of all stages and generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.data.batches import Batch, BatchDataset, batch_source
from aligntok.data.dataset import Augmentation, ImageDataset
from aligntok.data.loaders import EvaluationLoader, Loader, TrainLoader, as_it_is
from aligntok.data.sampler import InOrderSampler, Position, ShuffledSampler, even_batch_size, shuffled
from aligntok.data.shards import Shards
from aligntok.data.sources import (
    Indices,
    crop_id,
    length,
    reduced,
    source_id,
    source_indices,
    split_holdout,
    spread_over,
)
from aligntok.errors import UserError, check_positive
from aligntok.networks.encoders import pair
from aligntok.networks.tokenizer import Tokenizer

Source = Dataset[Any]
Split = Literal["train", "val", "test"]


class LatentDataModule(pl.LightningDataModule):
    """Images, or latents or tokens that were cached, as batches for every stage.

    A batch is a dict: ``label`` (B,), ``id`` (B,), the index in its source, and ``image`` (B, 3, H, W) in [0, 1] or
    ``latent`` (B, C, h, w), or both, or ``tokens`` (B, N). Loaders give bytes and bfloat16, which become floats
    on the device (``on_after_batch_transfer``), a fraction of the traffic.

    The order of training images is a function of (seed, epoch), and augmentation one of (seed, epoch, index): a resumed
    run goes on with the very next image, with any number of workers and ranks. Evaluation sees each image once, in
    order.

    >>> from aligntok.data.sources import Digits
    >>> data = LatentDataModule(Digits(), image_size=8, global_batch_size=4)
    >>> data.setup()
    >>> tuple(next(iter(data.train_dataloader()))["image"].shape)
    (4, 3, 8, 8)

    Args:
        train: Items (PIL image, label): ``ImageFolder``, ``Digits``, ``Shapes``, or any torchvision dataset; or
            ``LatentShards`` or ``TokenShards``.
        global_batch_size: Images per optimizer step, over all ranks and accumulated batches. Adding devices or
            ``accumulate_grad_batches`` makes the batch on a device smaller, never the recipe different.
        image_size: Height and width that the network gets, in pixels; one number for a square. Cached latents need
            none.
        val: For validation: images, or the share of ``train`` that is held out.
        test: For ``aligntok test``; by default ``val``.
        augmentation: Of training images: crop and flip.
        num_workers: Processes per rank that read images, or threads that gather latents; 0 does it in the training
            process.
        seed: Of order and augmentation.
        on_bad_image: ``skip`` (name, count and skip; more than 1 % is an error) or ``raise``.
        calibration_images: At most so many training images serve to measure latents and to fit the linear probe.
        predict: What ``aligntok predict`` takes: ``train``, ``val`` or ``test``, as evaluation sees them, or a
            source of its own.

    Raises:
        UserError: In ``setup``: no folder, no readable image, a batch size that does not divide.
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse takes any subclass of the bare class
        global_batch_size: int,
        image_size: int | tuple[int, int] | None = None,
        val: Dataset | float = 0.1,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        augmentation: Augmentation = Augmentation(),
        num_workers: int = 0,
        seed: int = 0,
        on_bad_image: Literal["skip", "raise"] = "skip",
        calibration_images: int = 10_000,
        predict: Dataset | Split = "val",  # type: ignore[type-arg]
    ) -> None:
        super().__init__()
        check_positive(global_batch_size=global_batch_size)
        self.train: Source = train
        self.val: Source | float = val
        self.test: Source | None = test
        self.predict: Source | Split = predict
        self.image_size = None if image_size is None else pair(image_size)
        self.global_batch_size, self.augmentation = global_batch_size, augmentation
        self.num_workers, self.seed, self.on_bad_image = num_workers, seed, on_bad_image
        self.calibration_images = calibration_images
        self.sources: dict[str, Source] = {}
        self.datasets: dict[str, ImageDataset | BatchDataset] = {}
        self.position = Position()

    # What others ask

    @property
    def classes(self) -> list[str]:
        """Names of the classes of the training images; empty if the source does not name any."""
        source = self.sources["train" if "train" in self.sources else "predict"]
        return [str(name) for name in getattr(source, "classes", [])]

    def num_images(self, split: str) -> int:
        """Return the number of images of ``train``, ``val``, ``test`` or ``predict``."""
        return length(self.sources[split])

    def source_indices(self, split: str, ids: Sequence[int]) -> list[int]:
        """Return the places of images ``ids`` in the source as it was given, from which a part may be held out."""
        return source_indices(self.sources[split], ids)

    def fingerprint(self, split: str) -> str:
        """Return a hash of the images that evaluation sees: their source and their crop."""
        source = self.sources[split]
        return source_id(source) if batch_source(source) else crop_id(source, self.size)

    @property
    def has_latents(self) -> bool:
        """Whether some of the data are cached latents or tokens."""
        return bool(self.cached_sources)

    @property
    def has_images(self) -> bool:
        """Whether all batches hold images, be it beside cached latents."""
        return all(source.images is not None for source in self.cached_sources.values())

    @property
    def cached_sources(self) -> dict[str, Shards]:
        """The splits that are a cache."""
        sources = {split: batch_source(self.sources[split]) for split in ("train", "val", "test")}
        return {split: source for split, source in sources.items() if isinstance(source, Shards)}

    def check_latents(
        self, latent_shape: tuple[int, ...], tokenizer: Tokenizer | None, key: str = "model.network.latent_shape"
    ) -> None:
        """Raise a ``UserError`` where cached latents are not those of a model; images are always right.

        Args:
            latent_shape: (C, h, w) of the model.
            tokenizer: Of the model, if it has one.
            key: Config key of the shape.
        """
        for split, source in self.cached_sources.items():
            source.check_latents(latent_shape, tokenizer, f"data.{split}", key)

    def check_tokens(self, sizes: dict[str, Any], tokenizer: Tokenizer | None) -> None:
        """Raise a ``UserError`` where cached tokens are not those of a model; images are always right.

        Args:
            sizes: What the model's network expects of a ``TokenizerSpec``, by name.
            tokenizer: Of the model, if it has one.
        """
        for split, source in self.cached_sources.items():
            source.check_tokens(sizes, tokenizer, f"data.{split}")

    def check_labels(self, num_classes: int, key: str) -> None:
        """Raise a ``UserError`` where a source has more classes than a model, as far as it can tell beforehand.

        Args:
            num_classes: Of the model.
            key: Config key of that number.
        """
        for split, source in self.sources.items():
            batches = batch_source(source)
            if isinstance(batches, Shards):
                count = int(batches.opened.labels.max(initial=-1)) + 1
            else:
                count = getattr(batches, "num_classes", len(getattr(source, "classes", ())))
            if count > num_classes:
                raise UserError(f"data.{split} has {count} classes, but {key} is {num_classes}: change one of the two")

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
        on_its_own = stage == "predict" and not isinstance(self.predict, str)
        if not on_its_own:
            if "train" not in self.sources:
                train, val = self.train, self.val
                if isinstance(val, (int, float)):
                    images = (train.opened.image_ids, train.num_images) if isinstance(train, Shards) else ()
                    train, val = split_holdout(train, val, *images)
                self.sources = {"train": train, "val": val, "test": val if self.test is None else self.test}
                for split in self.sources:
                    self.open(split)
            self.check_counts()
        if stage in ("predict", None) and "predict" not in self.sources:
            self.sources["predict"] = self.sources[self.predict] if isinstance(self.predict, str) else self.predict
            self.open("predict")
        if stage == "fit" and self.trainer and self.trainer.fit_loop.total_batch_idx < 0:
            self.load_state_dict({"epoch": 0, "image": 0})  # before that of a checkpoint, if there is one

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented, from wherever the run stands."""
        dataset, batch = self.datasets["train"], self.batch_size
        sampler = ShuffledSampler(
            len(dataset), self.global_batch_size, batch, self.rank, self.world_size, self.seed, self.position
        )
        loading = self.loading(dataset)
        return TrainLoader(
            dataset, batch_size=batch, sampler=sampler, persistent_workers=loading["num_workers"] > 0, **loading
        )

    def val_dataloader(self) -> Loader:
        """Each validation image once."""
        return self.in_order(self.datasets["val"])

    def test_dataloader(self) -> Loader:
        """Each test image once."""
        return self.in_order(self.datasets["test"])

    def predict_dataloader(self) -> Loader:
        """Each item of ``predict`` once, in order."""
        return self.in_order(self.datasets["predict"])

    def calibration_dataloader(self) -> Iterator[Batch]:
        """Yield batches of ``calibration_images`` training images, always the same, with the crop of evaluation."""
        chosen = shuffled(self.num_images("train"), self.seed, -1)[: self.calibration_images]
        for batch in self.in_order(self.dataset("train"), sorted(chosen)):
            yield self.on_after_batch_transfer(batch, 0)

    def reference_images(self, source: Source | None, image_size: tuple[int, int]) -> tuple[str, Iterator[Batch]]:
        """Return an id of a set of images, and the set in batches, each image once over all ranks, with ADM's crop.

        Args:
            source: The images; by default those of training.
            image_size: Height and width.

        Raises:
            UserError: The training data holds latents without images.
        """
        if source is None:
            source = self.sources["train"]
            latents: Any = batch_source(source)
            source = getattr(latents, "images", None) if latents is not None else source
            if source is None:
                raise UserError("data.train gives latents alone: name the images to compare samples with (reference)")
        dataset = ImageDataset(source, image_size, on_bad_image=self.on_bad_image)
        loader = self.in_order(dataset)
        return crop_id(source, image_size), (self.on_after_batch_transfer(batch, 0) for batch in loader)

    def preview(self, count: int) -> Tensor:
        """Return up to ``count`` validation images from all over the set, (count, 3, H, W) in [0, 1]."""
        batch = self.read("val", spread_over(self.num_images("val"), count), replace_bad=True)
        if "image" not in batch:
            raise UserError("data.val gives latents alone, but images are to be shown: add images to its init_args")
        return batch["image"]

    def read(self, split: str, ids: Sequence[int], replace_bad: bool = False) -> Batch:
        """Return a batch of the images ``ids``, as evaluation sees them."""
        dataset: Any = self.dataset(split, replace_bad=replace_bad)
        batch = dataset.__getitems__(ids)
        return self.on_after_batch_transfer(batch, 0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn images into floats in [0, 1], and latents into fp32, on the device."""
        batch = dict(batch)
        if "image" in batch and batch["image"].dtype == torch.uint8:
            batch["image"] = batch["image"].to(torch.float32, memory_format=torch.contiguous_format) / 255
        if "latent" in batch:
            batch["latent"] = batch["latent"].float()
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return where the next image of the run is."""
        return {"epoch": self.position.epoch, "image": self.position.image}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there, also with another batch size or number of ranks."""
        self.position.epoch, self.position.image = state_dict["epoch"], state_dict["image"]

    # Parts

    def open(self, split: str) -> None:
        """Open a source.

        Raises:
            UserError: It is missing, empty or unreadable, or its classes have other numbers than those of training.
        """
        if not length(self.sources[split]):
            raise UserError(f"data.{split} holds no image: give another dataset, or other arguments")
        if split != "predict":
            self.check_classes(split)
        dataset = self.dataset(split, training=split == "train")
        if isinstance(dataset, ImageDataset):
            try:
                dataset.check_readable()
            except UserError as error:
                raise UserError(f"data.{split}: {error}") from error
        self.datasets[split] = dataset

    def dataset(self, split: str, training: bool = False, replace_bad: bool = False) -> ImageDataset | BatchDataset:
        """Return the items of a source: augmented for training, else as evaluation sees them."""
        source = self.sources[split]
        batches = batch_source(source)
        if batches is not None:
            if training and self.augmentation.flip and not batches.has_mirrored:
                raise UserError(f"{batches} has no mirrored images: set augmentation.flip false, or encode some")
            plain = batches.num_views // (1 + batches.has_mirrored)
            views = 1 if not training else batches.num_views if self.augmentation.flip else plain
            return BatchDataset(source, self.seed, views, 0 if batches.needs_processes else self.num_workers)
        augmentation = self.augmentation if training else None
        if augmentation and augmentation.crop == "random":
            source = reduced(source, max(self.size))
        return ImageDataset(
            source, self.size, augmentation, self.seed, replace_bad or training, on_bad_image=self.on_bad_image
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        if self.image_size is None:
            raise UserError("data.image_size is missing: images need it, only cached latents do not")
        return self.image_size

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

    def in_order(self, dataset: ImageDataset | BatchDataset, indices: Sequence[int] | Indices | None = None) -> Loader:
        """Return a loader of each image once over all ranks, equally many batches on each."""
        indices = range(len(dataset)) if indices is None else indices
        sampler = InOrderSampler(indices, self.rank, self.world_size)
        batch_size = even_batch_size(len(indices), self.world_size, self.batch_size)
        return EvaluationLoader(dataset, batch_size=batch_size, sampler=sampler, **self.loading(dataset))

    def loading(self, dataset: ImageDataset | BatchDataset) -> dict[str, Any]:
        """Return how a loader reads."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        processes = 0 if isinstance(dataset, BatchDataset) and dataset.num_threads else self.num_workers
        return {"num_workers": processes, "collate_fn": as_it_is, "pin_memory": on_gpu}
