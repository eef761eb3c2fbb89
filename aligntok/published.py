"""Published weights: found in ``$ALIGNTOK_HOME``, then in torch's cache, else downloaded."""

from __future__ import annotations

import http.client
import os
from pathlib import Path

import torch
from torch import Tensor

from aligntok.errors import UserError


def find_published(url: str) -> Path | None:
    """Return where the file of this address is on this machine, or ``None``."""
    return next((path for path in _places(url) if path.is_file()), None)


def published_file(url: str, needed_by: str, remedy: str = "") -> Path:
    """Return the local path of published weights, downloaded if they are nowhere.

    Args:
        url: Their address; a name that ends in ``-<first digits of the SHA-256>.pth`` is checked.
        needed_by: Who needs them, for the message.
        remedy: What else the user can do, for the message.

    Raises:
        UserError: They are nowhere and cannot be downloaded.
    """
    if (found := find_published(url)) is not None:
        return found
    path, stem = _places(url)[0], url.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"{needed_by} needs {path.name} and cannot download it ({error}): put the file into $ALIGNTOK_HOME or"
            f" {_places(url)[-1].parent}{remedy}"
        ) from error
    return path


def published_state(url: str, needed_by: str, remedy: str = "") -> dict[str, Tensor]:
    """Return the state dict of published weights.

    Raises:
        UserError: As ``published_file``, or the file holds something else.
    """
    path = published_file(url, needed_by, remedy)
    try:
        state: dict[str, Tensor] = torch.load(path, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own kind
        raise UserError(f"{path} holds no weights ({type(error).__name__}): delete it and put {url} there") from error
    return state


def _places(url: str) -> list[Path]:
    """Return where the file may be."""
    home = os.environ.get("ALIGNTOK_HOME")
    folders = [Path(home).expanduser()] if home else []
    return [folder / url.rsplit("/", 1)[-1] for folder in [*folders, Path(torch.hub.get_dir()) / "checkpoints"]]
