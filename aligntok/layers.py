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
import os
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml

from aligntok.errors import UserError, check, words_of

Config = dict[str, Any]

PACKAGE = Path(__file__).resolve().parent
SHIPPED = next(folder / "configs" for folder in (PACKAGE, PACKAGE.parent) if (folder / "configs").is_dir())
DATA = "aligntok.data.LatentDataModule"  # the class of `data:` where it names none
MAX_FILES, MAX_BYTES = 200, 1 << 20  # ours: of a command, of a file
MAX_DEPTH, MAX_VALUES = 50, 100_000  # ours: of a file, with what its aliases repeat


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
    return _merged([find_config(name) for name in names], (), [])


def check_configs(arguments: list[str]) -> list[str]:
    """Read the configs that a command line names; say which files of the current folder hide a shipped one.

    Raises:
        UserError: There is no such config, or it is no YAML.
    """
    files: list[Path] = []
    _merged([find_config(name) for name in split_configs(arguments)[0]], (), files)
    hidden = [path for path in files if not (path.is_absolute() or _is_shipped(path)) and (SHIPPED / path).is_file()]
    return [f"--config {path}: the file of this folder, not the shipped {SHIPPED / path}" for path in hidden]


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
            old = old if isinstance(old, dict) and not _is_schedule(old) else {}
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


def _accepted(class_path: Any, arguments: Any) -> Config:
    """Return those of the arguments that a class, or function, of that path takes; what is none is for the parser."""
    if not isinstance(class_path, str) or not isinstance(arguments, dict):
        return {}
    target: Any = locate(class_path)
    names: set[str] = set()
    for part in inspect.getmro(target) if inspect.isclass(target) else [target] if target else []:
        parameters = inspect.signature(part.__init__ if inspect.isclass(part) else part).parameters.values()
        names.update(parameter.name for parameter in parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # nothing is handed on to a parent
    return {name: value for name, value in arguments.items() if name in names}


def _merged(paths: list[Path], above: tuple[Path, ...], files: list[Path]) -> Config:
    """Return files, each over the layers that it names, as one config.

    Args:
        paths: Of the files.
        above: The files that lead to them.
        files: All that were read so far, to which these are added.
    """
    config: Config = {}
    for path in paths:
        first, where = _shown((*above, path)[0]), f" (a layer of {_shown(above[-1])})" if above else ""
        if path in above:
            chain = [_shown(each) for each in (*above[above.index(path) :], path)]
            chain[3:-1] = ["..."] * (len(chain) > 5)
            raise UserError(f"--config {first}: its layers lead back to themselves: {' > '.join(chain)}")
        files.append(path)
        check(len(files) <= MAX_FILES, f"--config {first} leads to more than {MAX_FILES} layers")
        content = _read(path, f"--config {_shown(path)}{where}")
        layers = content.pop("layers", None) or []
        check(isinstance(layers, list), f"--config {_shown(path)}{where}: layers is no list of configs: [{layers}]")
        found = [find_config(str(name), _is_shipped(path), path) for name in layers]
        config = merge(config, merge(_merged(found, (*above, path), files), content))
    return config


def _read(path: Path, what: str) -> Config:
    """Return the content of a file; errors name it as ``what``."""
    try:
        check(path.stat().st_size <= MAX_BYTES, f"{what} is larger than a config may be, {MAX_BYTES:,} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{what} is no YAML that can be used, line {line}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what} is no YAML: {words_of(error)}") from error
    except RecursionError as error:
        raise UserError(f"{what} is nested deeper than {MAX_DEPTH} levels") from error
    check(isinstance(content, dict), f"{what} is empty or no mapping of keys to values")
    return dict(content)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml's types are not read
    """Takes no key twice, and nothing that grows beyond all bounds when its aliases are followed."""

    nodes = 0

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self.look_at(node, 1)
        return node

    def look_at(self, node: yaml.Node, depth: int) -> None:
        self.nodes += 1
        self.refuse(depth > MAX_DEPTH, f"nested deeper than {MAX_DEPTH} levels", node)
        self.refuse(self.nodes > MAX_VALUES, f"more than {MAX_VALUES:,} values", node)
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
                self.refuse(name in keys, f"the key '{name}' is there twice", key)
                keys.add(name)
                self.look_at(value, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                self.look_at(value, depth + 1)

    def refuse(self, wrong: bool, problem: str, node: yaml.Node) -> None:
        if wrong:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _is_shipped(path: Path) -> bool:
    return path.resolve().is_relative_to(SHIPPED)


def _shown(path: Path) -> str:
    """Return a path as users write it."""
    return str(path.relative_to(SHIPPED) if path.is_relative_to(SHIPPED) else path)


def find_config(name: str, shipped_first: bool = False, above: Path | None = None) -> Path:
    """Return the path of a config.

    Args:
        name: A path, or the name of a shipped config.
        shipped_first: Look among the shipped configs before the current folder, as shipped configs do for their layers.
        above: The config that names it as a layer.

    Raises:
        UserError: There is none; the message gives names that are near.
    """
    for folder in (SHIPPED, Path()) if shipped_first else (Path(), SHIPPED):
        if os.path.isfile(folder / name):  # unlike pathlib's, also no error for names that no file can have
            return folder / name
    names = shipped_configs()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
    where = f" (a layer of {_shown(above)})" if above else ""
    words = f"--config {name[:150]}{where}: no such file here, and no shipped config. Near names: {', '.join(near)}"
    raise UserError(words)


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
