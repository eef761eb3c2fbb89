"""``aligntok repair FOLDER``, and what the commands of earlier versions are called now."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

from aligntok.errors import UserError
from aligntok.layers import read_configs, split_configs
from aligntok.programs.command import split_values
from aligntok.programs.encode import encode_command
from aligntok.programs.parser import Parser
from aligntok.programs.sample import sample_command

DESCRIPTION = "Run again the command that wrote a folder: it does again what is missing or broken, and only that."
OLD = "predict.yaml"  # where earlier versions kept what wrote a folder
WRITERS = {"LatentWriter": "cache.yaml", "TokenWriter": "token_cache.yaml", "SampleWriter": "sample.yaml"}


def repair_command(arguments: list[str]) -> None:
    """Run ``aligntok repair`` with the words that follow it.

    Raises:
        UserError: There is no such folder, or what it holds cannot be mended.
    """
    parser = Parser("repair", DESCRIPTION)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="as `aligntok encode` or `sample` wrote it")
    folder: Path = parser.parse_args(arguments).folder
    for name, command in (("encode.yaml", encode_command), ("sample.yaml", sample_command)):
        if (folder / name).is_file():
            command(["--config", str(folder / name), "--output", str(folder)])
            return
    if (folder / OLD).is_file():
        refuse_writers(["--config", str(folder / OLD), "--output", str(folder)])
    raise UserError(f"there is no {folder}/encode.yaml: only what `aligntok encode` or `sample` wrote can be repaired")


def refuse_writers(arguments: list[str]) -> None:
    """Raise a ``UserError`` with the new command where `aligntok predict` is to write a cache or samples."""
    configs, words = split_configs(arguments)
    options = dict(pairwise(split_values(words)))
    output = ["--output", options["--output"]] if "--output" in options else []
    for name in configs:
        text = Path(name).read_text() if Path(name).is_file() else ""
        layer = next((config for writer, config in WRITERS.items() if f"callbacks.{writer}" in text), Path(name).name)
        saved = read_configs(name) if Path(name).name == OLD else {}
        checkpoint = options.get("--ckpt_path") or saved.get("ckpt_path") or "CHECKPOINT"
        if layer in ("cache.yaml", "token_cache.yaml"):
            command = ["encode", "--config", layer, "--tokenizer", checkpoint, *output]
        elif layer in ("sample.yaml", "samples.yaml"):
            others = [other for other in configs if other != name] or (["config.yaml"] if saved else [])
            layers = [word for other in [*others, layer] for word in ("--config", other)]
            command = ["sample", *layers, "--ckpt_path", checkpoint, *output]
        else:
            continue
        raise UserError(f"`aligntok predict` writes no files any more: {shlex.join(['aligntok', *command])}")
