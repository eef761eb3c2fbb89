"""The one data module of all stages and generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok import preemption
from aligntok.data.dataset import Augmentation, BatchDataset, ImageDataset, no_bad_images, reduced
from aligntok.data.loaders import (
    InOrderSampler,
    Loader,
    Position,
    ShuffledSampler,
    as_it_is,
    even_batch_size,
)
from aligntok.data.mixture import Mixture, split_holdout
from aligntok.data.order import Keys, shuffled_keys
from aligntok.data.shards import Shards
from aligntok.data.sources import (
    Batch,
    batch_source,
    crop_id,
    length,
    source_id,
    source_indices,
    spread_over,
    whole_source,
)
from aligntok.errors import UserError, check, check_nonnegative, check_positive
from aligntok.networks.encoders import pair
from aligntok.networks.text import TextEncoder
from aligntok.networks.tokenizer import Tokenizer

Source = Dataset[Any]


class LatentDataModule(pl.LightningDataModule):
    """Images, or latents or tokens that were cached, as batches for every stage.

    A batch is a dict: ``label`` (B,) or ``caption`` (B strings), ``id`` (B,), the index in its source, and ``image``
    (B, 3, H, W) in [0, 1] or ``latent`` (B, C, h, w), or both, or ``tokens`` (B, N). Loaders give bytes and bfloat16,
    which become floats on the device (``on_after_batch_transfer``), a fraction of the traffic.

    The order of training images is a function of (seed, epoch), and augmentation and the choice of a caption are one of
    (seed, epoch, index): a resumed run goes on with the very next image, with any number of workers and ranks.
    Evaluation sees each image once, in order.

    >>> from aligntok.data import Digits
    >>> data = LatentDataModule(Digits(), global_batch_size=4, image_size=8)
    >>> data.setup()
    >>> tuple(next(iter(data.train_dataloader()))["image"].shape)
    (4, 3, 8, 8)

    Args:
        train: Items (PIL image, label): ``ImageFolder``, ``Digits``, ``Shapes``, or any torchvision dataset; or items
            (PIL image, caption or list of captions): ``CaptionedFolder`` or any torch dataset of such; or
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
        predict: Dataset | Literal["train", "val", "test"] = "val",  # type: ignore[type-arg]
    ) -> None:
        super().__init__()
        check_positive(global_batch_size=global_batch_size, calibration_images=calibration_images)
        check_nonnegative(num_workers=num_workers, seed=seed)
        held = isinstance(val, Dataset) or (val is not None and 0 < val < 1)
        check(held, f"val={val}: give images, or the share of train to hold out, such as 0.1")
        self.train: Source = train
        self.val: Source | float = val
        self.test: Source | None = test
        self.predict: Source | str = predict
        self.image_size = None if image_size is None else pair(image_size)
        self.global_batch_size, self.augmentation = global_batch_size, augmentation
        self.num_workers, self.seed, self.on_bad_image = num_workers, seed, on_bad_image
        self.calibration_images = calibration_images
        self.sources: dict[str, Source] = {}
        self.datasets: dict[str, ImageDataset | BatchDataset] = {}
        self.bad_images: dict[int, Tensor] = {}  # of each whole source, also where a part of it is held out
        self.position = Position()

    # What stages and callbacks ask: aligntok.protocols

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
        return bool(self.caches)

    @property
    def has_images(self) -> bool:
        """Whether all batches hold images, be it beside cached latents."""
        return all(source.images is not None for source in self.caches.values())

    @property
    def caches(self) -> dict[str, Shards]:
        """The splits that are a cache."""
        found = {split: batch_source(source) for split, source in self.sources.items() if split != "predict"}
        return {split: source for split, source in found.items() if isinstance(source, Shards)}

    def check_latents(
        self, latent_shape: tuple[int, ...], tokenizer: Tokenizer | None, key: str = "network.latent_shape"
    ) -> None:
        """Raise a ``UserError`` where cached latents are not those of a model; images are always right.

        Args:
            latent_shape: (C, h, w) of the model.
            tokenizer: Of the model, if it has one.
            key: Name of the shape in the model, for the message.
        """
        for split, source in self.caches.items():
            source.check_rows(split, "latents", {"latent_shape": (key, tuple(latent_shape))}, tokenizer)

    def check_tokens(self, sizes: dict[str, Any], tokenizer: Tokenizer | None) -> None:
        """Raise a ``UserError`` where cached tokens are not those of a model; images are always right.

        Args:
            sizes: What the model's network expects of a ``TokenizerSpec``, by name.
            tokenizer: Of the model, if it has one.
        """
        for split, source in self.caches.items():
            expected = {name: (f"network.{name}", size) for name, size in sizes.items()}
            source.check_rows(split, "tokens", expected, tokenizer)

    def check_text(self, encoder: TextEncoder) -> None:
        """Raise a ``UserError`` where a cache has no texts, or those of another text encoder; captions are right.

        Args:
            encoder: Of the model.
        """
        for split, source in self.caches.items():
            source.check_text(split, encoder)

    def check_labels(self, num_classes: int, key: str) -> None:
        """Raise a ``UserError`` where a source has more classes than a model, as far as it can tell beforehand.

        Args:
            num_classes: Of the model.
            key: Name of that number in the model, for the message.
        """
        for split, source in self.sources.items():
            batches = batch_source(source)
            if isinstance(batches, Shards):
                captioned = batches.manifest is not None and batches.manifest.text is not None
                check(not captioned, f"{split} has captions, no classes, but this model learns {num_classes} classes")
                count = int(batches.opened.labels.max(initial=-1)) + 1
            else:
                count = getattr(batches, "num_classes", len(getattr(source, "classes", ())))
            check(count <= num_classes, f"{split} has {count} classes, but {key} is {num_classes}: change one")

    @property
    def batch_size(self) -> int:
        """Images per batch on one rank."""
        share = self.world_size * self.accumulation
        check(
            self.global_batch_size % share == 0,
            f"global_batch_size {self.global_batch_size} is not divisible by {self.world_size} devices x"
            f" {self.accumulation} accumulated batches: use a multiple of {share}",
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

    def calibration_dataloader(self) -> Iterator[Batch]:
        """Yield batches of ``calibration_images`` training images, always the same, with the crop of evaluation."""
        places = np.arange(min(self.num_images("train"), self.calibration_images))
        chosen = {index for _, index in self.keys(self.seed, -1)(places)}
        return self.on_device(self.in_order(self.dataset(self.sources["train"]), sorted(chosen)))

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
            batches = batch_source(source)
            source = batches.images if batches else source
            if source is None:
                raise UserError("train gives latents alone: name the images to compare samples with (reference)")
        dataset = ImageDataset(source, image_size, on_bad_image=self.on_bad_image)
        return crop_id(source, image_size), self.on_device(self.in_order(dataset))

    def preview(self, count: int) -> Tensor:
        """Return up to ``count`` validation images from all over the set, (count, 3, H, W) in [0, 1]."""
        batch = self.read("val", spread_over(self.num_images("val"), count))
        check("image" in batch, "val gives latents alone, but images are to be shown: give the cache its images")
        image: Tensor = batch["image"]
        return image

    def read(self, split: str, ids: Sequence[int]) -> Batch:
        """Return a batch of the images ``ids``, as evaluation sees them; the next one stands in for a bad one."""
        batch = self.dataset(self.sources[split], replace_bad=True).__getitems__(ids)
        assert batch is not None
        return self.on_after_batch_transfer(batch, 0)

    # Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        """Open the sources, once; a new trainer's run begins at the first image."""
        if "train" not in self.sources and (stage != "predict" or isinstance(self.predict, str)):
            train, val = self.train, self.val
            if isinstance(val, (int, float)):
                images = (train.opened.image_ids, train.num_images) if isinstance(train, Shards) else ()
                train, val = split_holdout(train, val, *images)
            for split, source in (("train", train), ("val", val), ("test", val if self.test is None else self.test)):
                self.open(split, source)
        if stage in ("predict", None) and "predict" not in self.sources:
            self.open("predict", self.sources[self.predict] if isinstance(self.predict, str) else self.predict)
        if stage == "fit":
            step, count = self.batch_size * self.accumulation * self.world_size, self.num_images("train")
            check(count >= step, f"{count} training images do not fill one step of global_batch_size {step}: lower it")
            # private: nothing else tells a new trainer from one that fits again and goes on; -1 before its first batch
            if self.trainer and self.trainer.fit_loop.total_batch_idx < 0:
                self.load_state_dict({"epoch": 0, "image": 0})  # before that of a checkpoint, if there is one

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented, from wherever the run stands."""
        dataset, batch_size = self.datasets["train"], self.batch_size
        sampler = ShuffledSampler(
            len(dataset),
            self.global_batch_size,
            batch_size,
            self.rank,
            self.world_size,
            self.seed,
            self.position,
            self.keys,
        )
        return self.loader(dataset, batch_size, sampler)

    def val_dataloader(self) -> Loader:
        """Each validation image once."""
        return self.in_order(self.datasets["val"])

    def test_dataloader(self) -> Loader:
        """Each test image once."""
        return self.in_order(self.datasets["test"])

    def predict_dataloader(self) -> Loader:
        """Each item of ``predict`` once, in order."""
        return self.in_order(self.datasets["predict"])

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

    # Sources, datasets, loaders

    def keys(self, seed: int, epoch: int) -> Keys:
        """Return the order of the training images in an epoch."""
        source = self.sources["train"]
        return source.keys(seed, epoch) if isinstance(source, Mixture) else shuffled_keys(length(source), seed, epoch)

    def open(self, split: str, source: Source) -> None:
        """Take a source for ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            UserError: It is missing, empty or unreadable, or its classes have other numbers than those of training.
        """
        check(length(source) > 0, f"{split} holds no image: give another dataset, or other arguments")
        self.sources[split] = source
        numbers = {str(name): label for label, name in enumerate(getattr(source, "classes", []))}
        for label, name in enumerate(self.classes if split != "predict" else []):
            if numbers.get(name, label) != label:
                raise UserError(
                    f"class '{name}' is number {label} of train, but {numbers[name]} of {split}: give both the same"
                    " class folders; empty ones count"
                )
        self.datasets[split] = dataset = self.dataset(source, training=split == "train")
        if isinstance(dataset, ImageDataset):
            try:
                dataset.check_readable()
            except UserError as error:
                raise UserError(f"{split}: {error}") from error

    def dataset(self, source: Source, training: bool = False, replace_bad: bool = False) -> ImageDataset | BatchDataset:
        """Return the items of a source: augmented for training, else as evaluation sees them."""
        batches = batch_source(source)
        if batches:
            views = batches.num_views(self.augmentation.flip) if training else 1
            return BatchDataset(source, self.seed, views, self.num_workers if batches.images is None else 0)
        augmentation, whole = self.augmentation if training else None, whole_source(source)
        bad = self.bad_images.setdefault(id(whole), no_bad_images(source))
        if augmentation and augmentation.crop == "random":
            source = reduced(source, max(self.size))
        return ImageDataset(source, self.size, augmentation, self.seed, training or replace_bad, self.on_bad_image, bad)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        if self.image_size is None:
            raise UserError("image_size is missing: images need it, only cached latents do not")
        return self.image_size

    def in_order(self, dataset: ImageDataset | BatchDataset, indices: Sequence[int] | None = None) -> Loader:
        """Return a loader of each image once over all ranks, equally many batches on each."""
        indices = range(len(dataset)) if indices is None else indices
        batch_size = even_batch_size(len(indices), self.world_size, self.batch_size)
        return self.loader(dataset, batch_size, InOrderSampler(indices, self.rank, self.world_size))

    def loader(
        self, dataset: ImageDataset | BatchDataset, batch_size: int, sampler: ShuffledSampler | InOrderSampler
    ) -> Loader:
        """Return the loader of a dataset that is read by threads, by processes, or by neither."""
        processes = 0 if dataset.num_threads else self.num_workers
        return Loader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=processes,
            worker_init_fn=preemption.ignore,
            persistent_workers=processes > 0 and isinstance(sampler, ShuffledSampler),
            collate_fn=as_it_is,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def on_device(self, loader: Loader) -> Iterator[Batch]:
        """Yield batches as a stage gets them."""
        return (self.on_after_batch_transfer(batch, 0) for batch in loader)
