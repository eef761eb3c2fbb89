"""Layers of YAML: what wins, where they are looked for, and that reading them is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aligntok.errors import UserError
from aligntok.layers import find_config, merge, read_configs


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_later_layers_win_and_lists_are_replaced():
    write("a.yaml", "x: {one: 1, many: [1, 2]}\noutput: a\n")
    write("b.yaml", "layers: [a.yaml]\nx: {many: [3]}\n")
    assert read_configs("b.yaml") == {"x": {"one": 1, "many": [3]}, "output": "a"}
    assert read_configs("b.yaml", write("c.yaml", "x: {one: null}\n"))["x"] == {"one": None, "many": [3]}


def test_a_schedule_is_one_value():
    below = {"learning_rate": {0: 0.0, 1000: 1.0}, "args": {"depth": 2, "width": 8}}
    above = {"learning_rate": {0: 0.5, 20: 1.0}, "args": {"width": 4}}
    assert merge(below, above) == {"learning_rate": {0: 0.5, 20: 1.0}, "args": {"depth": 2, "width": 4}}


def test_another_class_keeps_the_arguments_that_it_takes():
    below = {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1, "betas": [0.9, 0.99]}}}
    for above in ({"class_path": "torch.optim.SGD"}, "torch.optim.SGD"):
        assert merge(below, {"optimizer": above})["optimizer"] == {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.1},
        }
    numbers = {"optimizer": {"init_args": {"lr": 0.2}}}
    assert merge(numbers, below)["optimizer"]["class_path"] == "torch.optim.Adam"  # numbers may come before the class


def test_shipped_recipes_find_shipped_layers_first(in_folder):
    mine = in_folder / "base.yaml"
    mine.write_text("output: mine\n")
    assert read_configs("stage1.yaml")["trainer"]["max_epochs"] == -1
    assert find_config("base.yaml").resolve() == mine  # named by the user: here first
    assert read_configs(write("recipe.yaml", "layers: [base.yaml]\n")) == {"output": "mine"}


def test_layers_that_lead_back_to_themselves():
    write("a.yaml", "layers: [b.yaml]\n")
    write("b.yaml", "layers: [a.yaml]\n")
    with pytest.raises(UserError, match="lead back to itself"):
        read_configs("a.yaml")


def test_reading_layers_imports_neither_torch_nor_lightning():
    code = "import sys, aligntok.layers as l; l.read_configs('stage1.yaml'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
