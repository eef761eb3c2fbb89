"""The command line of the programs that take YAML layers, made from the signatures of their functions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.fabric import Fabric

from aligntok.errors import UserError
from aligntok.files import write_text
from aligntok.layers import read_configs
from aligntok.programs.fabric import make_fabric, on_first_rank

FABRIC = ("accelerator", "devices", "num_nodes", "strategy", "precision")  # arguments of make_fabric


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Keeps the lines of a description."""


class Parser(ArgumentParser):  # type: ignore[misc]  # jsonargparse's types are not read
    """Raises what the user mistyped as a ``UserError``; a parser within a parser passes it on as it is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message."""
        if not self.exit_on_error:
            super().error(message, ex)
        text = " ".join(message.split())
        text = text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"
        raise UserError(f"{self.prog}: {text}. See {self.prog} --help") from ex


def make_parser(verb: str, output: str, description: str) -> Parser:
    """Return a parser with ``--config``, ``--output`` (with its default) and the options of ``make_fabric``."""
    parser = Parser(prog=f"aligntok {verb}", description=description, formatter_class=HelpFormatter)
    parser.add_argument("-c", "--config", action="config", help="YAML file, or name of a shipped one; repeatable.")
    parser.add_argument("--output", type=str, default=output, help="Folder to write into.")
    parser.add_function_arguments(make_fabric)
    return parser


def read(parser: Parser, arguments: list[str], keys: set[str]) -> Namespace:
    """Return the options: first the layers of YAML, in their order, then what the command line says.

    Args:
        parser: Knows the options.
        arguments: Words after the verb.
        keys: Of the program beside those that all have; other keys of a layer, such as a recipe's trainer, are left
            out.
    """
    layers, others, rest = [], [], iter(arguments)
    for word in rest:
        if word in ("-c", "--config"):
            layers.append(next(rest, ""))
        elif word.startswith("--config="):
            layers.append(word.partition("=")[2])
        else:
            others.append(word)
    known = {"output", *FABRIC, *keys}
    config = {key: value for key, value in read_configs(*layers).items() if key in known}
    return parser.parse_args([*(["--config", yaml.safe_dump(config)] if config else []), *others])


def start(parser: Parser, verb: str, options: Namespace) -> Fabric:
    """Start the processes, and keep the options in the output folder, as ``encode.yaml`` or ``sample.yaml``."""
    fabric = make_fabric(**{key: options[key] for key in FABRIC})
    text = parser.dump(options, skip_none=False)
    on_first_rank(fabric, lambda: write_text(Path(options.output) / f"{verb}.yaml", text))
    return fabric


def instantiate(parser: Parser, options: Namespace) -> Namespace:
    """Build what class paths name.

    Raises:
        UserError: Of one of ours, or what a dataset of another library says of its files.
    """
    try:
        return parser.instantiate_classes(options)
    except OSError as error:
        raise UserError(f"{error.strerror or error}: {error.filename or 'see the paths in the config'}") from error
    except (RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None and "Dataset not found" not in str(error):  # torchvision's words
            raise
        raise UserError(str(cause or error)) from error
