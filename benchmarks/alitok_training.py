"""Seconds of AliTok's training steps at the paper's sizes, and the share of the machine's matmul peak they reach.

    OMP_NUM_THREADS=1 python benchmarks/alitok_training.py

Both tokenizer stages (encoder ViT-B, decoder ViT-L, second version, 256 px, 4096 codes; the pixel terms alone, because
the perceptual networks and the discriminator are measured in training_step.py) and the generator B on 272 tokens, each
in a Lightning Trainer as the configs have it: loss, backward, gradient norm, fused AdamW. After each step a large
square matmul is timed; the best of them is the peak. FLOPs are those of matmuls and attention in the formulas, three
times for what learns and once for what is frozen. Recomputed or masked work does not count as done: causal attention
counts half.

With one thread the seconds are the process's CPU seconds, with more those of the wall clock.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from dit import clock, quiet
from torch import nn
from torch.utils.data import DataLoader

from aligntok.losses import ReconstructionLoss
from aligntok.networks import (
    AutoregressiveTransformer,
    LinearAdapter,
    QueryEncoder,
    TokenDecoder,
    Tokenizer,
    VectorQuantizer,
)
from aligntok.stages import AutoregressiveGeneration, CausalTokenization, DecoderRefinement, Optimization

IMAGE_SIZE, PATCH, LATENT_DIM, CODES, NUM_PREFIX, NUM_CLASSES = 256, 16, 32, 4096, 16, 1000
PATCHES = (IMAGE_SIZE // PATCH) ** 2
TOKENS = NUM_PREFIX + PATCHES
SIZES = {"encoder": (768, 12, 12), "decoder": (1024, 24, 16), "generator": (768, 24, 16)}  # width, depth, heads
ROWS = {
    "stage 1, causal tokenization": 1,  # images of a batch
    "stage 2, decoder refinement": 1,
    "generator B": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps")
    parser.add_argument("--matmul", type=int, default=2048, help="rows of the square matrices")
    args = parser.parse_args()
    quiet()
    threads = torch.get_num_threads()
    print(f"{threads} threads, {'CPU' if threads == 1 else 'wall-clock'} seconds, fp32, torch {torch.__version__}\n")
    print("| training step | batch | s / step (range) | TFLOP / step | GFLOP/s | peak, GFLOP/s | share of it |")
    print("|---|---|---|---|---|---|---|")
    for row, batch in ROWS.items():
        torch.manual_seed(0)
        stage, flops = made(row)
        watch = Watch(args.matmul)
        train(stage, batch, args.rounds, watch)
        step, peak, done = statistics.median(watch.seconds[1:]), max(watch.peaks), batch * flops
        low, high = min(watch.seconds[1:]), max(watch.seconds[1:])
        print(
            f"| {row} | {batch} | {step:.2f} ({low:.2f} to {high:.2f}) | {done / 1e12:.2f} | {done / step / 1e9:.0f}"
            f" | {peak / 1e9:.0f} | **{done / step / peak:.0%}** |",
            flush=True,
        )


def made(row: str) -> tuple[Any, float]:
    """Return a stage, and the FLOPs of its step for one image."""
    adamw = partial(torch.optim.AdamW, fused=True)
    if row == "generator B":
        width, depth, heads = SIZES["generator"]
        network = AutoregressiveTransformer(CODES, (16, 16), NUM_PREFIX, NUM_CLASSES, width, depth, heads)
        linear = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear))
        flops = 3 * (2 * linear * TOKENS + attention("generator", TOKENS) / 2)
        return AutoregressiveGeneration(network, None, optimization=Optimization(1e-4, adamw)), flops
    first = row.startswith("stage 1")
    buffer = 1 if first else 64
    encoder = QueryEncoder(IMAGE_SIZE, PATCH, *SIZES["encoder"], NUM_PREFIX)
    sizes = (LATENT_DIM, IMAGE_SIZE, PATCH, *SIZES["decoder"], NUM_PREFIX, buffer)
    decoder = TokenDecoder(*sizes, causal=first, prefix_head=first)
    quantizer = VectorQuantizer(CODES, LATENT_DIM)
    tokenizer = Tokenizer(encoder, LinearAdapter(SIZES["encoder"][0], LATENT_DIM), decoder, quantizer)
    encoding = transformer("encoder", PATCHES + TOKENS) + attention("encoder", PATCHES + TOKENS)
    seen = attention("decoder", buffer + TOKENS)
    decoding = transformer("decoder", buffer + TOKENS) + (seen / 2 if first else seen)
    options: dict[str, Any] = {"loss": ReconstructionLoss("mse"), "optimization": Optimization(1e-4, adamw)}
    if first:
        return CausalTokenization(tokenizer, auxiliary="mse", **options), 3 * (encoding + decoding)
    return DecoderRefinement(tokenizer, **options), encoding + 3 * decoding


def transformer(part: str, tokens: int) -> float:
    """Return the FLOPs of a forward pass through the linear layers of ViT blocks: 12 width^2 weights each."""
    width, depth, _ = SIZES[part]
    return 2 * 12 * width**2 * depth * tokens


def attention(part: str, tokens: int) -> float:
    """Return the FLOPs of a forward pass through the two products of attention, all tokens with all."""
    width, depth, _ = SIZES[part]
    return 4 * tokens**2 * width * depth


def train(stage: Any, batch: int, rounds: int, watch: pl.Callback) -> None:
    steps = 1 + rounds
    rows = {
        "image": torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE),
        "tokens": torch.randint(CODES, (batch, TOKENS)),
        "label": torch.randint(NUM_CLASSES, (batch,)),
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(stage, DataLoader([rows] * steps, batch_size=None))


class Watch(pl.Callback):
    """Times each step, and a matmul after it."""

    def __init__(self, size: int) -> None:
        self.factors = torch.randn(2, size, size)
        self.flops = 2 * size**3
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = clock()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(clock() - self.began)
        for _ in range(3):
            began = clock()
            self.factors[0] @ self.factors[1]
            self.peaks.append(self.flops / (clock() - began))


if __name__ == "__main__":
    main()
