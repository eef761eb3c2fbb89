"""Published weights: found in ``$ALIGNTOK_HOME``, then in torch's cache, else downloaded."""

from __future__ import annotations

import http.client
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check


def find_published(url: str) -> Path | None:
    """Return where the file of this address, or of this name, is on this machine, or ``None``."""
    return next((path for path in _places(url) if path.is_file()), None)


def published_file(
    url: str, needed_by: str, remedy: str = "", given: str | None = None, name: str | None = None
) -> Path:
    """Return the local path of published weights: the user's own, else one that is found, else downloaded.

    Args:
        url: Their address.
        needed_by: Who needs them, for the message.
        remedy: What else the user can do, for the message.
        given: The path that the user gave.
        name: Of the file, where it is not the end of the address; one that ends in ``-<first digits of the SHA-256>``
            before its suffix is checked after the download.

    Raises:
        UserError: There is no file ``given``, or they are nowhere and cannot be downloaded.
    """
    name = name or url.rsplit("/", 1)[-1]
    if given is not None:
        path = Path(given).expanduser()
        check(path.is_file(), f"{needed_by}: weights not found: {path}; it should be {name}")
        return path
    if (found := find_published(name)) is not None:
        return found
    path, digits = weights_folder() / name, re.search(r"-([0-9a-f]{8,})\.\w+$", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits and digits[1], progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"{needed_by} needs {path.name} and cannot download it ({error}): put the file into $ALIGNTOK_HOME or"
            f" {_places(name)[-1].parent}{remedy}"
        ) from error
    return path


def weights_folder() -> Path:
    """Return where published weights are looked for first: ``$ALIGNTOK_HOME``, without it torch's cache."""
    return _places("")[0]


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


def give_published(network: nn.Module, url: str, needed_by: str, remedy: str = "", prefix: str = "") -> None:
    """Give a network published weights; on the meta device, where a build counts and checks, none.

    Raises:
        UserError: As ``published_state``.
    """
    if not on_meta():
        state = published_state(url, needed_by, remedy)
        network.load_state_dict({key: state[prefix + key] for key in network.state_dict()}, assign=True)


def on_meta() -> bool:
    """Tell whether new tensors are on the meta device; torch 2.6 does not count a context as the default device."""
    return torch.empty(0).is_meta


def _places(url: str) -> list[Path]:
    """Return where the file may be."""
    home = os.environ.get("ALIGNTOK_HOME")
    folders = [Path(home).expanduser()] if home else []
    return [folder / url.rsplit("/", 1)[-1] for folder in [*folders, Path(torch.hub.get_dir()) / "checkpoints"]]
