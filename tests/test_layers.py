"""Layers of YAML: what wins, where they are looked for, and that reading them is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aligntok.errors import UserError
from aligntok.layers import SHIPPED, check_configs, find_config, merge, read_configs

pytestmark = pytest.mark.usefixtures("in_folder")


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


def test_a_file_that_hides_a_shipped_one_is_named(in_folder):
    write("base.yaml", "output: mine\n")
    write("recipe.yaml", "layers: [base.yaml]\n")
    assert check_configs(["--config", "stage1.yaml", "--config", str(SHIPPED / "base.yaml")]) == []
    for name in ("base.yaml", "./base.yaml", "recipe.yaml"):
        (line,) = check_configs(["--output", "x", f"--config={name}"])
        assert line.startswith("--config base.yaml: the file of this folder, not the shipped ")
        assert str(SHIPPED / "base.yaml") in line


def test_layers_that_lead_back_to_themselves():
    write("top.yaml", "layers: [base.yaml, a.yaml]\n")
    write("a.yaml", "layers: [b.yaml]\n")
    write("b.yaml", "layers: [a.yaml]\n")
    with pytest.raises(UserError, match=r"--config top.yaml: .* lead back to themselves: a.yaml > b.yaml > a.yaml$"):
        read_configs("top.yaml")
    write("self.yaml", "layers: [self.yaml]\n")
    with pytest.raises(UserError, match=r"self.yaml > self.yaml$"):
        read_configs("self.yaml")


LAUGHS = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(9))
REFUSED = {  # content of mine.yaml, the layer of top.yaml: words of the message
    "trainer:\n  max_steps: 1\n  max_steps: 2\n": "line 3: the key 'max_steps' is there twice",
    "output: a\nmodel: {}\n'output': b\n": "line 3: the key 'output' is there twice",
    "a: " + "[" * 100 + "]" * 100: "nested deeper than 50",
    "a: " + "{a: " * 100 + "1" + "}" * 100: "nested deeper than 50",
    "a: " + "[" * 5000 + "]" * 5000: "nested deeper than 50",
    "a: &a [*a]\n": "nested deeper than 50",
    LAUGHS: "more than 100,000 values",
    MERGES: "more than 100,000 values",
    "a: b: c\n": "line 1: mapping values are not allowed here",
    "a: !!python/object/apply:os.getcwd []\n": "line 1: could not determine a constructor",
    "? [1]\n: 2\n": "line 1: found unhashable key",
    "a: \0": "is no YAML: unacceptable character",
    "a: " + "x" * (1 << 20): "larger than a config may be",
    "layers: base.yaml\n": "layers is no list of configs: [base.yaml]",
    "layers: [nosuch.yaml]\n": "--config nosuch.yaml (a layer of mine.yaml): no such file",
    f"layers: [{'x' * 300}.yaml]\n": "xxx (a layer of mine.yaml): no such file",
    "optimizer: {class_path: [1]}\n": None,
    "optimizer: {class_path: builtins.dict}\n": None,
    "optimizer: 3\n": None,
}


@pytest.mark.parametrize("content", REFUSED, ids=range(len(REFUSED)))
def test_a_layer_that_cannot_be_used_is_named(content):
    write("mine.yaml", content)
    below = write("below.yaml", "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}\n")
    write("top.yaml", f"layers: [{below}, mine.yaml]\n")
    if REFUSED[content] is None:  # the parser says what is wrong with it
        read_configs("top.yaml")
        return
    with pytest.raises(UserError) as caught:
        read_configs("top.yaml")
    assert REFUSED[content] in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_layer_that_cannot_be_read_is_named():
    write("top.yaml", "layers: [/proc/self/mem]\n")  # root, who reads all other files, cannot read this
    with pytest.raises(UserError, match=r"/proc/self/mem \(a layer of top.yaml\) cannot be read: Input/output error"):
        read_configs("top.yaml")


def test_layers_that_name_ever_more_layers():
    for i in range(30):
        write(f"{i}.yaml", f"layers: [{i + 1}.yaml, {i + 1}.yaml]\n")
    write("30.yaml", "output: x\n")
    with pytest.raises(UserError, match=r"--config 0.yaml leads to more than 200 layers"):
        read_configs("0.yaml")


def test_reading_layers_imports_neither_torch_nor_lightning():
    code = "import sys, aligntok.layers as l; l.read_configs('stage1.yaml'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
