"""Other libraries' errors as ours: a line or two."""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from aligntok.errors import UserError


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Keeps the lines of a description."""


class ShortErrors(ArgumentParser):  # type: ignore[misc]  # jsonargparse's types are not read
    """A parser that raises what the user mistyped as a ``UserError``, without the usage block."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message, shortened; a parser within a parser passes it on as it is."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(short_message(message)) from ex


@contextmanager
def building() -> Iterator[None]:
    """Around the building of what class paths name: what a dataset says of its files is a user's error too.

    Raises:
        UserError: Of one of ours, or what another library says of files.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror or error}: {error.filename or 'see the paths in the config'}") from error
    except (RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None and "Dataset not found" not in str(error):  # torchvision's words
            raise
        raise UserError(str(cause or error)) from error


def short_message(message: str) -> str:
    """Return jsonargparse's message in a line or two: the key and the innermost problem.

    It has no structure to read instead: a parser within a parser hands its error on as text.
    """
    text = " ".join(message.split())
    unknown = re.search(
        r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|Key '([^']+)' is not expected", text
    )
    if unknown:
        key = next(name for name in unknown.groups() if name)
        where = [name for name in re.findall(r'Parser key "([\w.]+)"', text[: unknown.start()]) if name != key]
        return f"unknown key '{key}'" + (f" in {'.'.join(where)}" if where else "") + ": see --help, or --print_config"
    required = re.search(r"(?:class_path '([\w.]+)': [^:]*)?are required: ([\w.]+(?:, [\w.]+)*)", text)
    if required:
        keys = re.sub(r"\b(fit|validate|test|predict)\.", "", required[2])
        where = re.findall(r'Parser key "([\w.]+)"', text[: required.start()])
        keys = f"{'.'.join(where)} ({required[1]}) needs {keys}" if required[1] else f"{keys} is missing"
        return f"{keys}. Add the missing layers (stage, size, data), or start from a recipe such as stage1.yaml"
    return text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"
