"""Prompts from the files that benchmarks publish, and the folders in which their programs look for samples."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aligntok.errors import UserError, check, check_positive, words_of
from aligntok.files import write_text

Layout = Literal["png", "geneval"]
SUFFIXES = (".txt", ".tsv", ".jsonl", ".json")
LISTED, ABOUT = "prompts.jsonl", "metadata.jsonl"  # beside the samples: of all of them; of one prompt, in GenEval's
COLUMNS = ("prompt", "Prompt", "caption")  # of a table, or of an object in a line; the second is PartiPrompts'


@dataclass(frozen=True)
class Prompt:
    """What a sample is asked to show.

    Attributes:
        text: The prompt.
        about: All that its line in the file says, GenEval's objects and colours among it.
    """

    text: str
    about: dict[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path) -> list[Prompt]:
    r"""Return the prompts in a file, or the one that is given itself.

    ``.txt`` has one in a line; ``.tsv`` (PartiPrompts) and ``.jsonl`` (GenEval, and our own) have a column or key
    ``prompt``, ``Prompt`` or ``caption``; ``.json`` is a list of texts (HPSv2) or COCO's ``captions_*.json``.

    >>> path = getfixture("tmp_path") / "prompts.txt"
    >>> _ = path.write_text("two foxes\na car above a pizza\n")
    >>> [prompt.text for prompt in read_prompts(path)], read_prompts("a red fox")[0].text
    (['two foxes', 'a car above a pizza'], 'a red fox')

    Raises:
        UserError: There is no such file, it has no prompts, or is none of these.
    """
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        check(
            not path.is_file(), f"prompts {path}: give a file that ends in {', '.join(SUFFIXES)}, or the prompt itself"
        )
        check(bool(str(source).strip()), "the prompt is empty: give a text or a file of prompts")
        return [Prompt(str(source))]
    check(path.is_file(), f"there is no file of prompts {path}")
    try:
        found = _prompts_in(path)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise UserError(f"prompts {path} cannot be read: {words_of(error)}") from error
    check(bool(found), f"{path} holds no prompts")
    return found


def _prompts_in(path: Path) -> list[Prompt]:
    """Return the prompts of a file by its suffix."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if path.suffix == ".json":
        content = json.loads(text)
        if isinstance(content, dict):
            content = [{"caption": row["caption"], **row} for row in content.get("annotations", [])]
        rows: list[Any] = [{"prompt": row} if isinstance(row, str) else row for row in content]
    elif path.suffix == ".tsv":
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    prompts = []
    for number, row in enumerate(rows, 1):
        names = [name for name in COLUMNS if isinstance(row, dict) and isinstance(row.get(name), str)]
        check(bool(names), f"prompts {path}: entry {number} has no text under {', '.join(COLUMNS)}")
        prompts.append(Prompt(row[names[0]].strip(), row))
    return prompts


class PromptSamples:
    """The samples of some prompts: which prompt each id has, and where its picture belongs below a folder.

    ``png`` is ``png/000007.png`` for the sample of id 7, with ``prompts.jsonl`` beside, a line ``{"file": ...,
    "prompt": ...}`` for each. ``geneval`` is what GenEval's evaluation reads: ``00001/metadata.jsonl``, the line of the
    prompt, and ``00001/samples/0003.png``.

    >>> samples = PromptSamples([Prompt("a fox"), Prompt("a car")], samples_per_prompt=4, layout="geneval")
    >>> len(samples), samples.prompt(7).text, samples.name(7)
    (8, 'a car', '00001/samples/0003.png')

    Args:
        prompts: What is asked for.
        samples_per_prompt: Consecutive ids of a prompt; GenEval wants 4.
        layout: Of the folder.
    """

    labels = None  # prompts have no numbers

    def __init__(self, prompts: Sequence[Prompt], samples_per_prompt: int = 1, layout: Layout = "png") -> None:
        check_positive(samples_per_prompt=samples_per_prompt)
        self.prompts, self.samples_per_prompt, self.layout = prompts, samples_per_prompt, layout

    def __len__(self) -> int:
        return len(self.prompts) * self.samples_per_prompt

    def prompt(self, id: int) -> Prompt:
        """Return the prompt of a sample."""
        return self.prompts[id // self.samples_per_prompt]

    def name(self, id: int) -> str:
        """Return the place of a sample's picture below the folder."""
        index, number = divmod(id, self.samples_per_prompt)
        return f"png/{id:06d}.png" if self.layout == "png" else f"{index:05d}/samples/{number:04d}.png"

    def batch(self, ids: range) -> dict[str, Any]:
        """Return what a generator is asked for by these samples."""
        return {"caption": [self.prompt(id).text for id in ids]}

    def record(self) -> dict[str, Any]:
        """Return what decides on the samples."""
        texts = json.dumps([prompt.text for prompt in self.prompts])
        digest = hashlib.sha256(texts.encode()).hexdigest()[:16]
        return {"count": len(self), "prompts": digest, "layout": self.layout}

    def write_list(self, folder: Path) -> None:
        """Write which prompt each picture is of beside them."""
        if self.layout == "png":
            lines = ({"file": self.name(id), "prompt": self.prompt(id).text} for id in range(len(self)))
            write_text(folder / LISTED, "".join(json.dumps(line) + "\n" for line in lines))
            return
        for index, prompt in enumerate(self.prompts):
            about = {**prompt.about, "prompt": prompt.text}
            write_text(folder / f"{index:05d}" / ABOUT, json.dumps(about) + "\n")


def stored_prompts(root: Path, names: Sequence[str]) -> list[str]:
    """Return the prompts of images in a folder of either layout.

    Args:
        root: The folder, or ``png`` in it.
        names: Paths of the images below it.

    Raises:
        UserError: The folder has no prompts, or not for each image.
    """
    listed = next((path for path in (root / LISTED, root.parent / LISTED) if path.is_file()), None)
    if listed is not None:
        lines = {prompt.about.get("file"): prompt.text for prompt in read_prompts(listed)}
        files = {name: os.path.relpath(root / name, listed.parent) for name in names}
        missing = [name for name, file in files.items() if file not in lines]
        check(not missing, f"{listed} has no line for {len(missing)} images, such as {(missing or [''])[0]}")
        return [lines[files[name]] for name in names]
    folders = {name: (root / name).parents[1] / ABOUT for name in names if len(Path(name).parents) > 2}
    found = len(folders) == len(names) and all(path.is_file() for path in set(folders.values()))
    remedy = "give --prompts FILE, a prompt for each image in their order"
    check(found, f"{root} has no {LISTED} and is not in GenEval's layout (00000/{ABOUT}, 00000/samples/): {remedy}")
    texts = {path: read_prompts(path)[0].text for path in set(folders.values())}
    return [texts[folders[name]] for name in names]


def hash_prompts(prompts: Sequence[str]) -> str:
    """Return a hash, 16 digits, of prompts, whatever their order.

    >>> hash_prompts(["a fox", "a car"]) == hash_prompts(["a car", "a fox"])
    True
    """
    return hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()[:16]
