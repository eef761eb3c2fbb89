"""Other libraries' errors as ours: a line or two that names the key.

While arguments are parsed and while objects are built from them, every error is the user's, with one exception: what
the user's own class raises, unless it is a ``ValueError`` or an ``OSError``, is a bug in it and keeps its traceback.
"""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse._common import lenient_check
from jsonargparse._typehints import ActionTypeHint

from aligntok.errors import UserError, shortened

LONGEST = 380  # characters of a message
LIBRARIES = [Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
UNKNOWN = re.compile(
    r"(?:Option|Key) '([^']+)' is not|does not accept option '([^']+)'|unrecognized arguments: (?:--)?([^\s=]+)"
)
MISSING = re.compile(r"arguments are required: (.+)")
EXPECTED = re.compile(
    r"Expected an? (?:<class '([^']+)'>|([^:]+?))(?:\. Got value|$)|(?:subclass of|protocol) (\w+)\. Got value"
    r"|(Key must be a string|invalid literal for int)"  # in the keys of a mapping
)
NAMES = {"NoneType": "null", "Key must be a string": "dict", "invalid literal for int": "dict"}
RECIPE = "Add the missing layers (stage, size, data), or start from a recipe such as stage1.yaml"


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Keeps the lines of a description."""


class ShortErrors(ArgumentParser):  # type: ignore[misc]  # jsonargparse's types are not read
    """A parser that raises what the user mistyped as a ``UserError``, without the usage block."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message in short; a parser within a parser passes the error on as it is."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(explained(ex or ValueError(message))) from ex

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Refuse null where a type does not have it, too: jsonargparse takes it for a value that is not there yet."""
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            null = action.dest in namespace and namespace[action.dest] is None
            if null and action.default is not None and isinstance(action, ActionTypeHint) and not lenient_check.get():
                action._check_type(None)


@contextmanager
def building() -> Iterator[None]:
    """Around the parsing of arguments and the building of what class paths name.

    Raises:
        UserError: What went wrong, and the key.
    """
    try:
        yield
    except Exception as error:
        bugs = [problem.error for problem in problems(error) if problem.is_bug]
        if bugs:
            raise bugs[0] from None
        raise UserError(explained(error)) from error


class Problem(NamedTuple):
    """An innermost cause of an error.

    Attributes:
        error: The cause.
        keys: Lead to the argument; an empty one leads into a class.
        target: The class whose arguments these are.
        arguments: What it was called with, if it came to that.
    """

    error: BaseException
    keys: tuple[str, ...] = ()
    target: Any = None
    arguments: dict[str, Any] | None = None

    @property
    def is_bug(self) -> bool:
        """Whether it is an error in the code of a class of the user's own."""
        if self.arguments is None or isinstance(self.error, (ValueError, OSError)):
            return False
        file = getattr(sys.modules.get(self.target.__module__), "__file__", None)
        return file is not None and not any(Path(file).is_relative_to(folder) for folder in LIBRARIES)

    @property
    def key(self) -> str:
        """The key as users write it."""
        return ".".join(filter(None, self.keys))

    @property
    def words(self) -> str:
        """What the cause says, in a line."""
        return " ".join(str(self.error).split())

    @property
    def depth(self) -> int:
        """Number of keys that it names."""
        return len(self.keys) + bool(UNKNOWN.search(self.words) or MISSING.search(self.words))

    @property
    def expected(self) -> str | None:
        """The type that a value is not of, if that is the problem."""
        parsed = self.arguments is None and not isinstance(self.error, UserError)
        match = EXPECTED.search(self.words) if parsed else None
        name = next(filter(None, match.groups())) if match else None
        return NAMES.get(name, name.replace("typing.", "")) if name else None

    def __str__(self) -> str:
        """Return it in a line."""
        key, words, error = self.key, self.words, self.error
        unknown, missing = UNKNOWN.search(words), MISSING.search(words)
        if isinstance(error, UserError):
            text = str(error)
        elif self.arguments is not None:
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.strerror}: {error.filename or 'see the paths in the config'}"
            else:
                kind = "" if isinstance(error, (ValueError, RuntimeError)) and words else f"{type(error).__name__}: "
                text = f"{call(self.target, self.arguments)}: {kind}{words}"
        elif unknown:
            where = f" in {key}" if key else ""
            return f"unknown key '{next(filter(None, unknown.groups()))}'{where}: see --help, or --print_config"
        elif missing:
            keys = re.sub(r"\b(fit|validate|test|predict)\.", "", missing[1])
            return (
                f"{f'{key} ({self.target.__name__}) needs {keys}' if self.target else f'{keys} is missing'}. {RECIPE}"
            )
        else:
            text = words
        return text if not key or text.startswith(key) else f"{key}: {text}"


