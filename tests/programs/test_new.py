"""``aligntok new``: what it prints is what it writes, and what it writes runs."""

import json
import re
import shlex

import pytest
import yaml

from aligntok.__main__ import main
from aligntok.data import Shapes
from aligntok.layers import read_configs
from aligntok.programs.new import Images, choose, config


def fill(folder, count=20, num_classes=2, size=(70, 90)):
    for index in range(count):
        place = folder / f"class{index % num_classes}" if num_classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Shapes(count, size)[index][0].save(place / f"{index}.jpg")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed_commands(text):
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  aligntok ")]


@pytest.mark.parametrize("num_classes", [0, 2])
def test_numbers_printed_are_the_numbers_written(num_classes, here, capsys):
    fill(here / "my pets", num_classes=num_classes)
    assert main(["new", "my pets"]) == 0
    printed = capsys.readouterr().out
    assert f"20 images, shorter side 70 px (median), {num_classes or 'no'} classes" in printed
    config = yaml.safe_load((here / "my pets.yaml").read_text())
    part = config["model"]["init_args"]["tokenizer"]["init_args"]["decoder"]["init_args"]
    written = {**config["data"], **config["trainer"], **part}
    numbers = dict(re.findall(r"^(\w+) (\d+): ", printed, re.MULTILINE))
    assert numbers.keys() == {"image_size", "global_batch_size", "max_steps", "width"}
    assert {name: written[name] for name in numbers} == {name: int(value) for name, value in numbers.items()}
    assert config["data"]["train"]["init_args"]["root"] == str(here / "my pets")
    assert max(config["model"]["init_args"]["optimization"]["learning_rate"]) == written["max_steps"]


@pytest.mark.slow  # half a minute: every step of a folder of images
def test_printed_commands_run(here, capsys):
    fill(here / "pets", num_classes=2)
    assert main(["new", "pets", "--output", "animals.yaml"]) == 0
    commands = printed_commands(capsys.readouterr().out)
    assert [words[0] for words in commands] == ["fit", "fit", "fit", "encode", "fit", "sample", "report"]
    for words in commands:
        debug = {"fit": ["--config", "run/debug.yaml", "--data.global_batch_size", "2"], "encode": ["--min_psnr", "0"]}
        more = debug.get(words[0], ["--num_samples", "3"] if words[0] == "sample" else [])
        assert main([*words, *more]) == 0, words
    runs = here / "runs" / "animals"
    assert "val/rfd_efficientnet_lite0" in (runs / "stage3" / "run.json").read_text()
    assert len(list((runs / "samples" / "png").iterdir())) == 3
    assert (runs / "report.html").is_file()


def test_what_is_written_for_a_gpu_runs(here):
    """With its GAN, perceptual term and wider decoder, here two steps on a CPU."""
    folder, images = fill(here / "pets", size=(40, 50)), Images(20, 2, 40)
    (here / "gpu.yaml").write_text(config(folder, images, choose(images, 24.0), on_gpu=True))
    layers = [word for name in ("photos/stage1.yaml", "gpu.yaml", "run/debug.yaml") for word in ("--config", name)]
    small = ["--data.global_batch_size", "2", "--model.loss.adversarial.weight", "0.5", "--output", "run"]
    assert main(["fit", *layers, *small]) == 0
    record = json.loads((here / "run" / "run.json").read_text())
    assert "val/features" in record["metrics"]
    assert record["parameters"]["loss"][0] > 0  # the discriminator learns


def test_bad_folders_are_refused_in_a_line(here, capsys):
    fill(here / "few", count=5)
    fill(here / "pets")
    for path in (here / "pets").rglob("*.jpg"):
        path.write_bytes(b"no image")
    (here / "empty").mkdir()
    (here / "kept.yaml").write_text("mine")
    for words, problem in (
        (["few"], "few holds 5 images: give at least 20"),
        (["pets"], "no image can be read (20 of 20 tried)"),
        (["empty"], "holds no image"),
        (["nowhere"], "there is no image folder"),
        (["pets", "--output", "kept.yaml"], "kept.yaml exists and stays as it is"),
        (["pets", "--output", "pets.txt"], "give a name that ends in .yaml"),
    ):
        assert main(["new", *words]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert len(error) < 400
    assert (here / "kept.yaml").read_text() == "mine"
    assert not list(here.glob("*s.yaml"))


def test_choices_follow_images_and_device():
    photos = Images(2000, 12, 375)
    laptop, gpu = choose(photos, None), choose(photos, 24.0)
    assert all(getattr(gpu, name)[0] > value for name, (value, _) in vars(laptop).items())
    assert choose(Images(2000, 0, 50), 24.0).image_size == (32, "the images have 50 px")
    few = choose(Images(20, 2, 375), None)
    assert few.global_batch_size[0] <= 18 // 2
    assert few.max_steps[0] < laptop.max_steps[0] == choose(Images(10**6, 12, 375), None).max_steps[0]
    assert choose(photos, 4.0).global_batch_size[0] < gpu.global_batch_size[0]


def test_numbers_for_a_laptop_are_the_recipes():
    """Without `aligntok new` the recipe trains 2,000 images as with it."""
    config = read_configs("photos/stage1.yaml")
    choices = choose(Images(2000, 12, 375), None)
    assert config["data"]["image_size"] == choices.image_size[0]
    assert config["data"]["global_batch_size"] == choices.global_batch_size[0]
    assert config["trainer"]["max_steps"] == choices.max_steps[0]
    part = config["model"]["init_args"]["tokenizer"]["init_args"]["decoder"]["init_args"]
    assert part["width"] == choices.width[0]
