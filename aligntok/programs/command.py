"""The command line of the programs that take YAML layers, made from the signatures of their functions."""

from __future__ import annotations

from pathlib import Path

import yaml
from jsonargparse import Namespace
from lightning.fabric import Fabric

from aligntok.files import write_text
from aligntok.layers import read_configs, split_configs
from aligntok.messages import HelpFormatter, ShortErrors
from aligntok.programs.fabric import make_fabric, on_first_rank

FABRIC = ("accelerator", "devices", "num_nodes", "strategy", "precision")  # arguments of make_fabric


def make_parser(verb: str, output: str, description: str) -> ShortErrors:
    """Return a parser with ``--config``, ``--output`` (with its default) and the options of ``make_fabric``."""
    parser = ShortErrors(prog=f"aligntok {verb}", description=description, formatter_class=HelpFormatter)
    parser.add_argument("-c", "--config", action="config", help="YAML file, or name of a shipped one; repeatable.")
    parser.add_argument("--output", type=str, default=output, help="Folder to write into.")
    parser.add_function_arguments(make_fabric)
    return parser


def read(parser: ShortErrors, arguments: list[str], keys: set[str]) -> Namespace:
    """Return the options: first the layers of YAML, in their order, then what the command line says.

    Args:
        parser: Knows the options.
        arguments: Words after the verb.
        keys: Of the program beside those that all have; other keys of a layer, such as a recipe's trainer, are left
            out.
    """
    layers, others = split_configs(arguments)
    known = {"output", *FABRIC, *keys}
    config = {key: value for key, value in read_configs(*layers).items() if key in known}
    return parser.parse_args([*(["--config", yaml.safe_dump(config)] if config else []), *others])


def start(parser: ShortErrors, verb: str, options: Namespace) -> Fabric:
    """Start the processes, and keep the options in the output folder, as ``encode.yaml`` or ``sample.yaml``."""
    fabric = make_fabric(**{key: options[key] for key in FABRIC})
    text = parser.dump(options, skip_none=False)
    on_first_rank(fabric, lambda: write_text(Path(options.output) / f"{verb}.yaml", text))
    return fabric
