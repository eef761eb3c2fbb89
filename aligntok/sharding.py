"""Weights in pieces on the ranks while a generator trains (FSDP2), and checkpoints of these pieces."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_shard

from aligntok.decoding import release
from aligntok.errors import UserError, check, check_positive
from aligntok.files import name_again, write_atomically, writing
from aligntok.networks.blocks import compile_blocks, training_blocks
from aligntok.weights.checkpoint import read_checkpoint
from aligntok.weights.sharded import META, check_files, is_sharded, replaced, with_shards, write_shards

LAST = "last.ckpt"


class ShardedStrategy(ModelParallelStrategy):
    """Shards weights, gradients, averages and the optimizer's state over the ranks, block by block (FSDP2).

    For generators whose state does not fit on one GPU: with gradient, Adam and average a weight takes 20 bytes. Blocks
    are those of ``compile_blocks``; under ``bf16-mixed`` their weights travel in bf16. A checkpoint is a folder that
    any number of ranks reads, see ``aligntok.weights.sharded``. In validation each rank holds all weights.

    ``--trainer.strategy sharded``, or with arguments, in YAML under ``trainer.strategy``,
    ``class_path: aligntok.sharding.ShardedStrategy`` and ``init_args: {shards: 8}``.

    >>> ShardedStrategy(shards=8).shards  # 8 neighbouring ranks hold one copy
    8

    Args:
        shards: Ranks that together hold one copy of the weights; null for all. With the GPUs of a node, 8, weights
            travel inside nodes and gradients alone between them (HSDP).
        process_group_backend: Null for NCCL on GPUs, Gloo on CPUs.
        timeout: After which ranks that wait for another one give up.

    Reference:
        Zhao et al., PyTorch FSDP, arXiv:2304.11277.
    """

    def __init__(
        self,
        shards: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        check_positive(shards=shards)
        check(torch.__version__ >= "2.9", "trainer.strategy sharded needs torch 2.9: pip install -U torch")
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.shards = shards
        self.plain: dict[nn.Module, Any] = {}  # modules without weights, of each sharded one
        self.validation = ExitStack()

    # What a checkpoint holds, and when it is read, is as in any other strategy
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    distributed_sampler_kwargs = DDPStrategy.distributed_sampler_kwargs

    def setup_environment(self) -> None:
        """Join the other ranks.

        Raises:
            UserError: The module cannot be sharded; the number of ranks does not fit.
        """
        check(
            is_overridden("configure_model", self.lightning_module),
            f"trainer.strategy sharded: {type(self.lightning_module).__name__} cannot be sharded. A tokenizer's losses"
            " take gradients at single weights, and codes and statistics change in place: remove trainer.strategy",
        )
        self._setup_distributed()
        shards = self.shards or self.world_size
        check(
            self.world_size % shards == 0,
            f"trainer.strategy: shards={shards} does not divide the {self.world_size} ranks: give a divisor, or null",
        )
        replicas = self.world_size // shards
        sizes, names = ((replicas, shards), ("replicas", "shards")) if replicas > 1 else ((shards,), ("shards",))
        self._device_mesh: DeviceMesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    @property
    def placements(self) -> list[Placement]:
        """How a tensor lies on the ranks: cut along its first axis, as FSDP2 does."""
        return [Shard(0)] if self.device_mesh.ndim == 1 else [Replicate(), Shard(0)]

    def shard(self, module: nn.Module) -> None:
        """Shard what learns in a module, in place, each block on its own; a second call changes nothing."""
        if isinstance(module, FSDPModule):
            return
        weights = {id(parameter): empty_like(parameter) for parameter in module.parameters()}
        self.plain[module] = copy.deepcopy(module, weights).eval()
        frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
        sharded = partial(fully_shard, mesh=self.device_mesh, ignored_params=frozen)
        policy = MixedPrecisionPolicy()
        if self.precision_plugin.precision == "bf16-mixed":  # inputs stay as autocast makes them
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in list(training_blocks(module)):
            sharded(block, mp_policy=policy)
        sharded(module, reshard_after_forward=False)
        for name in getattr(module, "other_forwards", ()):
            register_fsdp_forward_method(module, name)

    # Validation

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Put plain modules with all weights in the place of the sharded ones; inside of another one, do nothing.

        All ranks enter together; inside, each may compute what it likes without waiting for the others.
        """
        stage: Any = self.lightning_module
        sharded = {name: child for name, child in stage.named_children() if child in self.plain}
        for name, child in sharded.items():
            plain = self.plain[child]
            state = {key: whole_tensor(value) for key, value in child.state_dict().items()}
            plain.load_state_dict(state, assign=True)
            setattr(stage, name, plain.to(self.root_device))
            if is_compiled(child) and not is_compiled(plain):
                compile_blocks(plain)
        try:
            yield
        finally:
            for name, child in sharded.items():
                setattr(stage, name, child)
                plain = self.plain[child]
                release(plain)  # what drawing samples has kept
                empty = {key: empty_like(value) for key, value in plain.state_dict().items()}
                plain.load_state_dict(empty, assign=True)

    def on_validation_start(self) -> None:
        """Measure and draw samples with plain networks."""
        self.validation = ExitStack()
        self.validation.enter_context(self.whole())

    def on_validation_end(self) -> None:
        """Go back to pieces."""
        self.validation.close()

    # Checkpoints

    def together(self, function: Callable[[], object]) -> None:
        """Call a function on each rank; what it raises on one, a ``UserError``, is raised on all: none waits for it."""
        problem = ""
        try:
            function()
        except UserError as error:
            problem = str(error)
        problems: list[Any] = [None] * self.world_size
        dist.all_gather_object(problems, problem)
        check(not any(problems), next(filter(None, problems), ""))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the pieces, also of a run that a signal ends in its validation."""
        self.validation.close()
        return Strategy.lightning_module_state_dict(self)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, all ranks together; the old one stays until the new one is whole.

        Args:
            checkpoint: As of any other strategy, with pieces for tensors.
            filepath: The folder, or the link to it.
            storage_options: ``{"also": [path]}`` as of ``AtomicCheckpointIO``; the step waits for the write.

        Raises:
            UserError: On all ranks, where one of them cannot write.
        """
        path, also = Path(filepath), (storage_options or {}).get("also", [])
        folder = path.with_name(f".{path.name}.partial")
        first = self.is_global_zero
        self.together(lambda: shutil.rmtree(folder, ignore_errors=True) if first else None)
        with writing(path):
            meta = write_shards(checkpoint, folder)
        self.together(lambda: publish(meta, folder, path, also) if first else None)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this strategy or any other: of sharded weights, the pieces of this rank."""
        module: Any = self.lightning_module
        ours = {name for name, value in module.named_parameters() if isinstance(value, DTensor)}
        if not ours or not is_sharded(checkpoint_path):
            checkpoint = Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        else:
            checkpoint = read_checkpoint(checkpoint_path, weights=False)
            share = slice(self.global_rank, None, self.world_size)
            self.together(lambda: check_files(checkpoint, checkpoint_path, share))
            checkpoint = with_shards(checkpoint, checkpoint_path, self.empty)

        def piece(key: str, value: Tensor) -> Tensor:
            learned = key.rpartition("/")[2] in ours or (key.startswith("optimizer_states/") and value.ndim > 0)
            if isinstance(value, DTensor) or not learned:
                return value
            return distribute_tensor(value.to(self.root_device), self.device_mesh, self.placements, src_data_rank=None)

        return replaced(checkpoint, piece) if ours else checkpoint

    def empty(self, value: Tensor) -> Tensor:
        """Return this rank's piece of a tensor, without values yet."""
        return empty_shard(value.shape, dtype=value.dtype, device_mesh=self.device_mesh, placements=self.placements)


