"""The command line of a program."""

from __future__ import annotations

import argparse
from typing import NoReturn

from aligntok.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ``UserError`` for what the user mistyped, as every other mistake does.

    >>> Parser(prog="aligntok report").parse_args(["--what"])
    Traceback (most recent call last):
    aligntok.errors.UserError: aligntok report: unrecognized arguments: --what. See aligntok report --help
    """

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help")
