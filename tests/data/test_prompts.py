"""Prompts as benchmarks publish them, and the folders in which their programs look for samples."""

import json

import pytest

from aligntok.data.prompts import Prompt, PromptSamples, hash_prompts, read_prompts, stored_prompts
from aligntok.errors import UserError

GENEVAL = [
    {"tag": "two_object", "include": [{"class": "fox", "count": 1}], "prompt": "a photo of a fox and a car"},
    {"tag": "counting", "include": [{"class": "car", "count": 3}], "prompt": "a photo of three cars"},
]


def test_files_of_benchmarks(tmp_path):
    lines = {
        "hps.json": json.dumps(["a fox ", "a car"]),
        "captions_val2014.json": json.dumps(
            {"annotations": [{"image_id": 7, "caption": "a fox"}, {"caption": "a car"}]}
        ),
        "parti.tsv": 'Prompt\tCategory\na fox\tAnimals\na car\t"Vehicles\n',
        "own.jsonl": '{"file": "png/0.png", "prompt": "a fox"}\n\n{"prompt": "a car"}\n',
        "plain.txt": "\ufeffa fox\n\n  a car\n",
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a fox", "a car"], name
    assert read_prompts(tmp_path / "captions_val2014.json")[0].about["image_id"] == 7
    assert read_prompts("a fox, v1.5")[0] == Prompt("a fox, v1.5")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.txt", None, "there is no file of prompts"),
        ("empty.txt", "\n", "holds no prompts"),
        ("list.json", "[1]", "entry 1 has no text under prompt, Prompt, caption"),
        ("no.json", "[", "cannot be read"),
        ("other.tsv", "a\tb\n1\t2\n", "entry 1 has no text"),
        ("file.csv", "a", "give a file that ends in .txt, .tsv, .jsonl, .json, or the prompt itself"),
    ],
)
def test_other_files_are_refused(name, text, words, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert words in str(error.value)
    with pytest.raises(UserError, match="the prompt is empty"):
        read_prompts(" ")


@pytest.mark.parametrize("layout", ["png", "geneval"])
def test_what_is_written_is_read(layout, tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    samples = PromptSamples(read_prompts(tmp_path / "evaluation_metadata.jsonl"), 4, layout)
    samples.write_list(tmp_path)
    names = [samples.name(id) for id in range(len(samples))]
    assert stored_prompts(tmp_path, names[::-1]) == [samples.prompt(id).text for id in range(8)][::-1]
    if layout == "geneval":
        assert names[5] == "00001/samples/0001.png"
        assert json.loads((tmp_path / "00001/metadata.jsonl").read_text()) == GENEVAL[1]
    else:
        assert stored_prompts(tmp_path / "png", ["000006.png"]) == ["a photo of three cars"]
        with pytest.raises(UserError, match=r"has no line for 1 images, such as png/9\.png"):
            stored_prompts(tmp_path, ["png/9.png"])


def test_a_folder_without_prompts(tmp_path):
    for names in (["a.png"], ["a/b/c.png"]):
        with pytest.raises(UserError, match="give --prompts FILE"):
            stored_prompts(tmp_path, names)


def test_the_hash_is_of_each_prompt_alone():
    assert hash_prompts(["a", "b c"]) != hash_prompts(["a b", "c"])
    assert len(hash_prompts([])) == 16
