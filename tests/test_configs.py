"""Every shipped YAML: parsed, built on the meta device, counted, and run for two steps at a debug size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from aligntok import cli
from aligntok.__main__ import main
from aligntok.cli import expand_layers, find_config, shipped_configs
from aligntok.data import Shapes
from aligntok.losses.perceptual import VGG16_FILE
from aligntok.metrics import InceptionFeatures, inception
from aligntok.weights.checkpoint import load_tokenizer

RECIPES = [name for name in shipped_configs() if "output" in yaml.safe_load(find_config(name).read_text())]
OPTIONAL = {"size/d64.yaml", "size/debug.yaml", "data/shapes.yaml", "run/debug.yaml"}  # layers that a user adds
ENCODER = "--model.init_args.tokenizer.init_args.encoder.init_args"


def layers_of(name: str) -> set[str]:
    content = yaml.safe_load(find_config(name).read_text())
    return {name}.union(*(layers_of(layer) for layer in content.get("layers", [])))


def build(monkeypatch, tmp_path, *args: str) -> cli.RunCLI:
    """Parse and instantiate a command on the meta device without running it."""
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(cli.RunCLI, "before_instantiate_classes", lambda self: None)  # asks for a previous stage
    monkeypatch.setattr(cli.RunCLI, "after_instantiate_classes", lambda self: None)  # takes it
    with torch.device("meta"):
        return cli.run(["fit", *args, "--config", "run/debug.yaml", "--output", str(tmp_path / "run")])


def test_every_layer_is_used():
    used = set().union(*(layers_of(name) for name in RECIPES))
    assert used | OPTIONAL == set(shipped_configs())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_on_meta(name, monkeypatch, tmp_path):
    model = build(monkeypatch, tmp_path, "--config", name).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    groups = model.parameter_groups()
    assert all(parameters for parameters, _ in groups.values())


@pytest.mark.parametrize(("extra", "latent_dim"), [((), 32), (("--config", "size/d64.yaml"), 64)])
def test_paper_sizes(extra, latent_dim, monkeypatch, tmp_path):
    stage = build(monkeypatch, tmp_path, "--config", "stage2.yaml", *extra).model
    spec = stage.tokenizer.spec
    assert spec.latent_shape == (latent_dim, 16, 16)
    assert spec.image_size == (256, 256)
    assert stage.tokenizer.encoder.input_size == (224, 224)

    def count(network):
        return sum(p.numel() for p in network.parameters())

    if latent_dim == 32:
        assert count(stage.tokenizer.decoder) == 41_418_659  # LDM's decoder with post_quant_conv, facts of VA-VAE
        assert count(stage.tokenizer.adapter) == 1024 * 32 + 32
    # ViT-L/14 without head: patches 3*14*14*1024+1024, class token and 257 -> 16*16+1 positions, 24 blocks, final norm
    block = 4 * 1024 + (3 * 1024 * 1024 + 3 * 1024) + (1024 * 1024 + 1024) + 2 * 4 * 1024 * 1024 + 5 * 1024 + 2 * 1024
    assert count(stage.tokenizer.encoder) == 3 * 14 * 14 * 1024 + 1024 + 1024 + 257 * 1024 + 24 * block + 2 * 1024
    assert count(stage.adversarial.discriminator) == 2_765_633
    assert stage.measures_latents
    assert stage.semantic_weight == 1.0


@pytest.mark.parametrize(("name", "epochs"), [("stage1.yaml", 15), ("stage2.yaml", 31), ("stage3.yaml", 15)])
def test_comment_on_epochs_is_what_the_config_computes(name, epochs, monkeypatch, tmp_path):
    config = yaml.safe_load(find_config(name).read_text())
    data = yaml.safe_load(find_config("data/imagenet.yaml").read_text())["data"]
    images = config["trainer"]["max_steps"] * data["global_batch_size"]
    assert images // 1_281_167 == epochs
    assert f"{epochs} epochs" in find_config(name).read_text()


@pytest.fixture
def judge_weights(tmp_path, monkeypatch):
    """Put random VGG and Inception weights where the real ones would be: no network, but all of the loading code."""
    home = tmp_path / "home"
    home.mkdir()
    vgg = torchvision.models.vgg16().features.state_dict()
    torch.save({f"features.{key}": value for key, value in vgg.items()}, home / VGG16_FILE)
    network = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.save({}, home / "empty.pth")
        untrained = network("inception", ["2048"], feature_extractor_weights_path=str(home / "empty.pth"))
    torch.save(untrained.state_dict(), home / InceptionFeatures.FILE)
    monkeypatch.setenv("ALIGNTOK_HOME", str(home))


@pytest.fixture
def photo_folder(tmp_path):
    for index in range(20):
        folder = tmp_path / "photos" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Shapes(20, (150, 200))[index][0].save(folder / f"{index}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(name: str, *args: str) -> Path:
    config = yaml.safe_load(find_config(name).read_text())
    assert main(["fit", "--config", name, *args, "--config", "run/debug.yaml"]) == 0
    checkpoint = Path(config["output"]) / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    return checkpoint


def test_paper_recipes_run(in_folder, judge_weights):
    debug = ("--config", "size/debug.yaml", "--config", "data/shapes.yaml", "--data.global_batch_size", "4")
    first = fit("stage1.yaml", *debug)
    second = fit("stage2.yaml", *debug, "--init_from", str(first))
    third = fit("stage3.yaml", *debug, "--init_from", str(second))
    tokenizer = load_tokenizer(third)
    assert tokenizer(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    assert "val/rfid" in (in_folder / "runs/stage3/run.json").read_text()


def test_quickstart_recipes_run(in_folder):
    fit("quickstart/encoder.yaml")
    first = fit("quickstart/stage1.yaml")
    fit("quickstart/control.yaml", "--init_from", str(first))
    second = fit("quickstart/stage2.yaml", "--init_from", str(first))
    third = fit("quickstart/stage3.yaml", "--init_from", str(second))
    assert main(["validate", "--config", "quickstart/stage3.yaml", "--ckpt_path", str(third)]) == 0
    assert "val/rfd_digits" in (in_folder / "runs/quickstart/stage3/validate.json").read_text()
    assert main(["report", "runs/quickstart"]) == 0
    assert (in_folder / "runs/quickstart/report.html").is_file()
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, {})


def test_photo_recipes_run(in_folder, photo_folder):
    small = ("--data.train.init_args.root", str(photo_folder), "--data.global_batch_size", "2")
    first = fit("photos/stage1.yaml", *small)
    second = fit("photos/stage2.yaml", *small, "--init_from", str(first))
    fit("photos/stage3.yaml", *small, "--init_from", str(second))
    assert "val/rfd_efficientnet_lite0" in (in_folder / "runs/photos/stage3/run.json").read_text()


def test_saved_config_is_the_run(in_folder):
    fit("quickstart/encoder.yaml")
    saved = Path("runs/quickstart/encoder/config.yaml")
    assert main(["fit", "--config", str(saved), "--output", "again"]) == 0
    first, second = (
        torch.load(p, weights_only=True)
        for p in (saved.parent / "checkpoints/last.ckpt", "again/checkpoints/last.ckpt")
    )
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])


def test_readme_names_only_what_there_is():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name in set(re.findall(r"--config ([\w/]+\.yaml)", readme)):
        assert ".../" in name or find_config(name)
    for path in set(re.findall(r"`((?:aligntok|tests|benchmarks)/[\w/]+\.(?:py|md))`", readme)):
        assert (Path(__file__).parent.parent / path).is_file(), path


def test_layers_expand_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("output: a\n")
    (tmp_path / "b.yaml").write_text(f"layers: [{tmp_path / 'a.yaml'}]\noutput: b\n")
    assert expand_layers(str(tmp_path / "b.yaml"), set()) == [str(tmp_path / "a.yaml"), "output: b\n"]
