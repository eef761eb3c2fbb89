"""The steps of a chain: commands that build on each other, and records that say whether they are finished."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from aligntok.errors import UserError, check, shortened
from aligntok.files import read_json, write_text
from aligntok.layers import read_configs, split_configs, to_text

PRODUCTS = {  # what a verb leaves in its folder
    "fit": ("checkpoints/last.ckpt",),
    "validate": ("validate.json",),
    "test": ("test.json",),
    "encode": ("manifest.json",),
    "sample": ("samples.json", "samples_*.npz"),
    "evaluate": ("evaluation.json",),
    "report": (),  # written anew each time
}
BUILT_ON = ("fit", "encode", "sample")  # other steps start from it, so nothing is written over it
MACHINE = "(accelerator|devices|num_nodes|strategy|num_workers)"  # keys that do not make it another step
SMALL = 1 << 20  # bytes up to which a file without checksums is read to tell its content
RECORD = {"command": str, "key": str, "inputs": {str: (str, None)}, "made": (str, None)}


class Step:
    """A command of a chain.

    >>> Step("stage1", ["fit", "--config", "stage1.yaml"], "runs/mine").command
    'aligntok fit --config stage1.yaml --output runs/mine/stage1 --ckpt_path last'

    Args:
        name: Its key in the chain.
        words: Verb and options.
        output: Folder of the chain.
        earlier: The steps before it; those whose folders it names are its inputs.
    """

    def __init__(self, name: str, words: Sequence[str], output: str, earlier: Sequence[Step] = ()) -> None:
        self.name, self.verb, self.record = name, words[0], Path(output, "chain", f"{name}.json")
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--output")
        parser.add_argument("--ckpt_path")
        given, more = parser.parse_known_args(words)[0], []
        if self.verb in ("evaluate", "report"):
            check(len(words) > 1, f"{name}: name a folder or a file after {self.verb}")
            self.folder = Path(words[1]).parent if Path(words[1]).suffix else Path(words[1])
        else:
            self.folder = Path(given.output or f"{output}/{name}")
            more += [] if given.output else ["--output", str(self.folder)]
            more += ["--ckpt_path", "last"] if self.verb == "fit" and not given.ckpt_path else []
        self.words = [*words, *more]
        self.command = shlex.join(["aligntok", *self.words])
        configs, options = split_configs(self.words)
        layers = {key: value for key, value in read_configs(*configs).items() if key != "output"}
        self.layers = re.sub(rf"(?m)^ *{MACHINE}: .*\n", "", to_text(layers))
        own = re.sub(rf"--([\w.]+\.)?{MACHINE}[ =]\S+ ?", "", shlex.join(options))
        self.key = hashlib.sha256(f"{own}\n{self.layers}".encode()).hexdigest()[:16]
        named = [
            s for s in earlier if re.search(rf"{re.escape(str(s.folder))}(?![\w.-])", f"{self.command}\n{self.layers}")
        ]
        self.inputs = [step for step in named if step.verb in BUILT_ON]

    def made(self) -> str | None:
        """Return what tells the content of its product from any other, ``None`` where there is none.

        A checkpoint and an .npz hold checksums, and are not read for it.
        """
        paths = [path for pattern in PRODUCTS[self.verb] for path in sorted(self.folder.glob(pattern))]
        digest = hashlib.sha256()
        for file in [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    digest.update(repr([(item.CRC, item.file_size) for item in archive.infolist()]).encode())
            elif file.is_file():
                size = file.stat().st_size
                digest.update(file.read_bytes() if size <= SMALL else str(size).encode())
        return digest.hexdigest()[:16] if paths else None

    def is_finished(self, keep: bool = False) -> bool:
        """Tell whether its product is there, made by this command from what its inputs are now.

        Args:
            keep: Take the product of other words, or of other inputs, as if it were.

        Raises:
            UserError: There is such a product, and other steps start from it.
        """
        made = self.made()
        if made is None or not self.record.is_file():
            return False  # what was made by hand goes on by the same command
        was = read_json(self.record, RECORD)
        other = [step.name for step in self.inputs if was["inputs"].get(step.name) not in (None, step.made())]
        how = "by other words or configs" if was["key"] != self.key else f"from another {other[0]}" if other else ""
        if how and self.verb in BUILT_ON and not keep:
            folder, record = (shortened(str(path), 80) for path in (self.folder, self.record))
            remedy = f"move {folder} away to make it anew, or take it as it is by --keep {self.name}"
            raise UserError(f"{self.name} was made {how} (see {record}): {remedy}")
        return bool(was["made"] == made) and (keep or not how)

    def write(self, made: str | None) -> None:
        """Write the record: before the command, or after it with what it has ``made``."""
        inputs = {step.name: step.made() for step in self.inputs}
        content = {"command": self.command, "key": self.key, "inputs": inputs, "made": made}
        if is_first_task():
            write_text(self.record, json.dumps(content, indent=1))


def read_chain(name: str, output: str | None = None, added: Mapping[str, Sequence[str]] | None = None) -> list[Step]:
    """Return the steps of a chain.

    >>> [step.name for step in read_chain("chains/quickstart.yaml")][:3]
    ['encoder', 'stage1', 'control']

    Args:
        name: A path, or the name of a shipped chain.
        output: Its folder, in place of what it says.
        added: More words of a step, or of all with one verb.

    Raises:
        UserError: It is no chain, or its steps are no commands.
    """
    config = read_configs(name)
    texts, own = config.pop("steps", None), str(config.get("output"))
    check(isinstance(texts, dict) and "output" in config, f"{name} is no chain: it needs `output:` and `steps:`")
    steps: list[Step] = []
    values, added = {**config, "output": output or own}, added or {}
    for key, text in texts.items():
        words = [Template(word).safe_substitute(values) for word in shlex.split(str(text or ""))]
        if not words:
            continue  # a layer above took it out
        check(words[0] in PRODUCTS, f"{name}: {key} begins with '{words[0]}', give one of {', '.join(PRODUCTS)}")
        words += added.get(key, added.get(words[0], ()))
        steps.append(Step(key, words, values["output"], steps))
        fixed = values["output"] != own and f"{own}/" in steps[-1].layers
        check(not fixed, f"--output {output}: the configs of {key} read from {own}/, so it must stay there")
        values[key] = str(steps[-1].folder)
    return steps


def is_first_task() -> bool:
    """Tell whether this process is the only one of its job, or the first."""
    return os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")) == "0"
