"""What the stages share that train a generator on what a tokenizer makes of images, and draw samples with it."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.networks.frozen import Frozen
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasCache, HasLabels, offered_data
from aligntok.stages.optimization import Optimization
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import build, load_strictly, read_checkpoint


class GeneratorStage(Stage):
    """Base of the generators: a network that learns, a tokenizer that is frozen and in no checkpoint, labels, samples.

    Args:
        network: What learns; has ``num_classes`` (none without classes), ``null_label`` and ``check_labels``.
        tokenizer: Decodes samples, and encodes images where nothing is cached; or none, on a cache.
        label_dropout: Share of labels that become the null class, in [0, 1].
        seed: Of the samples.
        optimization: Optimizer, learning rate, weight decay.
    """

    network: Any
    sampler: Any
    guide: Frozen | None

    learns = "latents"  # what messages call that which the tokenizer makes

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer | None,
        label_dropout: float,
        seed: int,
        optimization: Optimization,
    ) -> None:
        super().__init__(optimization)
        self.network = network
        self.frozen_tokenizer = Frozen(tokenizer) if tokenizer is not None else None
        self.label_dropout, self.seed = label_dropout, seed
        self.guide = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that decodes, if there is one."""
        return None if self.frozen_tokenizer is None else self.frozen_tokenizer.network

    @cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """Hash of the weights that shape latents or tokens, which never change here."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint()

    # What a generator says of itself

    @abstractmethod
    def sample(self, ids: Tensor, label: Tensor, sampler: Any = None) -> Tensor:
        """Return what ``tokenizer.decode`` takes: each row a function of its id (B,), its label (B,) and the seed."""

    def sampling(self) -> dict[str, Any]:
        """Return, by name, the parts whose numbers decide on a sample beside the weights and the seed."""
        return {"sampler": self.sampler}

    def check_parts(self) -> None:
        """Raise a ``UserError`` where the parts do not fit each other: now, not at the first samples."""
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout {self.label_dropout} is a share of the labels: give 0 to 1")
        if self.label_dropout and self.network.null_label is None:
            raise UserError(
                f"label_dropout {self.label_dropout} needs a null class: set network.null_class true, or"
                " label_dropout 0"
            )

    @abstractmethod
    def check_data(self, data: HasCache) -> None:
        """Raise a ``UserError`` where cached latents or tokens are not what the network learns."""

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the network (its EMA, where the run kept one)."""
        load_strictly(self.network, self.held("network", checkpoint, path), f"--init_from {path}")

    # Labels

    def setup(self, stage: str) -> None:
        """Refuse data of another tokenizer, and classes that the network does not have."""
        super().setup(stage)
        labels, cache = offered_data(self.trainer, HasLabels), offered_data(self.trainer, HasCache)
        if labels is not None and self.network.num_classes is not None:
            labels.check_labels(self.network.num_classes, "network.num_classes")
        if stage != "predict" and cache is not None:
            self.check_data(cache)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels that the network does not have while they are on the CPU, where looking costs nothing."""
        label, count = batch["label"], self.network.num_classes
        if count is not None and len(label) and not 0 <= int(label.min()) <= int(label.max()) < count:
            wrong = label[(label < 0) | (label >= count)][0]
            raise UserError(f"label {wrong} in a batch, but network.num_classes {count} means 0 .. {count - 1}")
        return batch

    def drop(self, batch: dict[str, Any]) -> Tensor:
        """Return the labels (B,) of a batch, some replaced by the null class."""
        label: Tensor = batch["label"]
        if self.network.null_label is None:
            return label
        dropped = self.uniform(batch, "label") < self.label_dropout
        return torch.where(dropped, self.network.null_label, label)

    # Samples

    def decoded(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) in [0, 1] for each ``id`` and ``label`` (B,), and what they were decoded from."""
        if self.tokenizer is None:
            raise UserError("samples need a decoder: set tokenizer to the tokenizer's checkpoint")
        code = self.sample(batch["id"], batch["label"])
        return self.tokenizer.decode(code).float(), code

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which tokenizer this generator belongs to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer_fingerprint"] = self.tokenizer_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a tokenizer with other latents or tokens; another decoder of the same ones is welcome."""
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint.get("tokenizer_fingerprint")
        ours = self.tokenizer_fingerprint
        if theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"the generator learned the {self.learns} of tokenizer {theirs}, but tokenizer is {ours}: name"
                f" the checkpoint that the {self.learns} came from, or one whose decoder alone was refined"
            )

    def load(self, path: str | Path, ema: float | None = None) -> None:
        """Take the weights of a run of this stage: the first average, that of decay ``ema``, or 0 for none.

        Raises:
            UserError: It is of another stage, other sizes or another tokenizer, or has no such average.
        """
        checkpoint = read_checkpoint(path, ema=ema)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])


def load_generator(path: str | Path, ema: float | None = None) -> GeneratorStage:
    """Rebuild a generator from a checkpoint of its run alone, with tokenizer, sampler and guidance, in eval mode.

    Args:
        path: A checkpoint that ``aligntok fit`` wrote; the tokenizer's, which it names, must still be there.
        ema: Decay of the average to take, 0 for the raw weights; by default the first average.

    Raises:
        UserError: The file is no such checkpoint, or has no such average.
    """
    generator = build(generator_recipe(path), GeneratorStage)
    generator.load(path, ema)
    return generator.eval()


def generator_recipe(path: str | Path) -> dict[str, Any]:
    """Return class path and arguments of the generator whose run wrote a checkpoint."""
    arguments = {key: value for key, value in read_checkpoint(path).get("hyper_parameters", {}).items()}
    class_path = arguments.pop("_class_path", None)  # so called by Lightning's command line
    if class_path is None:
        raise UserError(f"{path} does not say how its generator is built: name the run's recipe with --config")
    return {"class_path": class_path, "init_args": {k: v for k, v in arguments.items() if k != "_instantiator"}}
