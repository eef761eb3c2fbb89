"""Published VAEs under every stage: the layers size/*_vae.yaml, and runs on a narrow VAE of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aligntok.__main__ import main
from aligntok.layers import find_config, read_configs
from aligntok.weights import load_tokenizer, load_vae, vae
from tests.test_configs import DEBUG, build, fit

KINDS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_say_how_large_they_are(kind):
    recipe = read_configs(f"size/{kind}_vae.yaml")["model"]["init_args"]["tokenizer"]["init_args"]
    with torch.device("meta"):
        tokenizer = load_vae(recipe["path"], recipe["kind"])
    assert tokenizer.spec.latent_shape == (KINDS[kind], 32, 32)
    text = find_config(f"size/{kind}_vae.yaml").read_text()
    assert f"{sum(p.numel() for p in tokenizer.parameters()):,} parameters" in text


def test_a_layer_gives_a_stage_the_tokenizer(monkeypatch, tmp_path):
    layers = ("--config", "stage1.yaml", "--config", "size/sd_vae.yaml", "--data.image_size", "512")
    tokenizer = build(monkeypatch, tmp_path, *layers).model.tokenizer
    assert tokenizer.spec.image_size == (512, 512)  # said once, in the data
    assert tokenizer.spec.latent_shape == (4, 64, 64)


def test_a_layer_gives_a_generator_the_tokenizer(monkeypatch, tmp_path):
    """Whose data are cached latents, and say no image size."""
    layers = ("--config", "dit.yaml", "--config", "size/dit_s.yaml", "--config", "size/flux_vae.yaml")
    patches = ("--model.network.patch_size=2", "--model.network.num_classes=1000")
    generator = build(monkeypatch, tmp_path, *layers, *patches).model
    assert tuple(generator.network.latent_shape) == (16, 32, 32)


@pytest.fixture
def narrow(monkeypatch, in_folder):
    """A file of SD's VAE, an eighth as wide, and the options that run on it."""
    monkeypatch.setattr(vae, "WIDTH", 32)
    state = vae._build(4, 32).state_dict()
    state = {key: value.contiguous() for key, value in state.items()}
    adapter = [[state.pop(f"adapter.{name}.{key}") for name in ADAPTER] for key in ("weight", "bias")]
    state |= {f"quant_conv.{key}": torch.cat(value) for key, value in zip(("weight", "bias"), adapter, strict=True)}
    state = {key.replace("decoder.post_quant", "post_quant"): v for key, v in state.items() if "latent_" not in key}
    save_file(state, "vae.safetensors")
    return *DEBUG, "--config", "size/sd_vae.yaml", "--model.tokenizer.path", "vae.safetensors"


ADAPTER = ("project", "project_log_variance")


def test_stage_3_refines_the_decoder_of_a_vae(narrow, judge_weights):
    published = load_vae("vae.safetensors", "sd", image_size=32)
    checkpoint = fit("stage3.yaml", *narrow, "--callbacks.rfid=null")
    refined = load_tokenizer(checkpoint)
    assert refined.fingerprint() == published.fingerprint()  # encoder, scale and shift as published
    assert refined.latent_std[0] == pytest.approx(1 / 0.18215)
    ours, theirs = (tokenizer.decoder.conv_out.weight for tokenizer in (refined, published))
    assert not torch.equal(ours, theirs)
    assert torch.equal(
        ours, torch.load(checkpoint, weights_only=True)["state_dict"]["tokenizer.decoder.conv_out.weight"]
    )


@pytest.mark.slow
def test_all_stages_measures_and_generators_run_on_a_vae(narrow, judge_weights):
    debug = ("--config", "run/debug.yaml")
    assert main(["validate", "--config", "stage1.yaml", *narrow, *debug, "--output", "published"]) == 0
    values = json.loads(Path("published/validate.json").read_text())["metrics"]
    assert {"val/rfid", "val/psnr", "val/probe"} <= values.keys()
    first = fit("stage1.yaml", *narrow, "--callbacks.rfid=null")
    second = fit("stage2.yaml", *narrow, "--callbacks.rfid=null", "--init_from", str(first))
    third = fit("stage3.yaml", *narrow, "--callbacks.rfid=null", "--init_from", str(second))
    assert load_tokenizer(third).latent_std[0] != pytest.approx(1 / 0.18215)  # measured anew: the encoder has learned
    small = ("--config", "size/dit_debug.yaml", "--config", "size/sd_vae.yaml", "--config", "data/shapes.yaml")
    fit("dit.yaml", *small, "--model.tokenizer.path", "vae.safetensors", "--data.global_batch_size", "4")


def test_a_stage_without_weights_still_asks_for_them(in_folder, fails):
    line = fails("fit", "--config", "stage2.yaml", "--config", "run/debug.yaml", "--config", "data/shapes.yaml")
    assert "PerceptualAlignment starts from a previous stage" in line
    line = fails("fit", "--config", "stage1.yaml", "--config", "size/sd_vae.yaml", "--config", "run/debug.yaml")
    assert "there is no sd-vae-ft-mse: give a folder with config.json and" in line
