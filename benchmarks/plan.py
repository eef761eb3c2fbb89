"""Does ``aligntok plan`` tell the memory of a run? Beside the peak of a real one on the CPU, in a process of its own.

    python benchmarks/plan.py

Planned are weights, gradients, optimizer, averages and activations of a training step on tensors without memory.
Measured is the peak of the process (resident set) in two steps of ``Trainer.fit`` with AdamW and an average, less what
it holds before the stage is built.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from dit import quiet
from torch.utils.data import DataLoader

from aligntok.callbacks import EMA
from aligntok.data import LatentDataModule, Shapes
from aligntok.losses import AdversarialLoss, ReconstructionLoss
from aligntok.networks import (
    AutoregressiveTransformer,
    ConvDecoder,
    DiT,
    LinearAdapter,
    PatchDiscriminator,
    Tokenizer,
    VisionEncoder,
)
from aligntok.programs.plan import Plan
from aligntok.stages import AutoregressiveGeneration, LatentDiffusion, Optimization, PerceptualAlignment, Stage

STEPS = 2
ADAMW = Optimization(1e-4, partial(torch.optim.AdamW, fused=True))


def diffusion() -> tuple[Stage, int]:
    return LatentDiffusion(DiT((32, 16, 16), 1000, 384, 12, 6), optimization=ADAMW), 8


def autoregression() -> tuple[Stage, int]:
    return AutoregressiveGeneration(
        AutoregressiveTransformer(1024, (16, 16), 16, 1000, width=384, depth=8, num_heads=6), optimization=ADAMW
    ), 8


def alignment() -> tuple[Stage, int]:
    encoder = VisionEncoder("vit_small_patch16_224", 128, 16, weights=None)
    tokenizer = Tokenizer(encoder, LinearAdapter(384, 16), ConvDecoder(16, 64, (1, 1, 2, 2, 4), num_blocks=1))
    tokenizer.latent_std.fill_(0.5)
    gan = AdversarialLoss(PatchDiscriminator(width=32), discriminator_start=0)
    return PerceptualAlignment(tokenizer, ReconstructionLoss(adversarial=gan), ADAMW), 8


SIZES = {
    "DiT, width 384, 12 blocks": diffusion,
    "AR, width 384, 8 blocks": autoregression,
    "stage 2, 128 px": alignment,
}


def planned(name: str, count: int) -> float:
    """Return the bytes that ``aligntok plan`` names."""
    with torch.device("meta"):
        stage, _ = SIZES[name]()
    trainer = {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "accumulate_grad_batches": 1}
    config: Any = SimpleNamespace(trainer=SimpleNamespace(**trainer, max_steps=STEPS, max_epochs=None))
    plan = Plan(stage, LatentDataModule(Shapes(64, 128), count, 128), config, [EMA()])
    plan.batch_of = partial(batch, stage)  # type: ignore[method-assign]
    return sum(plan.memory(plan.dry.cost(count, STEPS, bf16=False).activations).values())


def batch(stage: Stage, count: int) -> dict[str, torch.Tensor]:
    values = {"id": torch.arange(count), "label": torch.zeros(count, dtype=torch.int64)}
    if isinstance(stage, LatentDiffusion):
        return {**values, "latent": torch.randn(count, *stage.network.latent_shape)}
    if isinstance(stage, AutoregressiveGeneration):
        return {**values, "tokens": torch.zeros(count, stage.network.sequence_length, dtype=torch.int64)}
    return {**values, "image": torch.rand(count, 3, 128, 128)}


def measured(name: str) -> int:
    """Return the bytes that a run of this process takes at its peak."""
    quiet()
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    stage, count = SIZES[name]()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[EMA()], enable_model_summary=False, **options)
    trainer.fit(stage, DataLoader([batch(stage, count)] * STEPS, batch_size=None))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main() -> None:
    print("| run | planned, MB | measured, MB | ratio |\n|---|---|---|---|")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in SIZES:
        with torch.device("meta"):
            count = SIZES[name]()[1]
        result = subprocess.run(
            [sys.executable, __file__, name], env=environment, capture_output=True, text=True, check=True
        )
        ours, theirs = planned(name, count), json.loads(result.stdout.splitlines()[-1])
        print(f"| {name} | {ours / 1e6:.0f} | {theirs / 1e6:.0f} | **{ours / theirs:.2f}** |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measured(sys.argv[1]))
    else:
        main()
