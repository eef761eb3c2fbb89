"""``aligntok plan``: what a run would take, from a build without memory; ``--check`` opens all that it needs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from aligntok.cache.manifest import CROPS
from aligntok.callbacks import EMA
from aligntok.callbacks.checkpoint import checkpoint_size
from aligntok.callbacks.progress import parameters_of
from aligntok.data import LatentDataModule
from aligntok.data.shards import Shards
from aligntok.data.sources import batch_source
from aligntok.errors import check, check_positive
from aligntok.losses import ReconstructionLoss
from aligntok.networks import checkpoint_blocks
from aligntok.networks.blocks import training_blocks
from aligntok.networks.frozen import load_frozen
from aligntok.programs.dry_step import DryStage, StepCost
from aligntok.programs.needs import counts_of, needs, problems
from aligntok.programs.parser import Parser
from aligntok.schedule import value_at
from aligntok.stages import Stage
from aligntok.stages.generator import GeneratorStage

DESCRIPTION = """\
Print what `aligntok fit` with the same configs and options would take: parameters, FLOPs, memory of a GPU, images,
disk, GPU-hours, files. Nothing is trained and no file is needed: where an earlier run of a shipped recipe has not
written its checkpoint yet, its sizes are taken from that recipe, and missing images are taken for ImageNet's.

  aligntok plan dit.yaml --gpus 8
  aligntok plan stage2.yaml --gpus 8 --nodes 4 --rate 150
  aligntok plan stage2.yaml --init_from STAGE1.ckpt --check"""

GPUS_OF_A_NODE = 8  # where the config says `auto` and this machine has none
H100, SHARE = 989e12, 0.4  # FLOP/s in bf16 by its data sheet; the share of it that a good run reaches
PRECISIONS = ("32-true", "bf16-mixed")
PARTS = ("weights", "gradients", "optimizer", "averages", "activations")


class Plan:
    """A run on so many devices, with its stage on the meta device.

    Args:
        stage: As built; measuring uses it up.
        data: The data module, not set up.
        config: Of ``fit``, as parsed, with classes by their paths.
        callbacks: As built.
        gpus: Of a node; by default the config's devices.
        nodes: By default the config's.

    Raises:
        UserError: The batch cannot be divided by so many, or stage or data are none of aligntok's.
    """

    def __init__(
        self,
        stage: Any,
        data: Any,
        config: Any,
        callbacks: list[Any],
        gpus: int | None = None,
        nodes: int | None = None,
    ) -> None:
        self.stage, self.data, self.config, trainer = stage, data, config, config.trainer
        kinds = f"{type(stage).__name__} and {type(data).__name__}"
        known = isinstance(stage, Stage) and isinstance(data, LatentDataModule)
        check(known, f"plan knows stages of aligntok on a LatentDataModule, and these are {kinds}")
        self.gpus, self.nodes = gpus or devices_of(trainer), nodes or trainer.num_nodes
        check_positive(gpus=self.gpus, nodes=self.nodes)
        self.world_size, self.accumulation = self.gpus * self.nodes, trainer.accumulate_grad_batches
        share, total = self.world_size * self.accumulation, data.global_batch_size
        self.batch = total // share
        check(
            total % share == 0,
            f"global_batch_size {total} is not divisible by {self.world_size} devices x {self.accumulation} accumulated"
            " batches: give another --gpus, or another batch",
        )
        with torch.device("meta"):
            load_frozen(stage)
        self.parameters, self.checkpoint = parameters_of(stage), checkpoint_size(stage, callbacks)
        self.trained = sum(p.nbytes for p in stage.parameters() if p.requires_grad)
        self.averages = sum(len(callback.decays) for callback in callbacks if isinstance(callback, EMA))
        sizes = (sum(p.nbytes for p in block.parameters()) for block in training_blocks(stage))
        self.largest_block = max(sizes, default=0)

    # Images

    @cached_property
    def num_images(self) -> tuple[int, str]:
        """Training images, and a word where they could not be counted."""
        count, _, note = counts_of(self.data.train)
        return count - round(count * self.data.val) if isinstance(self.data.val, float) else count, note

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        steps, epochs = self.config.trainer.max_steps, self.config.trainer.max_epochs or 0
        return int(steps) if steps > 0 else max(epochs, 0) * (self.num_images[0] // self.data.global_batch_size)

    @property
    def code(self) -> tuple[str, tuple[int, ...]] | None:
        """What of an image is cached, ``latent`` or ``tokens``, and its shape; none of a classifier."""
        if isinstance(self.stage, GeneratorStage):
            network = self.stage.network
            is_latent = self.stage.code == "latent"
            return self.stage.code, tuple(network.latent_shape) if is_latent else (network.sequence_length,)
        tokenizer = getattr(self.stage, "tokenizer", None)
        if tokenizer is None:
            return None
        spec = tokenizer.spec
        return ("latent", spec.latent_shape) if spec.kind == "continuous" else ("tokens", (spec.sequence_length,))

    @property
    def cache(self) -> int:
        """Bytes of all training images' latents in float32, or tokens in five crops, with those of mirrored images."""
        if self.code is None:
            return 0
        views = (1 + self.data.augmentation.flip) * (CROPS["ten"] * 2 if self.code[0] == "tokens" else 4)
        return int(self.num_images[0] * views * math.prod(self.code[1]))

    def batch_of(self, count: int) -> dict[str, Tensor]:
        """Return a batch as the data would give it."""
        source = batch_source(self.data.train)
        batch = {"id": torch.arange(count), "label": torch.zeros(count, dtype=torch.int64)}
        if isinstance(source, Shards) and self.code is not None:
            code, shape = self.code
            batch[code] = torch.zeros(count, *shape, dtype=torch.float32 if code == "latent" else torch.int64)
        if source is None or source.images is not None:
            batch["image"] = torch.rand(count, 3, *(self.data.image_size or self.stage.tokenizer.spec.image_size))
        return batch

    # A step

    @cached_property
    def dry(self) -> DryStage:
        """The stage without memory."""
        return DryStage(self.stage, self.batch_of)

    @cached_property
    def step(self) -> int:
        """The step that takes most: the last, or one at the start if the loss has terms then that end before."""
        loss, last = getattr(self.stage, "loss", None), max(self.steps - 1, 1)
        if not isinstance(loss, ReconstructionLoss):
            return last
        first, end = ({name for name, weight in loss.weights.items() if value_at(weight, at)} for at in (1, last))
        return (
            last if first <= end else max(1, last, key=lambda step: self.dry.cost(self.batch, step, False).activations)
        )

    def cost(self, bf16: bool) -> StepCost:
        """Return what that step takes on a device."""
        return self.dry.cost(self.batch, self.step, bf16)

    def memory(self, activations: float, sharded: bool = False, bf16: bool = False) -> dict[str, float]:
        """Return the bytes of each part on a device, with weights whole (ddp) or sharded over all devices."""
        trained = self.trained / self.world_size if sharded else self.trained
        frozen = sum(weight.nbytes for weight in self.dry.weights) - self.trained
        gathered = (1 if bf16 else 2) * self.largest_block * sharded  # the block that computes, and the next
        activations -= self.trained / 2 * (sharded and bf16)  # autocast's copies: shards are gathered in bfloat16
        buckets = self.trained if self.world_size > 1 and not sharded else 0  # DDP sends gradients from a copy
        kept = trained * state_share(self.stage.optimization.optimizer)
        sizes = (frozen + trained + gathered, trained + buckets, kept, trained * self.averages, activations)
        return dict(zip(PARTS, sizes, strict=True))


