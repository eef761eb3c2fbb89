"""Files: the atomic writer, and the hashes of files and tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from aligntok.errors import UserError

if TYPE_CHECKING:  # the report writes files without it
    from torch import Tensor


def write_atomically(path: str | Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Call ``write`` on a temporary file beside ``path`` and move it there when it is complete and on disk.

    Args:
        path: The file; its folder is made if it does not exist.
        write: Writes the file that it is given.
        shared: Several processes may write this file at the same moment: each uses its own temporary name. Otherwise
            there is one name, so that what a killed process left is overwritten.

    Raises:
        UserError: The disk is full or not writable; what was at ``path`` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError in torch.save
        raise UserError(
            f"cannot write {path} ({error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]});"
            " what was there before is untouched. Free some space, then go on with it (fit: --ckpt_path last)"
        ) from error
    finally:
        if temporary.is_file():  # not complete
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) atomically.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run" / "note.txt"
    >>> write_text(path, "done"); path.read_text()
    'done'
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, kind: Any) -> Any:
    """Return what a JSON file holds, which must be of a kind, see ``misfit``.

    Raises:
        UserError: It cannot be read, is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = misfit(content, kind)
    except OSError as error:
        problem = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        problem = f"no JSON: {str(error)[:100]}"
    if problem:
        raise UserError(f"{path} is broken ({problem}): restore it, or write it again")
    return content


def misfit(value: Any, kind: Any, key: str = "it") -> str:
    """Return, in words, what in a value of JSON or YAML is not of a kind; nothing where all is.

    >>> misfit({"size": 3, "ids": [1, None]}, {"size": int, "ids": [int], "scales": ({str: float}, None)})
    'it.ids.1 is None'

    Args:
        value: Numbers, strings, None, and lists and dicts of these; of a checkpoint tensors too.
        kind: A type or a value; ``[kind]`` for a list; ``{"key": kind}`` for a dict with these keys, among others;
            ``{str: kind}`` for one with any keys; a tuple for either of several kinds.
        key: What to call the value.
    """
    if isinstance(kind, tuple):
        fits = any(not misfit(value, one) for one in kind)
    elif isinstance(kind, (dict, list)):
        fits = isinstance(value, type(kind))
        inner: list[tuple[Any, Any, Any]] = []
        if fits and isinstance(kind, list):
            inner = [(index, part, kind[0]) for index, part in enumerate(value)]
        elif fits and isinstance(kind, dict):
            named = {name: kind[str] for name in value} if str in kind else kind
            inner = [(name, value.get(name), one) for name, one in named.items()]
        for name, part, one in inner:
            if problem := misfit(part, one, f"{key}.{name}"):
                return problem
    elif isinstance(kind, type):
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool)
    else:
        fits = type(value) is type(kind) and value == kind
    return "" if fits else f"{key} is {' '.join(repr(value).split()):.60}"


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_tensors(tensors: dict[str, Tensor], about: str = "") -> str:
    """Return a hash (16 digits) of tensors with their names, dtypes and shapes, and of the text ``about`` them."""
    import torch

    digest = hashlib.sha256(about.encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
