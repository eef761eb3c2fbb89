"""Shipped recipes with one key broken at random: each is refused in a line that names the key, or is sensible.

``FUZZ_SEED=7 pytest tests/test_fuzz_configs.py`` tries other ones; a failure prints the command that shows it again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import random
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from aligntok import cli
from aligntok.__main__ import main
from aligntok.layers import merge, read_command, read_configs
from aligntok.stages import DecoderRefinement, PerceptualAlignment

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 120  # for one command: parse, build and Trainer take one or two


def alone(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return a layer for a generator without a tokenizer."""
    return {"model": {"init_args": {"tokenizer": None, "network": {"init_args": sizes}}}}


DEBUG = ("size/debug.yaml", "data/shapes.yaml", "run/debug.yaml")
SHAPES = {"class_path": "aligntok.data.Shapes", "init_args": {"num_images": 64, "image_size": 32}}
LATENTS = {"latent_shape": [4, 2, 2], "num_classes": 12}
TOKENS = {"codebook_size": 64, "grid": [4, 4], "num_prefix": 4, "num_classes": 12}
BASES: dict[str, tuple[str | dict[str, Any], ...]] = {  # names of shipped configs, and layers of our own
    "encoder": ("quickstart/encoder.yaml", "run/debug.yaml"),
    "stage1": ("stage1.yaml", *DEBUG),
    "stage2": ("stage2.yaml", *DEBUG),
    "stage3": ("stage3.yaml", *DEBUG),
    "photos": ("photos/stage1.yaml", "run/debug.yaml", {"data": {"train": SHAPES}}),
    "alitok": ("alitok_stage1.yaml", "size/alitok_debug.yaml", *DEBUG[1:]),
    "dit": ("dit.yaml", "size/dit_debug.yaml", *DEBUG[1:], alone(LATENTS)),
    "ar": ("alitok_ar.yaml", "size/ar_debug.yaml", *DEBUG[1:], alone(TOKENS)),
}
WRONG = {
    "text": "abc",
    "empty": "",
    "unicode": "größe ✓",
    "null": None,
    "yes": True,
    "list": [1, 2],
    "mapping": {"a": {"b": 1}},
    "zero": 0,
    "minus": -1,
    "half": 0.5,
    "negative": -0.1,
    "huge": 10**12,
    "nan": math.nan,
    "inf": math.inf,
}
SENSELESS = {  # kinds of change that no number of such a name bears
    "nan": r".",
    "minus": r"weight|rate|decay|clip|size|depth|heads|width|smoothing|num_|steps|interval|eps|every",
}


class Hang(BaseException):
    """Raised in a command that takes too long; an ``Exception`` would be taken for a mistake in a key."""


class Change(NamedTuple):
    """One mutation of a config: what it is, where, and words of which a message must have one."""

    kind: str
    path: tuple[Any, ...]
    names: tuple[str, ...]
    value: Any = None
    before: Any = None

    def __str__(self) -> str:
        return f"{self.kind} at {'.'.join(map(str, self.path))}"


