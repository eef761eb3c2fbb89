"""A checkpoint without a run: weights and recipe in one safetensors file, read wherever a checkpoint is.

The tensors have the names of a run's ``state_dict``; the header says which stage they are of and how its parts are
built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligntok.errors import UserError

SUFFIX = ".safetensors"
HEADER = "aligntok"
FORMAT = 1


def read_exported(path: Path, map_location: Any = "cpu") -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Return the state dict of an exported file, its stage, and the recipes of the stage's parts.

    Raises:
        UserError: There is no such file, it is broken, or none of ours.
    """
    try:
        with safe_open(path, "pt", device=str(map_location)) as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no safetensors file, or only a part of one ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(
            f"{path} holds weights, but no recipe: give a checkpoint of a run, or what `aligntok import` wrote"
        )
    return state, str(header["stage"]), dict(header["parts"])


def write_exported(path: Path, state: dict[str, Tensor], stage: str, parts: dict[str, Any]) -> None:
    """Write such a file.

    Args:
        path: Ends in ``.safetensors``.
        state: Names as in a run's ``state_dict``.
        stage: Name of its class.
        parts: Class path and arguments of each part, as in YAML.
    """
    header = {"format": FORMAT, "stage": stage, "parts": parts}
    save_file({key: value.contiguous() for key, value in state.items()}, path, {HEADER: json.dumps(header)})
