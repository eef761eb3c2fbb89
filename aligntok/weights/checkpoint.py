"""Reading checkpoints, and rebuilding what is in them: no code in a file is run.

An exported checkpoint is one without a run: weights and recipe in a safetensors file, read wherever a checkpoint is.
Its tensors have the names of a run's ``state_dict``; its header says which stage they are of and how its parts are
built.
"""

from __future__ import annotations

import json
import pickle
import pkgutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aligntok.errors import UserError, check, words_of
from aligntok.files import hash_tensors, misfit
from aligntok.networks.dit import DiT
from aligntok.networks.encoders import VisionEncoder
from aligntok.networks.lora import merge_lora
from aligntok.networks.tokenizer import Tokenizer
from aligntok.weights.migration import STAGE_KEY, migrate
from aligntok.weights.sharded import FILES, META, check_files, is_sharded, with_shards

SUFFIX, HEADER, FORMAT = ".safetensors", "aligntok", 1  # of exported checkpoints
TENSORS = {str: Tensor}
CONTENT = {  # of a checkpoint as far as we read it, see ``misfit``
    "state_dict": TENSORS,
    "hyper_parameters": (dict, None),
    "current_model_state": (TENSORS, None),
    "averages": ({str: TENSORS}, None),
    "averaging_state": (dict, None),
    STAGE_KEY: (str, None),
    FILES: ({str: str}, None),
}
BLOCK = 1 << 20  # bytes that are read at once
UNWRITTEN: ContextVar[Callable[[Path], dict[str, Any] | None]] = ContextVar("UNWRITTEN", default=lambda path: None)
"""For ``aligntok plan``: gives what an earlier run would save at a path where there is nothing yet."""
Module = TypeVar("Module", bound=nn.Module)


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", ema: float | None = None, weights: bool = True, optimizer: bool = False
) -> dict[str, Any]:
    """Load a training checkpoint, or an exported one (``.safetensors``), with tensors and plain values only.

    Args:
        path: The file, or the folder of a sharded run; one of an earlier version is returned as today's would be.
        map_location: Where the tensors go.
        ema: Which weights become ``state_dict``: the average of this decay, or 0 for the raw weights. By default the
            average of the run's first decay, or the raw weights of a run without one.
        weights: Whether the weights will be used: then all of the file is read and compared with its checksums first.
        optimizer: Whether its state will be used, too; a folder's is without values otherwise.

    Raises:
        UserError: There is no such file, it is no checkpoint or not what was written, it holds pickled code, or no
            average of this decay.
    """
    sharded = is_sharded(path)
    read = read_exported if Path(path).suffix == SUFFIX else read_file
    planned = None if Path(path).exists() else UNWRITTEN.get()(Path(path))
    checkpoint = planned or read(Path(path, META) if sharded else Path(path), map_location, weights)
    known = isinstance(checkpoint, dict) and "state_dict" in checkpoint
    check(known, f"{path} is no training checkpoint: it has no state_dict")
    problem = misfit(checkpoint, CONTENT)
    check(not problem, f"{path} is no training checkpoint: {problem}")
    with rebuilding(path):
        migrate(checkpoint)
    if sharded and weights:
        check_files(checkpoint, path)
        unread = {} if optimizer else {"optimizer_states": checkpoint.pop("optimizer_states")}
        empty = partial(torch.empty_like, device=map_location)
        checkpoint = with_shards(checkpoint, path, empty) | unread
    return checkpoint if ema is None else checkpoint | {"state_dict": average_of(checkpoint, ema, path)}


def average_of(checkpoint: dict[str, Any], ema: float, path: str | Path) -> dict[str, Tensor]:
    """Return the state dict with the average of decay ``ema``; 0 means the raw weights.

    Raises:
        UserError: The checkpoint holds no such average.
    """
    state: dict[str, Tensor] = dict(checkpoint["state_dict"])
    raw: dict[str, Tensor] = checkpoint.get("current_model_state", {})
    others: dict[str, dict[str, Tensor]] = checkpoint.get("averages", {})
    decays = checkpoint.get("averaging_state", {}).get("decays", [])  # Lightning's own averaging does not tell them
    if ema == 0:
        return state | raw
    held = ", ".join(str(decay) for decay in decays) or "no average whose decay it names"
    check(ema in decays, f"{path} has no average of decay {ema}; it has {held}; 0 means the raw weights")
    return state | others.get(str(ema), {})


