"""The shipped YAML of the autoregressive generator: AliTok's numbers, and two steps on tokens of a tiny tokenizer."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from aligntok import cli
from aligntok.__main__ import main
from aligntok.cache import Manifest
from aligntok.callbacks import GenerationQuality, SampleGrid
from aligntok.data import TokenShards
from aligntok.layers import find_config
from aligntok.programs.steps import read_chain
from aligntok.weights import load_tokenizer

SIZES = ("--model.network.codebook_size=4096", "--model.network.grid=[16,16]", "--model.network.num_prefix=16")
DEBUG = ("--config", "run/debug.yaml")


def build(monkeypatch, tmp_path, *args: str) -> cli.RunCLI:
    """Parse and instantiate a command on the meta device without running it."""
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)
    args = (
        *args,
        "--model.tokenizer",
        "null",
        *SIZES,
        "--model.network.num_classes=1000",
        *DEBUG,
        "--output",
        str(tmp_path / "run"),
    )
    with torch.device("meta"):
        return cli.run(["fit", *args])


@pytest.mark.parametrize(
    ("size", "parameters", "guidance"),
    [("b", 177_048_064, (16.0, 1.8)), ("l", 317_851_648, (6.0, 0.7)), ("xl", 662_141_696, (13.0, 1.4))],
)
def test_sizes_and_guidance_are_alitoks(size, parameters, guidance, monkeypatch, tmp_path):
    model = build(monkeypatch, tmp_path, "--config", "alitok_ar.yaml", "--config", f"size/ar_{size}.yaml").model
    assert sum(p.numel() for p in model.network.parameters()) == parameters
    assert f"{parameters:,}" in find_config(f"size/ar_{size}.yaml").read_text()
    assert (model.sampler.guidance_scale, model.sampler.guidance_power) == guidance


def test_the_recipe_is_alitoks(monkeypatch, tmp_path):
    run = build(monkeypatch, tmp_path, "--config", "alitok_ar.yaml")
    model, data = run.model, run.datamodule
    steps = yaml.safe_load(find_config("alitok_ar.yaml").read_text())["trainer"]["max_steps"]
    assert (steps, data.global_batch_size) == (500_000, 2048)
    assert steps * 2048 / 1_281_167 == pytest.approx(800, abs=1)
    rates = [model.optimization.learning_rate(step) for step in (0, 31_250, 62_500, 500_000)]
    assert rates == pytest.approx([0.0, 2e-4, 4e-4, 1e-5])
    assert run.trainer.gradient_clip_val == 1.0
    (group,) = model.optimization.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.96), 0.03)
    assert model.label_dropout == 0.1
    assert (model.network.sequence_length, model.network.dropout.p) == (272, 0.1)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Measure few samples there, and let pass what a tokenizer of two steps reconstructs."""

    def patch(callback, **values):
        setup = callback.setup
        monkeypatch.setattr(
            callback, "setup", lambda self, *args, **stage: vars(self).update(values) or setup(self, *args, **stage)
        )

    patch(GenerationQuality, num_samples=20, batch_size=20)
    patch(SampleGrid, num_classes=2, per_class=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(verb: str, name: str, *args: str) -> str:
    """Run a command on a recipe and return its checkpoint."""
    assert main([verb, "--config", name, *args, *DEBUG]) == 0
    return yaml.safe_load(find_config(name).read_text())["output"] + "/checkpoints/last.ckpt"


@pytest.mark.slow  # a minute: every step of the chain
def test_quickstart_recipes_run(in_folder, capsys):
    folder = in_folder / "runs/quickstart_alitok"
    small = {"encode": ["--accelerator", "cpu", "--min_psnr", "0", "--images.split", "val"]}
    small |= {"fit": DEBUG, "validate": DEBUG, "sample": ["--accelerator", "cpu", "--num_samples", "5"]}
    for step in read_chain("chains/quickstart_alitok.yaml", added=small)[:-1]:  # a report is made in test_configs.py
        assert main(step.words) == 0
    first, second, generator = (str(folder / name / "checkpoints/last.ckpt") for name in ("stage1", "stage2", "ar"))
    tokens = folder / "tokens"
    assert TokenShards(str(tokens)).num_views(flip=False) == 5
    assert Manifest.read(tokens).tokenizer["fingerprint"] == load_tokenizer(second).fingerprint()
    assert (
        load_tokenizer(generator).fingerprint() == load_tokenizer(first).fingerprint()
    )  # the decoder alone was refined
    values = json.loads((folder / "ar/validate.json").read_text())["metrics"]
    measures = {
        "loss",
        "accuracy",
        "accuracy_top5",
        "accuracy_prefix",
        "accuracy_grid",
        "class_agreement",
        "gfd_digits",
    }
    assert {f"val/{name}" for name in measures} <= values.keys()
    assert len((folder / "ar/accuracy_per_position.csv").read_text().splitlines()) == 1 + 8 + 64
    assert len(list((folder / "samples/png").iterdir())) == 5

    ours = ("--data.train.folder", str(tokens), "--data.augmentation.flip", "false", "--model.tokenizer.path", second)
    small = ("--config", "size/ar_debug.yaml", "--data.global_batch_size", "4", *ours)
    command("fit", "alitok_ar.yaml", *small)
    capsys.readouterr()
    wrong = ("--model.network.codebook_size", "32", "--output", "wrong")
    assert main(["fit", "--config", "alitok_ar.yaml", *small, *DEBUG, *wrong]) == 2
    words = "network.codebook_size 32 differs from the codebook_size of tokenizer 256"
    assert words in capsys.readouterr().err
