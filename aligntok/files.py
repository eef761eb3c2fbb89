"""Files: the atomic writer, why a file cannot be written, the lock of a folder, and hashes of files and tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError

from aligntok.errors import UserError, check, shortened

if TYPE_CHECKING:  # the report writes files without it
    from torch import Tensor

FREE = "free some space, then go on (fit: --ckpt_path last)"
ELSEWHERE = "name an --output where you may write"
REASONS = {  # what the system says: what it means, and the remedy
    errno.ENOSPC: ("the disk is full", FREE),
    errno.EDQUOT: ("your quota of the disk is used up", FREE),
    errno.EFBIG: ("it exceeds the limit on a file's size, see ulimit -f", FREE),
    errno.EROFS: ("the file system is read-only", ELSEWHERE),
    errno.EACCES: ("permission denied", ELSEWHERE),
    errno.EPERM: ("permission denied", ELSEWHERE),
    errno.EISDIR: ("a folder of this name is in the way", "move it, or give another name"),
    errno.ENOTDIR: ("what should be its folder is a file", "move that file, or give another name"),
    errno.EEXIST: ("what should be its folder is a file", "move that file, or give another name"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
}
HELD: set[Path] = set()  # locks of this process
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and move it there when it is complete and on disk.

    Any number of processes may write the same file at the same moment; the last one to end wins.

    Args:
        path: The file; its folder is made if it does not exist.
        write: Writes the file that it is given.

    Raises:
        UserError: The disk is full or not writable; what was at ``path`` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # not complete


def link(path: Path, name: Path) -> None:
    """Give a file a further name, or copy it where the file system has no hard links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def name_again(path: Path, name: Path) -> None:
    """Give a file, or a folder of files, a further name on the same disk; whole or absent, and without a second write.

    A kill while a folder takes the place of another one leaves none of that name.
    """
    if not path.is_dir():
        write_atomically(name, lambda temporary: link(path, temporary))
        return
    twin = name.with_name(f".{name.name}.partial")
    shutil.rmtree(twin, ignore_errors=True)
    twin.mkdir()
    for file in path.iterdir():
        link(file, twin / file.name)
    shutil.rmtree(name, ignore_errors=True)
    twin.rename(name)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around the writing of a file: what the system, torch or safetensors says becomes a ``UserError`` with a remedy.

    >>> with writing("a.txt"): raise OSError(errno.EROFS, "Read-only file system")
    Traceback (most recent call last):
    aligntok.errors.UserError: cannot write a.txt: the file system is read-only. Name an --output where you may write
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        number = re.search(r"os error (\d+)", text)  # safetensors'
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
        if "inline_container.cc" in text:  # torch tells no more than that it wrote less than it wanted to
            code = errno.ENOSPC
        first_line = (text.splitlines() or [type(error).__name__])[0]
        reason, remedy = REASONS.get(code or 0, (first_line, "mend that, then go on (fit: --ckpt_path last)"))
        was_there = "; what was there before is untouched" if os.path.isfile(path) else ""
        raise UserError(
            f"cannot write {shortened(str(path), 200)}: {reason}{was_there}. {remedy[0].upper()}{remedy[1:]}"
        ) from error


def check_writable(*paths: str | Path) -> None:
    """Raise a ``UserError`` where a file cannot be written: before the work that it is to hold."""
    for path in map(Path, paths):
        with writing(path):
            if path.is_dir() and not path.is_symlink():  # a link can be replaced
                raise IsADirectoryError(errno.EISDIR, "a folder")
            trial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process alone, as long as it writes there; the system releases it when the process dies.

    Raises:
        UserError: Another process holds it.
    """
    import fcntl

    named = str(folder) != "" and "\0" not in str(folder)
    check(named, f"{str(folder)!r} is no name of a folder: give another --output")
    path = Path(folder).absolute() / ".lock"
    if path in HELD:  # to close another open file of it would release the lock
        yield
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by workers that outlive us
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError(errno.EAGAIN, "its last holder has just removed it")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.seek(0)
                who = file.read() or "unknown"
                raise UserError(
                    f"{folder} is in use: process {who} writes there. Wait until it ends, or give another --output"
                ) from error
            print(f"{folder}: this file system has no locks, so see to it that nothing else writes there", flush=True)
        else:
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            for left in (*path.parent.glob(".*.partial"), *path.parent.glob("checkpoints/.*.partial")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()  # of a process that was killed while it wrote
        HELD.add(path)
        try:
            yield
        finally:
            HELD.remove(path)
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) atomically.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run" / "note.txt"
    >>> write_text(path, "done"); path.read_text()
    'done'
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, kind: Any) -> Any:
    """Return what a JSON file holds, which must be of a kind, see ``misfit``.

    Raises:
        UserError: It cannot be read, is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = misfit(content, kind)
    except OSError as error:
        problem = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        problem = f"no JSON: {str(error)[:100]}"
    if problem:
        raise UserError(f"{path} is broken ({problem}): restore it, or write it again")
    return content


def misfit(value: Any, kind: Any, key: str = "it") -> str:
    """Return, in words, what in a value of JSON or YAML is not of a kind; nothing where all is.

    >>> misfit({"size": 3, "ids": [1, None]}, {"size": int, "ids": [int], "scales": ({str: float}, None)})
    'it.ids.1 is None'

    Args:
        value: Numbers, strings, None, and lists and dicts of these; of a checkpoint tensors too.
        kind: A type or a value; ``[kind]`` for a list; ``{"key": kind}`` for a dict with these keys, among others;
            ``{str: kind}`` for one with any keys; a tuple for either of several kinds.
        key: What to call the value.
    """
    if isinstance(kind, tuple):
        fits = any(not misfit(value, one) for one in kind)
    elif isinstance(kind, (dict, list)):
        fits = isinstance(value, type(kind))
        inner: list[tuple[Any, Any, Any]] = []
        if fits and isinstance(kind, list):
            inner = [(index, part, kind[0]) for index, part in enumerate(value)]
        elif fits and isinstance(kind, dict):
            named = {name: kind[str] for name in value} if str in kind else kind
            inner = [(name, value.get(name), one) for name, one in named.items()]
        for name, part, one in inner:
            if problem := misfit(part, one, f"{key}.{name}"):
                return problem
    elif isinstance(kind, type):
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool)
    else:
        fits = type(value) is type(kind) and value == kind
    return "" if fits else f"{key} is {' '.join(repr(value).split()):.60}"


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_tensors(tensors: dict[str, Tensor], about: str = "") -> str:
    """Return a hash (16 digits) of tensors with their names, dtypes and shapes, and of the text ``about`` them."""
    import torch

    digest = hashlib.sha256(about.encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
