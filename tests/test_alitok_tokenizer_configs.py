"""The shipped YAML of AliTok's tokenizer: its numbers and phases, and two steps of both stages at a debug size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from aligntok import cli
from aligntok.__main__ import main
from aligntok.layers import find_config
from aligntok.schedule import value_at
from aligntok.weights import load_tokenizer

DEBUG = ("--config", "size/alitok_debug.yaml", "--config", "data/shapes.yaml", "--data.global_batch_size", "4")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Parse and instantiate a recipe on the meta device without running it."""

    def build(name: str) -> cli.RunCLI:
        for hook in ("_run_subcommand", "before_instantiate_classes", "after_instantiate_classes"):
            monkeypatch.setattr(cli.RunCLI, hook, lambda self, *_: None)
        with torch.device("meta"):
            run = ["fit", "--config", name, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
            return cli.run([*run, "--output", str(tmp_path / "run")])

    return build


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "gan_start", "steps"),
    [
        ("alitok_stage1.yaml", None, 500_000, 600_000),
        ("alitok_stage2.yaml", None, 200_000, 300_000),
        ("alitok_v1_stage1.yaml", 390_623_032, 250_000, 350_000),
        ("alitok_v1_stage2.yaml", 389_899_308, 200_000, 300_000),
    ],
)
def test_sizes_losses_and_phases_are_alitoks(name, parameters, gan_start, steps, build):
    run, at = build(name), value_at
    model, tokenizer = run.model, run.model.tokenizer
    num_prefix, num_buffer = (17, 32) if "v1" in name else (16, 64)
    first = "stage1" in name
    if parameters:  # of the published weights, where the queries are a sum of two tables
        assert count(tokenizer) == parameters - 273 * 768
    assert count(model.loss.adversarial.discriminator) == 1_909_889
    assert tokenizer.spec.latent_shape == (32, 1, num_prefix + 256)
    assert tokenizer.spec.codebook_size == 4096
    assert (tokenizer.decoder.causal, tokenizer.decoder.prefix_head is not None) == (first, first)
    assert tokenizer.decoder.buffer_tokens.shape[0] == (1 if first else num_buffer)
    assert model.loss.pixel == "mse"
    assert model.commitment_weight == 0.25
    if first:
        weight = model.prefix_weight * num_prefix / 256
        assert (model.auxiliary, weight) == (("mse", 10 * 17 / 256) if "v1" in name else ("perceptual", 1.0))

    assert run.trainer.max_steps == steps
    rates = [
        at(model.optimization.learning_rate, step) for step in (0, 10_000, 50_000, gan_start, gan_start + 1, steps)
    ]
    assert rates == pytest.approx([0.0, 1e-4, 1e-4, 2e-5, 2e-6, 2e-6])
    terms = [model.loss.weights[name] for name in ("lpips", "logits")]
    weights = [tuple(at(term, step) for term in terms) for step in (0, 49_999, 50_000, steps)]
    assert weights == [(1.0, 0.1), (1.0, 0.1), (0.0, 1.0), (0.0, 1.0)]
    adversarial = model.loss.adversarial
    assert [value_at(adversarial.weight, step) for step in (0, gan_start - 1, gan_start, steps)] == [0.0, 0.0, 0.1, 0.1]
    assert adversarial.discriminator_start == gan_start - 1000
    assert run.datamodule.global_batch_size == 1536 == 48 * 32
    if name != "alitok_v1_stage2.yaml":  # it has the steps of alitok_stage2.yaml
        assert f"{steps * 1536 // 1_281_167} epochs" in find_config(name).read_text()


def fit(name: str, *args: str) -> str:
    assert main(["fit", "--config", name, *DEBUG, *args, "--config", "run/debug.yaml"]) == 0
    return yaml.safe_load(find_config(name).read_text())["output"] + "/checkpoints/last.ckpt"


@pytest.mark.slow
def test_both_stages_run(judge_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = fit("alitok_stage1.yaml", "--callbacks.rfid=null")  # Inception is slow: once, in stage 2
    second = fit("alitok_stage2.yaml", "--init_from", first)
    tokenizer = load_tokenizer(second)
    assert tokenizer.encode(torch.rand(2, 3, 32, 32)).shape == (2, 4 + 16)
    assert tokenizer.fingerprint() == load_tokenizer(first).fingerprint()
    metrics = [json.loads(Path(f"runs/alitok/stage{n}/run.json").read_text())["metrics"].keys() for n in (1, 2)]
    both = {"train/mse", "train/logits", "train/lpips", "train/gan_generator", "train/gan_discriminator"}
    both |= {"val/psnr", "val/codebook_usage", "val/codebook_entropy"}
    learned = {f"train/{name}" for name in ("prefix_mse", "prefix_logits", "prefix_lpips", "commitment", "codebook")}
    assert both | learned <= metrics[0]
    assert both | {"val/rfid"} <= metrics[1]
    assert not learned & metrics[1]
