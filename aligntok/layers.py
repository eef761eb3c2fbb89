"""Configs as layers of YAML: found by name, merged, later ones win. Imports no torch and no Lightning.

A config is a file, or the name of a shipped one such as ``stage1.yaml``. Its key ``layers:`` names configs that come
before it. Mappings merge deeply; everything else is replaced: numbers, texts, lists, and schedules (mappings whose keys
are numbers). A layer that names another ``class_path`` keeps the arguments that the new class takes too.
A key with a plus, ``callbacks+:``, appends to a list.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml

from aligntok.errors import UserError

Config = dict[str, Any]

PACKAGE = Path(__file__).resolve().parent
SHIPPED = next(folder / "configs" for folder in (PACKAGE, PACKAGE.parent) if (folder / "configs").is_dir())
DATA = "aligntok.data.LatentDataModule"  # the class of `data:` where it names none


def split_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the names after ``--config``, and the other words.

    Example:
        >>> split_configs(["--config", "a.yaml", "--output", "x", "--config=b.yaml"])
        (['a.yaml', 'b.yaml'], ['--output', 'x'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?", action="append", const="", default=[])
    named, others = parser.parse_known_args(arguments)
    return named.config, others


def read_command(arguments: list[str]) -> tuple[Config, list[str]]:
    """Return the configs that a command line names as one, its data module in full, and the other words."""
    names, others = split_configs(arguments)
    config = read_configs(*names)
    if isinstance(config.get("data"), dict):
        config["data"] = with_class(config["data"], DATA)
    return config, others


def read_configs(*names: str) -> Config:
    """Return several configs as one, later ones over earlier ones.

    Args:
        names: Paths, or names of shipped configs.

    Raises:
        UserError: There is no such config, or it is no YAML.

    Example:
        >>> read_configs("size/dit_b.yaml", "size/dit_tiny.yaml")["model"]["init_args"]["network"]["init_args"]
        {'width': 128, 'depth': 4, 'num_heads': 4}
    """
    config: Config = {}
    for name in names:
        config = merge(config, _read(find_config(name), ()))
    return config


def merge(below: Config, above: Mapping[str, Any]) -> Config:
    """Return two layers as one, ``above`` over ``below``; neither is changed.

    Example:
        >>> merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
        {'a': {'b': 1, 'c': [3]}}
    """
    merged = dict(below)
    for key, value in above.items():
        if isinstance(key, str) and key.endswith("+"):  # appends to a list
            key = key[:-1]
            value = [*(merged.get(key) or []), *(value if isinstance(value, list) else [value])]
        old = merged.get(key)
        if isinstance(old, dict) and "class_path" in old and isinstance(value, str):
            value = {"class_path": value}  # a class by its name alone
        if isinstance(value, dict) and not _is_schedule(value):
            old = old if isinstance(old, dict) else {}
            if value.get("class_path", old.get("class_path")) != old.get("class_path") and "class_path" in old:
                old = {**old, "init_args": _accepted(value["class_path"], old.get("init_args") or {})}
            value = merge(old, value)
        merged[key] = value
    return merged


def with_class(part: Config, class_path: str) -> Config:
    """Return a part in full where it was given by its arguments alone; ``class_path`` is what it is by default.

    Of a part that names its class, ``init_args`` go before arguments beside them, which only count if the class takes
    them: shipped layers give ``data:`` in the short form, and a later one names another class.

    Example:
        >>> with_class({"image_size": 64}, "mine.Data")
        {'class_path': 'mine.Data', 'init_args': {'image_size': 64}}
    """
    arguments = {key: value for key, value in part.items() if key not in ("class_path", "init_args")}
    if part.get("class_path", class_path) != class_path:
        class_path = part["class_path"]
        arguments = _accepted(class_path, arguments)
    return {"class_path": class_path, "init_args": merge(arguments, part.get("init_args") or {})}


def to_text(config: Config) -> str:
    """Return a config as YAML, with nothing said by reference."""
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    text: str = yaml.dump(config, Dumper=dumper, sort_keys=False)
    return text


def _is_schedule(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(str(key).replace(".", "", 1).isdigit() for key in value)


def _accepted(class_path: str, arguments: Config) -> Config:
    """Return those of the arguments that a class, or function, of that path takes."""
    target: Any = locate(class_path)
    names: set[str] = set()
    for part in inspect.getmro(target) if inspect.isclass(target) else [target] if target else []:
        parameters = inspect.signature(part.__init__ if inspect.isclass(part) else part).parameters.values()
        names.update(parameter.name for parameter in parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # nothing is handed on to a parent
    return {name: value for name, value in arguments.items() if name in names}


def _read(path: Path, above: tuple[Path, ...]) -> Config:
    """Return a file and the layers that it names as one config; ``above`` are the files that lead to it."""
    path = path.resolve()
    if path in above:
        raise UserError(f"--config {path}: its layers lead back to itself")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} is empty or no mapping of keys to values")
    config: Config = {}
    shipped = path.is_relative_to(SHIPPED)
    for name in content.pop("layers", None) or []:
        config = merge(config, _read(find_config(str(name), shipped_first=shipped), (*above, path)))
    return merge(config, content)


def find_config(name: str, shipped_first: bool = False) -> Path:
    """Return the path of a config.

    Args:
        name: A path, or the name of a shipped config.
        shipped_first: Look among the shipped configs before the current folder, as shipped configs do for their layers.

    Raises:
        UserError: There is none; the message gives names that are near.
    """
    for folder in (SHIPPED, Path()) if shipped_first else (Path(), SHIPPED):
        if (folder / name).is_file():
            return folder / name
    names = shipped_configs()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
    raise UserError(f"--config {name}: no such file here, and no shipped config. Near names: {', '.join(near)}")


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