def devices_of(trainer: Any) -> int:
    """Return the devices of a node that a config asks for."""
    given = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    if isinstance(given, int) and given > 0:
        return given
    found = torch.cuda.device_count() if trainer.accelerator != "cpu" else 1
    return found or (GPUS_OF_A_NODE if trainer.accelerator == "gpu" else 1)


def state_share(optimizer: Any) -> float:
    """Return how many numbers an optimizer keeps of each weight.

    >>> state_share(torch.optim.AdamW), state_share(torch.optim.SGD)
    (2.0, 0.0)
    """
    weight = nn.Parameter(torch.zeros(32, 32))
    weight.grad = torch.zeros(32, 32)
    built = optimizer([weight])
    built.step()
    kept = [value.numel() for value in built.state[weight].values() if isinstance(value, Tensor) and value.ndim]
    return sum(kept) / weight.numel()


# The command


def parse_plan(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of ``plan`` itself, and what is left for ``fit``."""
    parser = Parser("plan", DESCRIPTION)
    parser.usage = "aligntok plan CONFIG... [--gpus N] [--nodes N] [--rate R] [--check] [options of fit]"
    parser.add_argument("--gpus", type=int, metavar="N", help="of a node; by default the config's devices")
    parser.add_argument("--nodes", type=int, metavar="N", help="by default the config's num_nodes")
    parser.add_argument("--rate", type=float, metavar="R", help="images per second of a GPU, for GPU-hours")
    parser.add_argument("--check", action="store_true", help="open all that the run needs, and list all problems")
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    options, words = parser.parse_known_args(arguments[count:])
    return options, [*(word for name in arguments[:count] for word in ("--config", name)), *words]


def report(plan: Plan, rate: float | None = None, with_problems: bool = False) -> None:
    """Print a plan.

    Raises:
        UserError: Something is missing; all of it is printed.
    """
    found: list[str] = []
    if with_problems:
        found = list(problems(plan.stage, plan.data, plan.config, plan.gpus, plan.checkpoint))
    for name, text in lines(plan, rate):
        print(f"{name:<20}{text}".rstrip(), flush=True)
    for problem in found:
        print(f"{'problem':<20}{problem}")
    check(not found, f"{len(found)} problem{'s' * (len(found) > 1)}, see above")


def lines(plan: Plan, rate: float | None) -> Iterator[tuple[str, str]]:
    """Yield the lines of a plan, each with its name."""
    (images, note), batch = plan.num_images, plan.data.global_batch_size
    yield "stage", type(plan.stage).__name__
    for part, (trained, frozen) in plan.parameters.items():
        yield f"  {part}", f"{trained:,} trained, {frozen:,} frozen parameters"
    nodes = f"{plan.nodes} nodes x " if plan.nodes > 1 else ""
    yield "global batch", f"{batch:,} = {nodes}{plan.gpus} devices x {plan.accumulation} accumulated x {plan.batch}"
    seen = plan.steps * batch
    yield "steps", f"{plan.steps:,}: {seen:,} images, {seen / images:,.1f} epochs of {images:,}{note}"
    yield "memory", "GB of a device, before compiling, which saves some:"
    yield "", f"{'':<36}{''.join(f'{name:>13}' for name in (*PARTS, 'total'))}"
    flops = 0.0
    for recompute, precision in product((False, True), PRECISIONS):
        if recompute and precision == "32-true":
            checkpoint_blocks(plan.stage)
        cost = plan.cost(precision == "bf16-mixed")
        flops = flops or cost.flops / plan.batch
        for sharded in (False, True)[: 1 + (plan.world_size > 1 and isinstance(plan.stage, GeneratorStage))]:
            sizes = plan.memory(cost.activations, sharded, precision == "bf16-mixed")
            what = f"{'sharded' if sharded else 'ddp':<9}{precision:<12}{'checkpointing' * recompute:<15}"
            yield "", what + "".join(f"{size / 1e9:13.4g}" for size in (*sizes.values(), sum(sizes.values())))
    yield "FLOPs", f"{flops / 1e9:,.1f} GFLOP per image, forward and backward"
    code = f"; the {plan.code[0]} cache of all images {plan.cache / 1e9:.1f} GB" if plan.code else ""
    yield "disk", f"{plan.checkpoint / 1e9:.2f} GB a checkpoint{code}"
    speed = rate or H100 * SHARE / flops
    why = "" if rate else f", which is {SHARE:.0%} of an H100; give your own by --rate"
    hours = seen / speed / 3600
    yield (
        "time",
        f"{hours:,.1f} GPU-hours, {hours / plan.world_size:,.1f} hours, at {speed:,.0f} images/s of a GPU{why}",
    )
    for need in needs(plan.config):
        yield "needs", f"{need.kind} {need.place}: {'here' if need.here else f'not here ({need.source})'}"
