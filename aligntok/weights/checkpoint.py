"""Reading and writing checkpoints: no file is executed, nothing half-written replaces a good file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.networks.dit import DiT
from aligntok.networks.lora import merge_lora
from aligntok.networks.tokenizer import Tokenizer
from aligntok.weights.exported import SUFFIX, read_exported

STAGE_KEY = "aligntok_stage"
Module = TypeVar("Module", bound=nn.Module)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", ema: float | None = None) -> dict[str, Any]:
    """Load a training checkpoint, or an exported one (``.safetensors``), with tensors and plain values only.

    Args:
        path: The file.
        map_location: Where the tensors go.
        ema: Which weights become ``state_dict``: the average of this decay, or 0 for the raw weights. By default the
            average of the run's first decay, or the raw weights of a run without one.

    Raises:
        UserError: There is no such file, it is no checkpoint, it holds pickled code, or no average of this decay.
    """
    if Path(path).suffix == SUFFIX:
        state, stage, parts = read_exported(Path(path), map_location)
        checkpoint: Any = {"state_dict": state, STAGE_KEY: stage, "hyper_parameters": parts}
    else:
        checkpoint = read_file(path, map_location)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no training checkpoint: it has no state_dict")
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
    if ema not in decays:
        held = ", ".join(str(decay) for decay in decays) or "no average whose decay it names"
        raise UserError(f"{path} has no average of decay {ema}; it has {held}; 0 means the raw weights")
    return state | others.get(str(ema), {})


def read_file(path: str | Path, map_location: Any = "cpu") -> Any:
    """Load what ``torch.save`` wrote, tensors and plain values only.

    A tensor's numbers are read from the file when they are used: what is not used costs neither time nor memory.

    Args:
        path: The file.
        map_location: Where the tensors go.

    Raises:
        UserError: There is no such file, torch cannot read it, or it holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}" + (": it is a folder, name the file in it" if path.is_dir() else "")
        )
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint, or only half of one: give a .ckpt file that a run wrote")
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it holds more than tensors and plain values, and loading it would run code. If you"
            " trust it, torch.load it with weights_only=False elsewhere and torch.save its tensors alone"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise UserError(
            f"{path} is no checkpoint that torch can read ({' '.join(str(error).split())[:120]})"
        ) from error


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under ``prefix.`` without it."""
    return {key.removeprefix(prefix + "."): value for key, value in state.items() if key.startswith(prefix + ".")}


def tokenizer_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tokenizer's weights in a checkpoint (the EMA, where the run kept one), LoRA updates merged."""
    return merge_lora(part_of(checkpoint["state_dict"], "tokenizer"))


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load ``state`` into ``module``; a ``UserError`` names what does not fit.

    Args:
        module: Takes the weights.
        state: Its full state dict.
        what: The file or the part, for the message.
    """
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

    Args:
        path: A checkpoint that ``aligntok fit`` wrote.
        ema: Decay of the average to take, 0 for the raw weights; by default the first average.

    Raises:
        UserError: The file is no such checkpoint, or has no such average.
    """
    checkpoint = read_checkpoint(path, ema=ema)
    recipe = recipe_of(checkpoint, "tokenizer", path)
    if "encoder" not in recipe["init_args"]:  # a generator's checkpoint: it names the tokenizer's
        return build(recipe, Tokenizer)
    tokenizer = build(without_encoder_weights(recipe), Tokenizer)
    load_strictly(tokenizer, tokenizer_state(checkpoint), str(path))
    return tokenizer.eval()


def load_network(path: str | Path, ema: float | None = None) -> DiT:
    """Rebuild the network of a generator's checkpoint, with its EMA weights where the run kept an EMA, in eval mode.

    Args:
        path: A checkpoint that ``aligntok fit`` wrote.
        ema: Decay of the average to take, 0 for the raw weights; by default the first average.

    Raises:
        UserError: The file is no such checkpoint, or has no such average.
    """
    checkpoint = read_checkpoint(path, ema=ema)
    network = build(recipe_of(checkpoint, "network", path), DiT)
    load_strictly(network, part_of(checkpoint["state_dict"], "network"), str(path))
    return network.eval()


def recipe_of(checkpoint: dict[str, Any], part: str, path: str | Path) -> dict[str, Any]:
    """Return the class path and arguments that a part of the checkpoint's stage was built with."""
    recipe = checkpoint.get("hyper_parameters", {}).get(part)
    if not isinstance(recipe, dict):
        raise UserError(
            f"{path} holds no recipe of the {part} (stage {checkpoint.get(STAGE_KEY)}): give a checkpoint of a run with"
            " one, written by `aligntok fit`"
        )
    return recipe


def without_encoder_weights(recipe: Any) -> Any:
    """Return the recipe of a tokenizer whose encoder does not load its own weights, because others will come."""
    if not isinstance(recipe, dict):
        return recipe
    plain = {key: without_encoder_weights(value) for key, value in recipe.items()}
    if str(recipe.get("class_path")).endswith(".VisionEncoder"):
        plain["init_args"]["weights"] = None
    return plain


def build(recipe: dict[str, Any], kind: type[Module]) -> Module:
    """Build a module from its class paths; only subclasses of the annotated types are accepted."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("module", type=kind)
    return cast(Module, parser.instantiate(parser.parse_object({"module": current_names(recipe)})).module)


def current_names(recipe: Any) -> Any:
    """Return a recipe with the arguments' names of today: older checkpoints say ``checkpoint_activations``."""
    if isinstance(recipe, list):
        return [current_names(value) for value in recipe]
    if not isinstance(recipe, dict):
        return recipe
    names = {"checkpoint_activations": "gradient_checkpointing"}
    return {names.get(key, key): current_names(value) for key, value in recipe.items()}
