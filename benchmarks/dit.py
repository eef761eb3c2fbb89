"""Seconds of DiT's training step, the share of the machine's matmul peak that it reaches, and seconds of sampling.

    OMP_NUM_THREADS=1 python benchmarks/dit.py
    OMP_NUM_THREADS=1 python benchmarks/dit.py --precision 32-true bf16-mixed

Training is ``LatentDiffusion`` in a Lightning Trainer as our configs have it: loss, backward, gradient norm, fused
AdamW, EMA; latents of 32x16x16, 1000 classes, random weights. Every other step of the same run does the last two the
peer's way: AdamW as torch makes it by default, and the EMA one parameter after the other. After each step a large
square matmul of the same dtype is timed; the best of them is the machine's peak. FLOPs are those of matmuls and
attention in the formulas, three times for training. One more step runs in torch's profiler, by operator.

With one thread the seconds are the process's CPU seconds, which other work on the machine hardly touches; with more
they are those of the wall clock.

Peer: hustvl/LightningDiT at 2725fed, train.py.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from aligntok.callbacks import EMA
from aligntok.flow import Euler, Guidance
from aligntok.networks import ConvDecoder, DiT
from aligntok.stages import LatentDiffusion, Optimization

SHAPE, NUM_CLASSES = (32, 16, 16), 1000
SIZES = {"S/1": (384, 12, 6), "B/1": (768, 12, 12)}  # width, depth, heads
BATCHES = {"S/1": 8, "B/1": 2}
SKIPPED = 1  # steps at the start, in which the optimizer allocates its state
START = 0.3  # of the guidance interval
GUIDANCE = {"off": Guidance(), "on": Guidance(2.0), f"in [{START}, 1)": Guidance(2.0, start=START)}
OPERATORS = {  # in torch's profiler, by the beginning of the name
    "matmul": ("aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("aten::_fused_adamw_",),
    "EMA": ("aten::_foreach_lerp_", "aten::lerp_"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None, help="by default what OMP_NUM_THREADS says")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--precision", nargs="+", default=["32-true"], help="32-true, bf16-mixed")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way")
    parser.add_argument("--passes", type=int, default=1, help="over all rows of sampling")
    parser.add_argument("--matmul", type=int, default=2048, help="rows of the square matrices")
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 20], help="of the sampler; none: no sampling")
    parser.add_argument("--sampled", type=int, default=4, help="images of a sampled batch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet()
    threads, shape = torch.get_num_threads(), "x".join(map(str, SHAPE))
    kind = "CPU" if threads == 1 else "wall-clock"
    print(f"{threads} threads, {kind} seconds, latents {shape}, torch {torch.__version__}\n")
    if args.sizes:
        training([(size, precision) for size in args.sizes for precision in args.precision], args.rounds, args.matmul)
    if args.steps:
        sampling(args.steps, args.sampled, args.passes)


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


# Training


def training(runs: list[tuple[str, str]], rounds: int, matmul: int) -> None:
    """Print the tables of training steps."""
    print(
        "| DiT | batch | precision | s / step (range) | TFLOP / step | GFLOP/s | matmul peak, GFLOP/s | share of it |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    watches = []
    for size, precision in runs:
        watch = train(size, precision, rounds, matmul)
        steps, flops, peak = watch.seconds[False], training_flops(size), max(watch.peaks)
        step = statistics.median(steps)
        print(
            f"| {size} | {BATCHES[size]} | {precision} | {step:.2f} ({min(steps):.2f} to {max(steps):.2f})"
            f" | {flops / 1e12:.3f} | {flops / step / 1e9:.0f} | {peak / 1e9:.0f} | **{flops / step / peak:.0%}** |",
            flush=True,
        )
        watches.append((f"| {size} | {precision} | ", watch))
    print("\n| % of a step | precision |", " | ".join(OPERATORS), "| the rest |\n|---|---|" + "---|" * 5)
    for name, watch in watches:
        print(name + " | ".join(f"{100 * share:.0f}" for share in watch.shares()) + " |")
    print(
        "\n| AdamW and EMA, s | precision | ours | the peer's | ratio | whole step, the peer's / ours |\n"
        + "|---" * 6
        + "|"
    )
    for name, watch in watches:
        ours, peer = (statistics.median(watch.updates[way]) for way in (False, True))
        step = statistics.median(watch.seconds[False])
        print(name + f"{ours:.3f} | {peer:.3f} | **{peer / ours:.1f}** | {(step - ours + peer) / step:.2f} |")


def train(size: str, precision: str, rounds: int, matmul: int) -> Watch:
    """Train for some steps, ours and the peer's in turn; return what was measured."""
    generator = torch.Generator().manual_seed(0)
    count = BATCHES[size]
    steps = SKIPPED + 2 * rounds + 1
    batches = [
        {
            "latent": torch.randn(count, *SHAPE, generator=generator),
            "label": torch.randint(NUM_CLASSES, (count,), generator=generator),
        }
        for _ in range(steps)
    ]
    ema = EitherEMA(decay=0.9999)
    watch = Watch(ema, matmul, torch.float32 if precision == "32-true" else torch.bfloat16, last=steps - 1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=steps,
        callbacks=[ema, watch],  # in this order: the average belongs to the step
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(make_stage(size), DataLoader(batches, batch_size=None))
    return watch


def make_stage(size: str) -> LatentDiffusion:
    """Return the stage as our configs have it, with random weights where training starts from zeros."""
    torch.manual_seed(0)
    network = DiT(SHAPE, NUM_CLASSES, *SIZES[size])
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    optimizer = partial(ClockedAdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return LatentDiffusion(network, optimization=Optimization(2e-4, optimizer))


class ClockedAdamW(torch.optim.AdamW):
    """Knows the seconds of its last step without the backward pass, which Lightning runs in it."""

    def step(self, closure: Any) -> Any:
        loss = closure()
        began = clock()
        super().step()
        self.seconds = clock() - began
        return loss


class EitherEMA(EMA):
    """Our EMA; or, where ``one_by_one``, the peer's: a loop over the parameters, two operations each."""

    one_by_one = False

    def on_train_batch_end(self, *args: Any) -> None:
        began = clock()
        super().on_train_batch_end(*args)
        self.seconds = clock() - began

    @torch.no_grad()
    def average(self, averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
        if not self.one_by_one:
            super().average(averages, weights, decay)
            return
        for average, weight in zip(averages, weights, strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)


class Watch(pl.Callback):
    """Seconds of each step from batch to average, of a matmul after it, and a profile of the last step."""

    def __init__(self, ema: EitherEMA, matmul: int, dtype: torch.dtype, last: int) -> None:
        self.ema, self.last = ema, last
        self.matrices = torch.randn(2, matmul, matmul).to(dtype)
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether AdamW and EMA are the peer's
        self.updates: dict[bool, list[float]] = {False: [], True: []}
        self.peaks: list[float] = []
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.ema.one_by_one = index >= SKIPPED and index != self.last and (index - SKIPPED) % 2 == 1
        for group in trainer.optimizers[0].param_groups:  # the state is the same for both
            group["fused"] = None if self.ema.one_by_one else True
        if index == self.last:
            self.profiler.start()
        self.began = clock()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        index = args[-1]
        if index == self.last:
            self.profiler.stop()
            return
        if index >= SKIPPED:
            self.seconds[self.ema.one_by_one].append(clock() - self.began)
            update = trainer.optimizers[0].seconds + self.ema.seconds
            self.updates[self.ema.one_by_one].append(update)
        began = clock()
        torch.mm(*self.matrices)
        self.peaks.append(2 * self.matrices.shape[1] ** 3 / (clock() - began))

    def shares(self) -> list[float]:
        """Return the share of the profiled step's time in each kind of operator, and in all others."""
        times = {event.key: event.self_cpu_time_total for event in self.profiler.key_averages()}
        total = sum(times.values())
        parts = [sum(time for key, time in times.items() if key.startswith(names)) for names in OPERATORS.values()]
        return [part / total for part in [*parts, total - sum(parts)]]


def training_flops(size: str) -> float:
    """Return the FLOPs of the matmuls and the attention of a training step: a backward pass is two forward passes."""
    return 3 * BATCHES[size] * forward_flops(size)


def forward_flops(size: str) -> float:
    """Return the FLOPs of a forward pass of one sample: 2 for each weight of a layer and token, and attention's."""
    width, depth, num_heads = SIZES[size]
    with torch.device("meta"):
        network = DiT(SHAPE, NUM_CLASSES, width, depth, num_heads)
    num_tokens = SHAPE[1] * SHAPE[2]
    total = depth * 4 * num_tokens**2 * width  # queries with keys, weights with values
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            once = "modulation" in name or "embed_time" in name  # for the condition, not for each token
            total += 2 * module.weight.numel() * (1 if once else num_tokens)
    return total


# Sampling


@torch.no_grad()
def sampling(steps: list[int], count: int, passes: int) -> None:
    """Print the table of sampling."""
    stage = make_stage("S/1").eval()
    rows: list[int] = []
    stage.network.register_forward_pre_hook(lambda network, inputs: rows.append(len(inputs[0])))
    ids, label = torch.arange(count), torch.arange(count)
    seconds: dict[tuple[str, int], list[float]] = {}
    evaluations: dict[tuple[str, int], float] = {}
    for _ in range(passes):
        for num_steps in steps:
            for name, guidance in GUIDANCE.items():
                stage.guidance = guidance
                rows.clear()
                began = clock()
                stage.sample(ids, label, Euler(num_steps))
                seconds.setdefault((name, num_steps), []).append((clock() - began) / count)
                evaluations[name, num_steps] = sum(rows) / count
    print(f"\nDiT-S/1, Euler, batch {count}, fp32, latents:\n")
    print("| guidance | steps | evaluations / image | s / image | ratio to off | s / evaluation |\n" + "|---" * 6 + "|")
    for (name, num_steps), values in seconds.items():
        value, number = statistics.median(values), evaluations[name, num_steps]
        times = value / statistics.median(seconds["off", num_steps])
        print(f"| {name} | {num_steps} | {number:g} | {value:.2f} | {times:.2f} | {value / number:.4f} |")
    if len(steps) > 1:
        first, last = min(steps), max(steps)
        slopes = {
            name: (statistics.median(seconds[name, last]) - statistics.median(seconds[name, first])) / (last - first)
            for name in GUIDANCE
        }
        print("\nEach further step, s / image: " + ", ".join(f"{name} {value:.3f}" for name, value in slopes.items()))
    decoder = ConvDecoder(SHAPE[0], width=128, multipliers=(1, 1, 2, 2, 4), num_blocks=3).eval()
    began = clock()
    decoder(torch.randn(1, *SHAPE))
    print(f"Decoding one latent to 256 px by the 41 M decoder: {clock() - began:.2f} s")


def quiet() -> None:
    """Drop Lightning's tips."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
