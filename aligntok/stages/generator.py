"""What the stages share that train a generator on what a tokenizer makes of images, and draw samples with it."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from aligntok.errors import UserError, check, check_nonnegative
from aligntok.networks.frozen import Frozen
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import HasCache, HasLabels, offered_data
from aligntok.sharding import ShardedStrategy
from aligntok.stages.optimization import Optimization
from aligntok.stages.stage import Stage
from aligntok.weights.checkpoint import build, load_strictly, read_checkpoint, rebuilding


class GeneratorStage(Stage):
    """Base of the generators: a network that learns, a frozen tokenizer that is in no checkpoint, conditions, samples.

    A subclass gives ``training_step``, ``validation_step``, ``sample`` and ``check_data``; see ``LatentDiffusion``.
    Conditions, what samples are asked to be, are labels (B,) or a ``Text``; a network has ``has_null``, ``null``,
    ``drop``, ``prepare`` and ``check_condition`` for its own kind, see ``aligntok.networks.layers.ClassConditional``.

    Args:
        network: What learns; has ``num_classes`` (none without classes), and ``has_null``.
        tokenizer: Decodes samples, and encodes images where nothing is cached; or none, on a cache.
        label_dropout: Share of conditions that become the null one, in [0, 1].
        seed: Of the samples.
        optimization: Optimizer, learning rate, weight decay.
    """

    network: Any
    sampler: Any
    guide: Frozen | None

    code = "latent"
    """What the tokenizer makes of an image, by its name in a batch: ``latent`` or ``tokens``."""

    reads_text = False
    """Whether conditions are texts, and samples are of prompts."""

    dropout_key = "label_dropout"
    """What users know the share of null conditions as."""

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer | None,
        label_dropout: float,
        seed: int,
        optimization: Optimization,
    ) -> None:
        super().__init__(optimization)
        check_nonnegative(seed=seed)
        self.network = network
        self.frozen_tokenizer = Frozen(tokenizer) if tokenizer is not None else None
        self.label_dropout, self.seed = label_dropout, seed
        self.guide = None
        self.sums: dict[str, Tensor] = {}  # of measures, by name, since they were last logged

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
    def sample(self, ids: Tensor, label: Any, sampler: Any = None) -> Tensor:
        """Return what ``tokenizer.decode`` takes: each row a function of its id (B,), its condition and the seed."""

    def sampling(self) -> dict[str, Any]:
        """Return, by name, the parts whose numbers decide on a sample beside the weights and the seed."""
        return {"sampler": self.sampler}

    def check_parts(self) -> None:
        """Raise a ``UserError`` where the parts do not fit each other: now, not at the first samples."""
        dropout, key = self.label_dropout, self.dropout_key
        check(0 <= dropout <= 1, f"{key} {dropout} is a share of the {key.split('_')[0]}s: give 0 to 1")
        check(
            not dropout or self.network.has_null,
            f"{key} {dropout} needs a null class: set network.null_class true, or {key} 0",
        )

    @abstractmethod
    def check_data(self, data: HasCache) -> None:
        """Raise a ``UserError`` where cached latents or tokens are not what the network learns."""

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the network (its EMA, where the run kept one)."""
        load_strictly(self.network, self.held("network", checkpoint, path), f"--init_from {path}")

    # Data

    def setup(self, stage: str) -> None:
        """Refuse data of another tokenizer, and classes that the network does not have."""
        super().setup(stage)
        labels, cache = offered_data(self.trainer, HasLabels), offered_data(self.trainer, HasCache)
        if labels is not None and self.network.num_classes is not None:
            labels.check_labels(self.network.num_classes, "network.num_classes")
        if stage != "predict" and cache is not None:
            self.check_data(cache)

    def configure_model(self) -> None:
        """Shard what learns, where the strategy does so; Lightning calls this before it reads a checkpoint."""
        strategy = None if self._trainer is None else self.trainer.strategy
        others = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy)
        check(not others, "trainer.strategy ModelParallelStrategy shards nothing of a generator: use sharded")
        if isinstance(strategy, ShardedStrategy) and self.trainer.state.fn == "fit":
            for part in self.children():
                if any(weight.requires_grad for weight in part.parameters()):
                    strategy.shard(part)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels that the network does not have while they are on the CPU, where looking costs nothing."""
        if self.network.num_classes is not None:
            check_below(self.network.num_classes, self.condition(batch), "label", "network.num_classes")
        return batch

    @torch.no_grad()
    def code_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the batch's latents (B, C, h, w) or tokens (B, N), cached or encoded now."""
        if self.code in batch:
            return batch[self.code]  # type: ignore[no-any-return]
        if self.tokenizer is None:
            raise UserError(f"the data holds images, no {self.code}: set tokenizer, or train on a cache")
        return self.tokenizer.encode(batch["image"])

    def condition(self, batch: dict[str, Any]) -> Any:
        """Return the conditions of a batch: its labels (B,).

        Raises:
            UserError: It has none.
        """
        check(
            "label" in batch,
            f"{type(self).__name__} needs classes, and the data have {'captions' if 'caption' in batch else 'none'}:"
            " give labelled images, or train aligntok.stages.TextDiffusion on captions",
        )
        return batch["label"]

    def drop(self, batch: dict[str, Any]) -> Any:
        """Return the conditions of a batch, some replaced by the null one."""
        condition = self.condition(batch)
        if not self.network.has_null:
            return condition
        return self.network.drop(condition, self.uniform(batch, "label") < self.label_dropout)

    # Measures

    def on_validation_epoch_end(self) -> None:
        """Log what was summed up over all images."""
        self.log_sums(self.split)

    on_test_epoch_end = on_validation_epoch_end

    def log_sums(self, split: str) -> None:
        """Log means of the sums on ``train``, ``val`` or ``test`` images; a subclass that keeps sums says how."""

    def total(self, name: str) -> Tensor | None:
        """Return sums over all ranks, if there are any, and start new ones."""
        sums = self.sums.pop(name, None)
        if sums is not None and self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    # Samples

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return ``image`` (B, 3, H, W) in [0, 1] for each ``id`` (B,) and condition, and what it was decoded from."""
        if self.tokenizer is None:
            raise UserError("samples need a decoder: set tokenizer to the tokenizer's checkpoint")
        code = self.sample(batch["id"], self.condition(batch))
        return {"image": self.tokenizer.decode(code).float(), self.code: code}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which tokenizer this generator belongs to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer_fingerprint"] = self.tokenizer_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a tokenizer with other latents or tokens; another decoder of the same ones is welcome."""
        super().on_load_checkpoint(checkpoint)
        theirs, ours = checkpoint.get("tokenizer_fingerprint"), self.tokenizer_fingerprint
        check(
            theirs is None or ours in (None, theirs),
            f"the generator has learned on tokenizer {theirs}, but tokenizer is {ours}: name the checkpoint that"
            " encoded its training images, or one whose decoder alone was refined",
        )

    def load(self, path: str | Path, ema: float | None = None) -> None:
        """Take the weights of a run of this stage: the first average, that of decay ``ema``, or 0 for none.

        Raises:
            UserError: It is of another stage, other sizes or another tokenizer, or has no such average.
        """
        checkpoint = read_checkpoint(path, ema=ema)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])


