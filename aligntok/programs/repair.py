"""``aligntok repair FOLDER``, and what the commands of earlier versions are called now."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from aligntok.errors import UserError
from aligntok.programs.encode import encode_command
from aligntok.programs.parser import Parser
from aligntok.programs.sample import sample_command

OLD = "predict.yaml"  # where earlier versions kept what wrote a folder
WRITERS = {"LatentWriter": "cache.yaml", "TokenWriter": "token_cache.yaml", "SampleWriter": "sample.yaml"}


def repair_command(arguments: list[str]) -> None:
    """Run again the command that wrote a folder: it does again what is missing or broken, and only that.

    Raises:
        UserError: There is no such folder, or what it holds cannot be mended.
    """
    about = "Run again the command that wrote a folder: it does again what is missing or broken, and only that."
    parser = Parser(prog="aligntok repair", description=about, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="as `aligntok encode` or `sample` wrote it")
    folder: Path = parser.parse_args(arguments).folder
    for name, command in (("encode.yaml", encode_command), ("sample.yaml", sample_command)):
        if (folder / name).is_file():
            command(["--config", str(folder / name), "--output", str(folder)])
            return
    if (folder / OLD).is_file():
        refuse_writers(["predict", "--config", str(folder / OLD), "--output", str(folder)])
    raise UserError(f"there is no {folder}/encode.yaml: only what `aligntok encode` or `sample` wrote can be repaired")


def refuse_writers(arguments: list[str]) -> None:
    """Raise a ``UserError`` with the new command where `aligntok predict` is to write a cache or samples."""
    if arguments[:1] != ["predict"]:
        return
    words = [part for word in arguments[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    configs = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-c", "--config")]
    options = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--ckpt_path", "--output")}
    for name in configs:
        text = Path(name).read_text() if Path(name).is_file() else ""
        layer = next((config for writer, config in WRITERS.items() if f"callbacks.{writer}" in text), Path(name).name)
        saved: dict[str, Any] = yaml.safe_load(text) if Path(name).name == OLD else {}
        checkpoint = options.get("--ckpt_path") or saved.get("ckpt_path") or "CHECKPOINT"
        output = ["--output", options["--output"]] if "--output" in options else []
        others = [other for other in configs if other != name] or (["config.yaml"] if saved else [])
        if layer in ("cache.yaml", "token_cache.yaml"):
            command = ["encode", "--config", layer, "--tokenizer", checkpoint, *output]
        elif layer in ("sample.yaml", "samples.yaml"):
            layers = [word for other in others for word in ("--config", other)]
            command = ["sample", *layers, "--config", layer, "--ckpt_path", checkpoint, *output]
        else:
            continue
        raise UserError(f"`aligntok predict` writes no files any more: {shlex.join(['aligntok', *command])}")
