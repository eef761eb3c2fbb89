"""Each number is said once: what a tokenizer, a source or an encoder says of itself flows into later runs."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from aligntok import cli, references
from aligntok.__main__ import main
from aligntok.layers import read_command

SHAPES = ("--config", "data/shapes.yaml")
DEBUG = ("--config", "run/debug.yaml", "--data.global_batch_size", "4")
CHECKPOINT = "run/checkpoints/last.ckpt"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network(monkeypatch, recipe: str, *args: str) -> torch.nn.Module:
    """Build a generator on images, from the tokenizer's checkpoint."""
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)
    size = "size/ar_debug.yaml" if "alitok" in recipe else "size/dit_debug.yaml"
    layers = ("--config", recipe, "--config", size, *SHAPES, *DEBUG)
    words = [*layers, "--model.tokenizer.path", CHECKPOINT, "--output", "generator"]
    return cli.run(["fit", *words, *args]).model.network


def fit(recipe: str, *args: str) -> None:
    assert main(["fit", "--config", recipe, *DEBUG, "--output", "run", *args]) == 0


def test_latent_shape_and_classes(in_folder, monkeypatch, judge_weights):
    ours = ("--data.image_size=64", "--model.tokenizer.adapter.latent_dim=6", "--callbacks.rfid=null")
    fit("stage1.yaml", "--config=size/debug.yaml", *SHAPES, *ours)
    dit = network(monkeypatch, "dit.yaml")
    assert (dit.latent_shape, dit.num_classes) == ((6, 4, 4), 12)
    ours = ("--model.network.latent_shape=[6,2,2]", "--model.network.num_classes=30", "--model.tokenizer=null")
    dit = network(monkeypatch, "dit.yaml", *ours)
    assert (dit.latent_shape, dit.num_classes) == ((6, 2, 2), 30)


def test_codebook_grid_and_prefix(in_folder, monkeypatch):
    ours = ("--data.image_size=40", "--model.tokenizer.quantizer.codebook_size=64", "--callbacks.rfid=null")
    fit("quickstart_alitok/stage1.yaml", *ours, "--model.tokenizer.encoder.num_prefix=11")
    ar = network(monkeypatch, "alitok_ar.yaml")
    assert (ar.codebook_size, ar.grid, ar.num_prefix, ar.num_classes) == (64, (10, 10), 11, 12)
    digits = ("--data.train", "aligntok.data.Digits", "--data.train.split", "train", "--data.val", "0.1")
    assert network(monkeypatch, "alitok_ar.yaml", *digits).num_classes == 10


def test_encoder(in_folder):
    sizes = ("--model.encoder.model_args.embed_dim=64", "--model.encoder.model_args.depth=1")
    fit("quickstart/encoder.yaml", "--output", "runs/quickstart/encoder", *sizes)
    fit("quickstart/stage1.yaml", "--callbacks.rfid=null", "--callbacks.probe=null")
    encoder = torch.load(CHECKPOINT, weights_only=True)["hyper_parameters"]["tokenizer"]["init_args"]["encoder"]
    assert encoder["init_args"]["model_args"] == {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 4}


def test_a_tokenizer_is_built_once_for_all_that_follows_from_it():
    config = OmegaConf.create(read_command(["--config", "quickstart_alitok/stage1.yaml"])[0])
    tokenizer = config.model.init_args.tokenizer
    with references.followed():
        values = [references.spec(tokenizer, key) for key in ("codebook_size", "grid", "num_prefix")]
        assert references.spec_of.cache_info().misses == 1
    assert values[1] == [8, 8]
    assert references.spec_of.cache_info().currsize == 0  # a checkpoint may have changed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "model.network.latent_shape follows from another part: there is no checkpoint runs/stage3"),
        (("--model.tokenizer=null",), "model.network.latent_shape follows from another part: there is no tokenizer"),
        (
            ("--model.network.num_classes=3", "--model.network.latent_shape=${sizes.a}"),
            "which is missing: give one of the two",
        ),
    ],
)
def test_what_is_missing_is_named(args, message, in_folder, capsys):
    assert main(["fit", "--config", "dit.yaml", *SHAPES, *DEBUG, *args]) == 2
    assert message in capsys.readouterr().err
