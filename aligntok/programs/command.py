"""The command line of the programs that take YAML layers, made from the signatures of their functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric import Fabric
from omegaconf import OmegaConf

from aligntok.files import write_text
from aligntok.layers import merge, read_command
from aligntok.messages import HelpFormatter, ShortErrors
from aligntok.programs.fabric import held, make_fabric, on_first_rank
from aligntok.references import followed
from aligntok.weights.checkpoint import read_checkpoint

FABRIC = ("accelerator", "devices", "num_nodes", "strategy", "precision")  # arguments of make_fabric


def make_parser(verb: str, output: str, description: str) -> ShortErrors:
    """Return a parser with ``--config``, ``--output`` (with its default) and the options of ``make_fabric``."""
    parser = ShortErrors(
        prog=f"aligntok {verb}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file, or name of a shipped one; repeatable.")
    parser.add_argument("--output", type=str, default=output, help="Folder to write into.")
    parser.add_function_arguments(make_fabric)
    return parser


def read(
    parser: ShortErrors,
    arguments: list[str],
    own: Iterable[str],
    shared: Iterable[str],
    model: Callable[[str], Any] | None = None,
) -> Namespace:
    """Return the options: first the layers of YAML, in their order, then what the command line says.

    Args:
        parser: Knows the options.
        arguments: Words after the verb.
        own: Keys that this program alone has.
        shared: Keys that a training recipe may have too. Further keys of it, such as ``trainer``, are left out. Its
            precision is taken where nothing else is said, and what is written goes into a folder within the run's.
        model: Gives the recipe of the model of ``--ckpt_path`` where the layers have none; a recipe of theirs takes its
            network.
    """
    config, words = read_command(arguments)
    checkpoint = dict(pairwise(split_values(words))).get("--ckpt_path", config.get("ckpt_path"))
    if model is not None and checkpoint is not None:
        saved = read_checkpoint(checkpoint, weights=False).get("hyper_parameters", {})
        if "model" not in config:
            config["model"] = model(checkpoint)
        elif "network" in saved:  # the layers' may follow from a cache that is not here
            config = merge(config, {"model": {"init_args": {"network": saved["network"]}}})
    recipe = OmegaConf.create(config)
    known = config.keys() & {"output", *FABRIC, *own, *shared}
    with followed():
        values = {key: recipe[key] for key in known}
        config = {key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in values.items()}
    precision = OmegaConf.select(recipe, "trainer.precision")
    if precision is not None:
        config.setdefault("precision", precision)
    if "output" in config and not known & {*own}:
        config["output"] = str(Path(config["output"]) / Path(parser.get_default("output")).name)
    return parser.parse_args([*(["--config", yaml.safe_dump(config)] if config else []), *words])


def split_values(arguments: list[str]) -> list[str]:
    """Return words with each ``--key=value`` as two of them.

    >>> split_values(["--ema=0.99", "--output", "a=b"])
    ['--ema', '0.99', '--output', 'a=b']
    """
    return [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]


@contextmanager
def started(parser: ShortErrors, verb: str, options: Namespace) -> Iterator[Fabric]:
    """Start the processes, with the output folder locked and the options in it: ``encode.yaml`` or ``sample.yaml``."""
    fabric = make_fabric(**{key: options[key] for key in FABRIC})
    text = parser.dump(options, skip_unset=False)
    with held(fabric, options.output):
        on_first_rank(fabric, lambda: write_text(Path(options.output) / f"{verb}.yaml", text))
        yield fabric