StrategyRegistry.register("sharded", ShardedStrategy, "FSDP2 for generators")


def publish(meta: dict[str, Any], folder: Path, path: Path, also: Sequence[Path] = ()) -> None:
    """Complete a folder of pieces with the rest of a checkpoint, and let it be the one at ``path``, and others too.

    A kill leaves the old one or the new one, whole. ``last.ckpt`` is a link to a folder: a link can be replaced in
    one act.

    Raises:
        UserError: The disk is full or not writable.
    """
    write_atomically(folder / META, lambda temporary: torch.save(meta, temporary))
    with writing(path):
        for name in also:
            name_again(folder, name)
        if path.name != LAST:
            shutil.rmtree(path, ignore_errors=True)
            folder.rename(path)
            return
        version = path.with_name(f"last_{meta['global_step']:07d}")
        while version.exists():
            version = version.with_name(f"{version.name}_")
        folder.rename(version)
        point_to(version, path)


def point_to(version: Path, path: Path) -> None:
    """Let a link lead to a folder, and remove those that it led to before."""
    if path.is_dir() and not path.is_symlink():  # somebody copied the run with what its links name
        path.rename(path.with_name("last_0"))
    temporary = path.with_name(f".{path.name}.link.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(version.name)
    os.replace(temporary, path)
    for former in path.parent.glob("last_[0-9]*"):
        if former != version:
            shutil.rmtree(former)


def whole_weights(trainer: Any) -> AbstractContextManager[None]:
    """Around what a callback computes with a network outside of validation, on all ranks: it is whole there."""
    strategy = trainer.strategy
    return strategy.whole() if isinstance(strategy, ShardedStrategy) else nullcontext()


def whole_tensor(value: Tensor) -> Tensor:
    """Return a tensor with the pieces of all ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def empty_like(value: Tensor) -> Tensor:
    """Return a tensor without values, a parameter of a parameter."""
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def is_compiled(module: nn.Module) -> bool:
    """Whether a block of it was compiled."""
    return any(part._compiled_call_impl is not None for part in module.modules())
