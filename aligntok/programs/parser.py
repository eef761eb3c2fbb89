"""The command line of the programs that take no YAML; it starts without jsonargparse."""

from __future__ import annotations

import argparse
from typing import NoReturn

from aligntok.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ``UserError`` for what the user mistyped, as every other mistake does.

    >>> Parser("report", "Write a page.").parse_args(["--what"])
    Traceback (most recent call last):
    aligntok.errors.UserError: aligntok report: unrecognized arguments: --what. See aligntok report --help
    """

    def __init__(self, verb: str, description: str) -> None:
        lines = argparse.RawDescriptionHelpFormatter
        super().__init__(f"aligntok {verb}", description=description, formatter_class=lines, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help")


def check_device(device: str) -> None:
    """Raise a ``UserError`` where ``--device`` is none that computes here.

    >>> check_device("cpu")
    """
    import torch  # ``aligntok report`` starts without it

    try:
        torch.zeros(1, device=device).item()  # meta holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {device}: {str(error).splitlines()[0]:.200}") from error
