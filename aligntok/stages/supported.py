"""Which of Lightning's precisions and strategies a run cannot have: the reason, and what to take instead."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from aligntok.errors import UserError

COARSE = "weights in 16 bits do not move by steps of 1e-4, nor an average by 0.001: use bf16-mixed"
PRECISIONS = {  # as Lightning calls them; numbers and short names are first turned into these
    "16-mixed": "the gradients of a GAN underflow in fp16: use bf16-mixed",
    "16-true": COARSE,
    "bf16-true": COARSE,
    "64-true": "networks, noise and losses are computed in float32: use 32-true",
    "transformer-engine": "networks have none of its layers: use bf16-mixed",
    "transformer-engine-float16": "networks have none of its layers: use bf16-mixed",
}
SHORT = {"16": "16-mixed", "64": "64-true"}
SESSION = "such processes cannot go on with a run, nor give their weights back as a checkpoint: use ddp"
ONE_NODE = "its checkpoints are read by nothing else: use ddp, or for a generator that needs the room, sharded"
STRATEGIES = {  # beginnings of the names
    "ddp_spawn": SESSION,
    "ddp_fork": SESSION,
    "ddp_notebook": SESSION,
    "fsdp": "under FSDP1 each rank clips by the norm of its own shard: use ddp, or for a generator sharded (FSDP2)",
    "deepspeed": ONE_NODE,
}
CLASSES = {"FSDPStrategy": "fsdp", "DeepSpeedStrategy": "deepspeed"}


def check_precision(precision: Any, fit: bool) -> None:
    """Raise a ``UserError`` where a stage cannot train, or without ``fit`` measure, in a precision.

    >>> check_precision("bf16-mixed", fit=True)
    >>> check_precision(64, fit=False)
    Traceback (most recent call last):
    aligntok.errors.UserError: precision 64-true: networks, noise and losses are computed in float32: use 32-true
    """
    name = SHORT.get(str(precision), str(precision))
    if name in PRECISIONS and (fit or name != "16-mixed"):
        raise UserError(f"precision {name}: {PRECISIONS[name]}")


def check_strategy(strategy: Any) -> None:
    """Raise a ``UserError`` where a run cannot be spread over ranks as a config says: by a name, or a class path.

    >>> check_strategy("ddp")
    >>> check_strategy("ddp_spawn")
    Traceback (most recent call last):
    aligntok.errors.UserError: trainer.strategy ddp_spawn: such processes cannot go on with a run, nor ...
    """
    given = strategy if isinstance(strategy, Namespace) else Namespace(class_path=str(strategy))
    method = given.get("init_args", Namespace()).get("start_method")
    name = f"ddp_{method}" if method else CLASSES.get(given.class_path.rpartition(".")[2], given.class_path)
    for beginning, why in STRATEGIES.items():
        if name.startswith(beginning):
            raise UserError(f"trainer.strategy {name}: {why}")