def read_file(path: str | Path, map_location: Any = "cpu", weights: bool = True) -> Any:
    """Load what ``torch.save`` wrote, tensors and plain values only.

    A tensor's numbers are read from the file when they are used: without ``weights``, what is not used costs neither
    time nor memory. With them, the file is read once and compared with its checksums.

    Raises:
        UserError: There is no such file, it is not what was written, torch cannot read it, or it holds pickled code.
    """
    path = Path(path)
    check(not path.is_dir(), f"there is no checkpoint {path}: it is a folder, name the file in it")
    check(path.is_file(), f"there is no checkpoint {path}")
    check_intact(path, weights)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own kind on what is damaged
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):  # torch's word for code
            raise UserError(
                f"{path} is refused: it holds more than tensors and plain values, and loading it would run code. If you"
                " trust it, torch.load it with weights_only=False elsewhere and torch.save its tensors alone"
            ) from error
        raise UserError(f"{path} is no checkpoint that torch can read ({words_of(error)})") from error


def check_intact(path: Path, weights: bool = True) -> None:
    """Raise a ``UserError`` where a file is not what ``torch.save`` wrote, by the CRC-32 that it has of each tensor.

    ``torch.load`` does not look at these. Without ``weights``, only what says which tensors there are is compared.
    """
    problem = "is no checkpoint, or only half of one: give a .ckpt file that a run wrote"
    try:
        with zipfile.ZipFile(path) as file:
            problem = "is damaged, it is not what was written: copy it again, or take an earlier one (step_*.ckpt)"
            for name in file.namelist():
                if weights or name.endswith("/data.pkl"):
                    with file.open(name) as record:
                        while record.read(BLOCK):
                            pass
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} {problem}") from error


def read_exported(path: Path, map_location: Any = "cpu", weights: bool = True) -> dict[str, Any]:
    """Return what a run's checkpoint would hold: state dict, name of the stage, recipes of the stage's parts.

    Raises:
        UserError: There is no such file, it is broken or not what was written, or none of ours.
    """
    check(path.is_file(), f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt", device=str(map_location)) as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file, or only a part of one ({words_of(error)})") from error
    ours = not misfit(header, {"format": FORMAT, "stage": str, "parts": dict})
    check(ours, f"{path} holds weights, but no recipe: give a checkpoint of a run, or what `aligntok import` wrote")
    if weights and "hash" in header:  # earlier versions wrote none
        whole = header["hash"] == hash_tensors(state)
        check(whole, f"{path} is damaged, its weights are not what was written: copy it again, or import it again")
    return {"state_dict": state, STAGE_KEY: header["stage"], "hyper_parameters": header["parts"]}


def write_exported(path: Path, state: dict[str, Tensor], stage: str, parts: dict[str, Any]) -> None:
    """Write such a file from the state dict of a stage, its class name, and the recipes of its parts, as in YAML."""
    header = {"format": FORMAT, "stage": stage, "parts": parts, "hash": hash_tensors(state)}
    save_file({key: value.contiguous() for key, value in state.items()}, path, {HEADER: json.dumps(header)})


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under ``prefix.`` without it."""
    return {key.removeprefix(prefix + "."): value for key, value in state.items() if key.startswith(prefix + ".")}


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a full state dict; a ``UserError`` names what does not fit, and the file or part, ``what``, it came from."""
    check_fits(module.state_dict(), state, what, "Use the same sizes in both configs")
    module.load_state_dict(state)


def check_fits(ours: dict[str, Tensor], state: dict[str, Tensor], what: str, remedy: str) -> None:
    """Raise a ``UserError`` that names what is missing, unknown or of another shape in ``state``."""
    shapes = [
        f"{key} is {tuple(state[key].shape)} there and {tuple(value.shape)} here"
        for key, value in ours.items()
        if key in state and state[key].shape != value.shape
    ]
    missing, extra = [key for key in ours if key not in state], [key for key in state if key not in ours]
    problems = shapes + [f"{key} is missing there" for key in missing] + [f"{key} is unknown here" for key in extra]
    if problems:
        more = f", and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise UserError(f"{what} does not fit this network: {'; '.join(problems[:2])}{more}. {remedy}")