def problems(
    error: BaseException, above: Problem | None = None, seen: frozenset[FrameType] = frozenset()
) -> list[Problem]:
    """Return the innermost causes of an error: one, or of a Union one for each of its types.

    jsonargparse says where it was in words, and a Union's causes all in one text. Its stack frames have both as they
    are; should these change, messages name fewer keys.
    """
    here = Problem(error) if above is None else above._replace(error=error)
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame not in seen]
    causes: list[BaseException] = [error.__cause__] if error.__cause__ and hands_on(error, error.__cause__) else []
    for frame, below in zip_longest(frames, frames[1:]):
        if not frame.f_globals["__name__"].startswith("jsonargparse"):
            continue
        found, name, inner = frame.f_locals, frame.f_code.co_name, below.f_code.co_name if below else ""
        if name == "_check_type":
            here = here._replace(keys=(*here.keys, found["self"].dest))
        elif name == "instantiate" and "instantiate_class" in inner:
            here = here._replace(keys=(*here.keys, found["component"].dest))
        elif name == "adapt_typehints" and inner == name and ("k" in found or "n" in found):
            here = here._replace(keys=(*here.keys, str(found.get("k", found.get("n")))))
        elif name == "adapt_class_type":
            target, arguments = found.get("val_class"), found.get("init_kwargs")
            here = here._replace(keys=(*here.keys, ""), target=target, arguments=arguments)
        elif name == "raise_union_unexpected_value":
            causes = found["exceptions"]
    if isinstance(error, UserError) or not causes:
        return [here]
    return [problem for cause in causes for problem in problems(cause, here, seen.union(frames))]


def hands_on(error: BaseException, cause: BaseException) -> bool:
    """Whether an error repeats what its cause says, or that comes from an error of ours."""
    further = cause.__cause__ is not None and hands_on(error, cause.__cause__)
    return further or isinstance(cause, UserError) or "".join(str(cause).split()) in "".join(str(error).split())


def explained(error: BaseException) -> str:
    """Return an error in a line or two: the key and the innermost problem."""
    found = problems(error)
    ours = [problem for problem in found if isinstance(problem.error, UserError)]
    deepest = [problem for problem in found if problem.depth == max(problem.depth for problem in found)]
    chosen = ours or [problem for problem in deepest if not problem.expected] or deepest
    types = dict.fromkeys(problem.expected for problem in deepest if problem.expected)
    if chosen[0].expected:
        value = re.search(r"Got value: (.*)", chosen[0].words)
        given = {"": "''", "None": "null"}.get(value[1], shortened(value[1], 60)) if value else "a value"
        return shortened(f"{chosen[0].key} is {given}: give {' or '.join(map(str, types))}", LONGEST)
    return shortened(str(chosen[0]), LONGEST)


def call(target: Any, arguments: dict[str, Any]) -> str:
    """Return a call as one writes it, without what is the default.

    >>> call(re.compile, {"pattern": "a", "flags": 0})
    "compile(pattern='a')"
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(target).parameters.items()}
    given = {
        name: value for name, value in arguments.items() if repr(value) != repr(defaults.get(name, inspect._empty))
    }
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    words = {name: repr(value) if isinstance(value, plain) else type(value).__name__ for name, value in given.items()}
    listed = ", ".join(f"{name}={shortened(word, 120)}" for name, word in words.items())
    return f"{target.__name__}({shortened(listed, 240)})"