def check_below(count: int, values: Tensor, name: str, key: str) -> None:
    """Raise a ``UserError`` where numbers of a batch are not in 0 .. ``count`` - 1; the user knows count as ``key``."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
        wrong = values[(values < 0) | (values >= count)][0]
        raise UserError(f"{name} {wrong} in a batch, but {key} {count} means 0 .. {count - 1}")


def load_generator(path: str | Path, ema: float | None = None) -> GeneratorStage:
    """Rebuild a generator from a checkpoint of its run alone, with tokenizer, sampler and guidance, in eval mode.

    >>> generator = load_generator("runs/dit/checkpoints/last.ckpt")  # doctest: +SKIP
    >>> latent = generator.sample(ids=torch.arange(4), label=torch.zeros(4).long())  # doctest: +SKIP
    >>> generator.tokenizer.decode(latent)  # doctest: +SKIP

    Args:
        path: A checkpoint that ``aligntok fit`` wrote; the tokenizer's, which it names, must still be there.
        ema: Decay of the average to take, 0 for the raw weights; by default the first average.

    Raises:
        UserError: The file is no such checkpoint, or has no such average.
    """
    with rebuilding(path):
        generator = build(generator_recipe(path), GeneratorStage)
        generator.load(path, ema)
        return generator.eval()


def generator_recipe(path: str | Path) -> dict[str, Any]:
    """Return class path and arguments of the generator whose run wrote a checkpoint."""
    arguments = dict(read_checkpoint(path, weights=False).get("hyper_parameters", {}))
    class_path = arguments.pop("_class_path", None)  # so called by Lightning's command line
    known = class_path is not None
    check(known, f"{path} does not say how its generator is built: name the run's recipe with --config")
    return {"class_path": class_path, "init_args": {k: v for k, v in arguments.items() if k != "_instantiator"}}