def load_tokenizer(path: str | Path, ema: float | None = None) -> Tokenizer:
    """Rebuild the tokenizer of a checkpoint, with its EMA weights where the run kept an EMA, in eval mode.

    Needs neither the YAML of the run nor the encoder's own file, and runs no Lightning.

    >>> tokenizer = load_tokenizer("runs/stage3/checkpoints/last.ckpt")  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode(image))  # doctest: +SKIP

    Args:
        path: A checkpoint that ``aligntok fit`` wrote; of a generator's, the tokenizer that it was trained on.
        ema: Decay of the average to take, 0 for the raw weights; by default the first average.

    Raises:
        UserError: The file is no such checkpoint, or has no such average.
    """
    checkpoint = read_checkpoint(path, ema=ema)
    recipe = recipe_of(checkpoint, "tokenizer", path)
    with rebuilding(path):
        if not part_of(checkpoint["state_dict"], "tokenizer"):  # a generator's checkpoint: it names the tokenizer's
            return build(recipe, Tokenizer)
        return _rebuilt(checkpoint, "tokenizer", Tokenizer, path)


def load_network(path: str | Path, ema: float | None = None) -> DiT:
    """Rebuild the network of a generator's checkpoint; arguments and errors are those of ``load_tokenizer``.

    >>> guide = load_network("runs/dit_s/checkpoints/last.ckpt")  # doctest: +SKIP
    """
    with rebuilding(path):
        return _rebuilt(read_checkpoint(path, ema=ema), "network", DiT, path)


@contextmanager
def rebuilding(path: str | Path) -> Iterator[None]:
    """Around the building of what a file says of itself: whatever its classes make of its values, it is named.

    Raises:
        UserError: In place of any other error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        raise UserError(f"{path} cannot be rebuilt: {words_of(error)}") from error


def _rebuilt(checkpoint: dict[str, Any], part: str, kind: type[Module], path: str | Path) -> Module:
    """Return a part of a checkpoint's stage with its weights, LoRA updates merged, in eval mode."""
    module = build(without_encoder_weights(recipe_of(checkpoint, part, path)), kind)
    load_strictly(module, merge_lora(part_of(checkpoint["state_dict"], part)), str(path))
    return module.eval()


def recipe_of(checkpoint: dict[str, Any], part: str, path: str | Path) -> dict[str, Any]:
    """Return the class path and arguments that a part of the checkpoint's stage was built with."""
    recipe: dict[str, Any] = (checkpoint.get("hyper_parameters") or {}).get(part, {})
    if misfit(recipe, {"class_path": str, "init_args": dict}):
        raise UserError(
            f"{path} holds no recipe of the {part} (stage {checkpoint.get(STAGE_KEY)}): give a checkpoint of a run with"
            " one, written by `aligntok fit`"
        )
    return recipe


def without_encoder_weights(recipe: Any) -> Any:
    """Return a recipe whose encoder does not load its own weights, because others will come."""
    if not isinstance(recipe, dict):
        return recipe
    plain = {key: without_encoder_weights(value) for key, value in recipe.items()}
    if "weights" in plain.get("init_args", {}) and _is_vision_encoder(recipe["class_path"]):
        plain["init_args"]["weights"] = None
    return plain


def _is_vision_encoder(class_path: str) -> bool:
    """Whether a class, of this package or another, is a ``VisionEncoder``."""
    try:
        kind = pkgutil.resolve_name(class_path)
    except (ImportError, AttributeError):  # `build` names what is not there
        return False
    return isinstance(kind, type) and issubclass(kind, VisionEncoder)


def build(recipe: dict[str, Any], kind: type[Module]) -> Module:
    """Build a module from its class paths; only subclasses of the annotated types are accepted.

    >>> adapter = {"class_path": "aligntok.networks.LinearAdapter", "init_args": {"width": 8, "latent_dim": 4}}
    >>> build(adapter, nn.Module)(torch.rand(1, 8, 2, 2)).shape
    torch.Size([1, 4, 2, 2])
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("module", type=kind)
    return cast(Module, parser.instantiate(parser.parse_object({"module": recipe})).module)
