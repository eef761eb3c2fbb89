"""Files: the atomic writer, and the hashes of files and tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
