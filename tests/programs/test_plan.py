"""``aligntok plan``: what it says is what a real step takes; nothing needs to be there; ``--check`` names all."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from aligntok import cli
from aligntok.__main__ import main
from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.callbacks.checkpoint import checkpoint_size
from aligntok.errors import UserError
from aligntok.layers import find_config, shipped_configs
from aligntok.networks import checkpoint_blocks
from aligntok.programs.dry_step import DryStage, Meter, as_on_a_gpu, at_step
from aligntok.programs.needs import unwritten_files
from aligntok.programs.plan import Plan, parse_plan
from aligntok.stages import CausalTokenization, LatentAlignment, PerceptualAlignment

FITS = [
    name
    for name in shipped_configs()
    if "output" in (content := yaml.safe_load(find_config(name).read_text()))
    and not {"images", "steps", "num_samples"} & content.keys()
    and "cache" not in name
    and "sample" not in name
]
aten = torch.ops.aten
ATTENTION = {  # torch counts it on a GPU alone
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}
STAGES = {
    "diffusion": lambda tiny: tiny.generator(tiny.dit(depth=1), tokenizer=None),
    "autoregression": lambda tiny: tiny.autoregressive(tiny.ar(depth=1), tokenizer=None),
    "stage 1": lambda tiny: tiny.stage(LatentAlignment),
    "stage 2 with GAN": lambda tiny: tiny.stage(PerceptualAlignment, adversarial=tiny.gan()),
    "AliTok 1": lambda tiny: tiny.stage(CausalTokenization, tokenizer=tiny.causal(), auxiliary="mse"),
}


def batch(count):
    values = {"id": torch.arange(count), "label": torch.zeros(count, dtype=torch.int64)}
    sizes = {"latent": torch.rand(count, 4, 4, 4), "tokens": torch.zeros(count, 18, dtype=torch.int64)}
    return {**values, **sizes, "image": torch.rand(count, 3, 16, 16)}


def batches(kind):
    given = {"diffusion": "latent", "autoregression": "tokens"}.get(kind, "image")
    return lambda count: {key: value for key, value in batch(count).items() if key in ("id", "label", given)}


def take_step(stage, given, mode):
    """Take a real step, forward and backward; return the bytes of a meter after the forward pass."""
    with at_step(stage, 3), as_on_a_gpu(), mode:
        loss = stage.training_step(given, 0)
        forward, mode.peak = getattr(mode, "peak", 0), 0
        loss.backward()
    stage.zero_grad()
    return forward


@pytest.mark.parametrize("kind", STAGES)
def test_flops_and_memory_are_those_of_a_real_step(kind, tiny):
    stage, given, meter = STAGES[kind](tiny).train(), batches(kind), Meter()
    own = {tensor.untyped_storage()._cdata for tensor in (*stage.parameters(), *stage.buffers())}
    for tensor in (*stage.parameters(), *stage.buffers()):
        meter.note(tensor, counts=False)
    real = take_step(stage, given(4), meter)
    real = max(real, meter.peak - sum(p.nbytes for p in stage.parameters() if p.requires_grad))
    flops = meter.flops
    if kind != "stage 2 with GAN":  # torch's counter does not stand a gradient at a weight
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        take_step(stage, given(4), counter)
        flops = counter.get_total_flops()
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    take_step(stage, given(4), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
    with torch.device("meta"):
        dry = DryStage(STAGES[kind](tiny), given)
    cost = dry.cost(4, step=3, bf16=False, gpu=False)
    assert cost.flops == flops
    assert sum(saved.values()) < cost.activations == pytest.approx(real, rel=0.1)


def test_bf16_and_checkpointing_take_less(tiny):
    with torch.device("meta"):
        dry = DryStage(tiny.generator(tiny.dit(depth=4, width=32), tokenizer=None), batches("diffusion"))
    plain, bf16 = dry.cost(64, 3, bf16=False), dry.cost(64, 3, bf16=True)
    checkpoint_blocks(dry.stage)
    less = dry.cost(64, 3, bf16=True)
    assert bf16.flops == plain.flops < less.flops
    assert bf16.activations < 0.8 * plain.activations
    assert less.activations < 0.7 * bf16.activations


def planned(*words, **sizes):
    """Return the plan of a command."""
    _, words = parse_plan(list(words))
    with unwritten_files():
        run = cli.run(["fit", *words], cli.PlannedRun)
        return Plan(run.model, run.datamodule, run.config.fit, [*run.config_init.fit.callbacks.values()], **sizes)


def test_a_generator_is_planned_before_its_tokenizer_and_cache_are_there(in_folder):
    plan = planned("dit.yaml", gpus=8)
    assert plan.parameters["network"][0] + plan.stage.network.positions.numel() == 675_256_736  # LightningDiT-XL/1
    assert plan.parameters["frozen_tokenizer"][1] == 303_227_904 + 32_800 + 41_418_659  # as stage3.yaml has it
    assert (plan.batch, plan.steps) == (128, 80_000)
    assert plan.code == ("latent", (32, 16, 16))
    assert plan.cache == round(1_281_167 * 0.99) * 2 * 32 * 256 * 4
    assert plan.checkpoint == 4 * 674_961_824 * 4 + sum(b.nbytes for b in plan.stage.state_dict().values()) - (
        674_961_824 * 4
    )
    with pytest.raises(UserError, match="not divisible by 100 devices"):
        Plan(plan.stage, plan.data, plan.config, [], gpus=100)


@pytest.mark.slow
def test_other_generators_are_planned_before(in_folder):
    assert planned("alitok_ar.yaml").parameters["network"][0] == 177_048_064  # AliTok-B
    assert planned("quickstart/dit.yaml").num_images == (round(1437 * 0.9), "")  # the digits that its cache will hold


def test_sizes_of_a_checkpoint(tiny, tmp_path):
    stage = tiny.stage(LatentAlignment, perceptual=tiny.judge())
    callbacks = [EMA([0.9, 0.99]), SaveCheckpoint()]
    tiny.trainer(tmp_path, 1, callbacks).fit(stage, datamodule=tiny.data())
    size = (tmp_path / "checkpoints" / "last.ckpt").stat().st_size
    assert checkpoint_size(stage, callbacks) == pytest.approx(size, rel=0.4)  # so small a file is names for the most


def test_check_names_all_problems(in_folder, capsys):
    assert main(["plan", "quickstart/stage2.yaml", "--check", "--trainer.strategy", "ddp_spawn"]) == 2
    printed = capsys.readouterr()
    found = [line.split(maxsplit=1)[1] for line in printed.out.splitlines() if line.startswith("problem")]
    for words in ("encoder.safetensors is not here", "last.ckpt is not here", "--init_from", "ddp_spawn"):
        assert any(words in line for line in found), (words, found)
    assert f"{len(found)} problems, see above" in printed.err
    assert "GFLOP per image" in printed.out


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_every_recipe_is_planned(name, in_folder, capsys):
    assert main(["plan", name, "--gpus", "1"]) == 0
    printed = capsys.readouterr().out
    for words in ("trained", "bf16-mixed", "GFLOP per image", "a checkpoint", "GPU-hours"):
        assert words in printed