def paths_of(config: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from paths_of(value, (*above, key))


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the key, or where that is a word of the config's form, the one above it."""
    for key in reversed(path):
        if isinstance(key, str) and key not in ("class_path", "init_args") and not key.isdigit():
            return (key, "class_path is") if path[-1] == "class_path" else (key,)
    raise AssertionError(path)


def mutate(config: dict[str, Any], draw: random.Random) -> Change:
    """Break one key of a config, in place."""
    path = draw.choice([path for path in paths_of(config) if path[0] not in ("output", "layers")])
    holder: Any = config
    for key in path[:-1]:
        holder = holder[key]
    key, names = path[-1], names_of(path)
    kind = draw.choice([*WRONG, "misspelled", "removed", "class"])
    if kind == "class" and (not isinstance(holder, dict) or "class_path" not in holder):
        kind = "misspelled"
    if kind == "misspelled" and not isinstance(key, str):
        kind = "text"
    if kind == "misspelled":
        wrong = key[:-2] + key[-1] + key[-2] + "x"
        items = [(wrong if name == key else name, value) for name, value in holder.items()]
        holder.clear()
        holder.update(items)
        return Change(kind, path, (wrong, *names))
    if kind == "removed":
        del holder[key]
        return Change(kind, path, names)
    if kind == "class":
        holder["class_path"] = value = draw.choice(
            ["aligntok.nothing.Here", "torch.nn.Nothing", "Nothing", "json.dumps"]
        )
        return Change(kind, (*path[:-1], "class_path"), (*names_of((*path[:-1], "class_path")), value), value)
    before, holder[key] = holder[key], copy.deepcopy(WRONG[kind])
    return Change(kind, path, names, holder[key], before)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"no answer in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def refusal(words: list[str]) -> str | None:
    """Run a command; return what it says of a mistake, or nothing where there is none."""
    stderr = io.StringIO()
    with time_limit(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(stderr):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
    assert code in (0, 2)
    return None if code == 0 else stderr.getvalue().partition("aligntok: error: ")[2]


@cache
def recipe(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config to break: as its layers give it, and in full as a run saves it."""
    config: dict[str, Any] = {}
    for layer in BASES[name]:
        config = merge(config, read_configs(layer) if isinstance(layer, str) else layer)
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    config, _ = read_command(["--config", "mine.yaml"])
    built = cli.run(["fit", "--config", "mine.yaml"])
    return config, yaml.safe_load(built._parser("fit").dump(built.config.fit, skip_unset=False))


def no_run(patch: pytest.MonkeyPatch) -> None:
    """End a command where its first step would begin."""
    patch.setattr(cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)
    for stage in (PerceptualAlignment, DecoderRefinement):
        patch.setattr(stage, "needs_previous", False)


def words_of(names: Sequence[str], draw: random.Random) -> tuple[str, Change, list[str]]:
    """Return the name of a recipe, the change that breaks it, and the command that says so."""
    name = draw.choice(names)
    whole, saved = recipe(name)
    way = draw.choice(["layers", "saved", "command line"])
    config = copy.deepcopy(saved if way == "saved" else whole)
    before = yaml.safe_dump(config)
    change = mutate(config, draw)
    words = ["fit", "--config", "mine.yaml"]
    keys = [key for key in change.path if key != "init_args"]
    plain = all(isinstance(key, str) for key in keys) and change.kind not in ("class", "removed", "misspelled")
    if way == "command line" and plain and keys[-1] != "class_path":
        Path("mine.yaml").write_text(before)
        value = yaml.safe_dump(change.value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
        words.append(f"--{'.'.join(keys)}={value if change.kind != 'empty' else ''}")
    else:
        Path("mine.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    return f"{name}, {way}", change, words


def fuzz(names: Sequence[str], seeds: range) -> Counter[str]:
    """Try a mutation for each seed; return how many were refused, accepted and named, and print what is wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in seeds:
        draw = random.Random(seed)
        command, change, words = words_of(names, draw)
        what = f"seed {seed}: {command}: {change}: "
        try:
            text = refusal(words)
        except BaseException as error:
            wrong.append(f"{what}{type(error).__name__}: {error}"[:600])
            continue
        if text is None:
            counts["accepted"] += 1
            number = isinstance(change.before, (int, float)) and not isinstance(change.before, bool)
            if number and re.search(SENSELESS.get(change.kind, "$."), change.names[0]):
                wrong.append(f"{what}accepted")
            continue
        counts["refused"] += 1
        named = any(name in text for name in change.names)
        counts["named"] += named
        if len(text) > 400 or len(text.strip().splitlines()) > 3:
            wrong.append(f"{what}long: {text}")
        if not named:
            print(f"{what}not named: {text}")
    print(dict(counts), *wrong, sep="\n")
    assert not wrong, "\n".join(wrong)
    assert counts["named"] >= 0.98 * counts["refused"]
    return counts


def test_a_broken_key_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_run(monkeypatch)
    fuzz(["encoder", "dit"], range(1000 * SEED, 1000 * SEED + 25))


@pytest.mark.slow
def test_500_broken_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_run(monkeypatch)
    fuzz(sorted(BASES), range(1000 * SEED + 100, 1000 * SEED + 600))
