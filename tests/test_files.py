"""The atomic writer and the hashes."""

import hashlib
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from aligntok.errors import UserError
from aligntok.files import check_writable, hash_file, hash_tensors, locked, write_atomically, write_text

HOLD = """
import sys
from aligntok.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), r"the disk is full.*untouched\. Free some space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is full"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "the disk is full"),
        (OSError(30, "Read-only file system"), r"the file system is read-only.*Name an --output"),
        (RuntimeError("something\nelse"), r"weights: something; what"),
    ],
)
def test_a_failed_write_leaves_what_was_there(tmp_path, error, words):
    path = tmp_path / "weights"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(UserError, match=f"cannot write .*weights.*{words}|cannot write .*{words}"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("weights", "old")]


def test_a_complete_write_replaces(tmp_path):
    path = tmp_path / "new folder" / "weights"
    for text in ("one", "two"):
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/weights", "what should be its folder is a file. Move that file"),
        ("file/folder/weights", "what should be its folder is a file. Move that file"),
        ("folder", "a folder of this name is in the way. Move it"),
        ("x" * 300, "the name is too long. Give a shorter one"),
        ("/proc/weights", ""),
    ],
)
def test_a_place_where_nothing_can_be_written_is_known_before_and_named(tmp_path, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for attempt in (check_writable, lambda path: write_text(path, "text")):
        with pytest.raises(UserError, match="cannot write") as caught:
            attempt(tmp_path / name)
        assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@contextmanager
def small_files(size):
    """Let this process write no file larger than so many bytes: a full disk for one process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: torch.save(torch.zeros(5000), path), "the disk is full"),
        (lambda path: save_file({"a": torch.zeros(5000)}, path), "exceeds the limit on a file's size"),
        (lambda path: path.write_bytes(bytes(20_000)), "exceeds the limit on a file's size"),
    ],
    ids=["torch", "safetensors", "bytes"],
)
def test_the_disk_takes_no_more(tmp_path, write, words):
    """Whatever library writes; torch alone does not tell why it could not."""
    write_text(tmp_path / "weights", "old")
    with small_files(4096), pytest.raises(UserError, match=words):
        write_atomically(tmp_path / "weights", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("weights", "old")]


def test_what_another_process_writes_at_the_same_moment_is_left_alone(tmp_path):
    def write(temporary):
        write_atomically(tmp_path / "reference", lambda other: other.write_text("theirs"))
        temporary.write_text("ours")

    write_atomically(tmp_path / "reference", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("reference", "ours")]


def test_a_folder_is_held_until_its_process_ends_or_dies(tmp_path):
    def hold():
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        return process

    for end in (subprocess.Popen.kill, subprocess.Popen.communicate):
        process = hold()
        with (
            pytest.raises(UserError, match=f"is in use: process {process.pid} on .* writes there. Wait"),
            locked(tmp_path),
        ):
            pass
        end(process)
        process.wait()
        process.stdin.close()
        process.stdout.close()
        (tmp_path / ".weights.0123.partial").write_text("half")
        with locked(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # what a killed process left is gone


def test_without_locks_it_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(tmp_path):
        pass
    assert "this file system has no locks" in capsys.readouterr().out


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a.csv", "Fréchet")
    assert (tmp_path / "a.csv").read_bytes() == "Fréchet".encode()


def test_hash_of_a_file_longer_than_a_block(tmp_path):
    content = b"x" * (2**20 + 5)
    (tmp_path / "a").write_bytes(content)
    assert hash_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_hash_of_tensors_sees_names_types_shapes_and_values():
    a = torch.arange(6.0)
    one = {"a": a, "b": a.bfloat16()}
    others = [{"a": a}, {"a": a, "c": a.bfloat16()}, {"a": a.view(2, 3), "b": a.bfloat16()}, {"a": a, "b": a.half()},
              {"a": a + 1, "b": a.bfloat16()}]  # fmt: skip
    hashes = [hash_tensors(one), hash_tensors(one, "about"), *map(hash_tensors, others)]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors({"b": a.bfloat16(), "a": torch.arange(12.0)[::2] / 2}) == hashes[0]
    assert hashes[0] == hash_tensors({key: value.clone() for key, value in one.items()})
