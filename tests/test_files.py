"""The atomic writer and the hashes."""

import hashlib

import pytest
import torch
from safetensors import SafetensorError

from aligntok.errors import UserError
from aligntok.files import hash_file, hash_tensors, write_atomically, write_text


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos"), SafetensorError("I/O")]
)
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "weights"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(UserError, match=r"cannot write .*weights"):
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


def test_processes_that_share_a_file_do_not_share_the_temporary_one(tmp_path):
    path = tmp_path / "reference"
    path.with_name(".reference.partial").write_text("of another process, half")
    write_atomically(path, lambda temporary: temporary.write_text("whole"), shared=True)
    assert path.read_text() == "whole"
    assert path.with_name(".reference.partial").read_text() == "of another process, half"


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
