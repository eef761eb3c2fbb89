"""Images per second and share of the peak on one GPU: training, encoding, decoding. All rows in under 9 minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only dit ar --eager --profile
    python benchmarks/gpu.py --toy                              # small sizes, also on a CPU: that it runs

Training rows are the stages at the papers' sizes with random weights, each in a Lightning Trainer as its config has
it: bf16-mixed, compiled blocks, TF32, gradient norms and clipping, fused AdamW, average of the weights. FLOPs are those
that torch's formulas count in one step of the same stage without compilation: matmuls, convolutions and attention,
forward and backward; frozen networks count, elementwise work does not, causal attention counts in full. The peak is
that of a large bf16 matmul just before. A row that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from alitok_training import made
from dit import quiet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry
from torchvision.models import convnext_small
from training_step import paper256, tiny32

from aligntok.callbacks import EMA
from aligntok.flow import FlowMatching, TimeSampling
from aligntok.losses import LogitDistance, PerceptualTerm, ReconstructionLoss
from aligntok.networks import (
    AutoregressiveTransformer,
    DiT,
    Frozen,
    LinearAdapter,
    QueryEncoder,
    TokenDecoder,
    Tokenizer,
    VectorQuantizer,
    compile_blocks,
)
from aligntok.networks.frozen import load_frozen
from aligntok.stages import AutoregressiveGeneration, CausalTokenization, LatentDiffusion, Optimization, Stage

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if ON_GPU else "cpu"), torch.bfloat16 if ON_GPU else torch.float32
WARM_UP, STEPS, PROFILED = 4, 12, 3
COUNTED = 2  # images of the step whose FLOPs are counted
HEADER = "| what | batch | images/s | GFLOP / image | TFLOP/s | share of the matmul peak | peak memory, GB | start, s |"


class Work(NamedTuple):
    """A stage and the batch that it trains on."""

    stage: Stage
    batch: dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(TRAINING | INFERENCE), help="rows")
    parser.add_argument("--eager", action="store_true", help="each training row without compilation, too")
    parser.add_argument("--profile", action="store_true", help="the kernels that take the time of a step")
    parser.add_argument("--toy", action="store_true", help="small sizes")
    args = parser.parse_args()
    quiet()
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    peak = matmul_peak(256 if args.toy else 8192)
    print(f"{name}, torch {torch.__version__}; bf16 matmul {peak / 1e12:.3g} TFLOP/s\n\n{HEADER}\n{'|---' * 8}|")
    for key in args.only or TRAINING | INFERENCE:
        for compiled in (True, False) if args.eager and key in TRAINING else (ON_GPU,):
            try:
                row(key, compiled, peak, args)
            except Exception as error:
                print(f"| {key} | failed: {type(error).__name__}: {str(error)[:2000]} |", flush=True)
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()


def row(key: str, compiled: bool, peak: float, args: argparse.Namespace) -> None:
    """Measure one row and print it."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    began, kernels = time.perf_counter(), ""
    if key in TRAINING:
        work = TRAINING[key](args.toy)
        count, flops = len(next(iter(work.batch.values()))), training_flops(work)
        clock = train(work, compiled, args.profile)
        rate, start = count / clock.step(), clock.first - began
        kernels = clock.kernels()
    else:
        count, flops, action = INFERENCE[key](args.toy, compiled)
        action()
        start = time.perf_counter() - began
        rate = count / seconds(action)
    memory = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else float("nan")
    done = rate * flops
    print(
        f"| {key}{'' if compiled else ', eager'} | {count} | **{rate:.4g}** | {flops / 1e9:.4g} | {done / 1e12:.3g}"
        f" | **{done / peak:.1%}** | {memory:.1f} | {start:.0f} |{kernels}",
        flush=True,
    )


# What is measured


def alignment(toy: bool) -> Work:
    """AlignTok stage 2 with GAN: DINOv2-L/14, VA-VAE's decoder, LPIPS, PatchGAN, 256 px."""
    stage, size = tiny32() if toy else paper256()
    stage.loss.adversarial.discriminator_start = 0
    count = 4 if toy else 32
    stage.to(DEVICE).measure_latents([torch.rand(count, 3, size, size)])
    return Work(stage, images(count, size))


def causal(toy: bool) -> Work:
    """AliTok stage 1, second version: ViT-B and ViT-L, ConvNeXt-S' logits of image and prefix, 256 px."""
    size = 64 if toy else 256
    stage = tiny_causal(size) if toy else made("stage 1, causal tokenization")[0]
    logits = LogitDistance(32 if toy else 224)
    logits.network = Frozen(convnext_small)
    loss = ReconstructionLoss("mse", {"logits": PerceptualTerm(logits)})
    stage = CausalTokenization(stage.tokenizer, loss, stage.optimization, auxiliary="perceptual", prefix_weight=16.0)
    return Work(stage, images(2 if toy else 80, size))


def tiny_causal(size: int) -> CausalTokenization:
    encoder, decoder = QueryEncoder(size, 16, 32, 1, 2, 4), TokenDecoder(8, size, 16, 32, 1, 2, 4, 1, True, True)
    return CausalTokenization(
        Tokenizer(encoder, LinearAdapter(32, 8), decoder, VectorQuantizer(16, 8)), auxiliary="mse"
    )


def diffusion(toy: bool) -> Work:
    """DiT-XL/1 on latents 32x16x16."""
    width, depth, num_heads = (64, 2, 2) if toy else (1152, 28, 16)
    network = DiT((32, 16, 16), 1000, width, depth, num_heads)
    objective = FlowMatching(TimeSampling("logit_normal"), cosine_weight=1.0)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    count = 4 if toy else 128
    batch = {
        "latent": torch.randn(count, 32, 16, 16),
        "label": torch.randint(1000, (count,)),
        "id": torch.arange(count),
    }
    return Work(LatentDiffusion(network, objective=objective, optimization=Optimization(2e-4, adamw)), batch)


def autoregression(toy: bool) -> Work:
    """AliTok's generator B on 272 tokens."""
    network = AutoregressiveTransformer(16, (4, 4), 4, 1000, width=32, depth=2, num_heads=2)
    stage = AutoregressiveGeneration(network) if toy else made("generator B")[0]
    count = 2 if toy else 256
    tokens = torch.randint(stage.network.codebook_size, (count, stage.network.sequence_length))
    return Work(stage, {"tokens": tokens, "label": torch.randint(1000, (count,)), "id": torch.arange(count)})


def images(count: int, size: int) -> dict[str, Tensor]:
    return {"image": torch.rand(count, 3, size, size), "id": torch.arange(count)}


def encoding(toy: bool, compiled: bool) -> tuple[int, float, Callable[[], Any]]:
    """Images to latents: DINOv2-L/14 and the adapter, as ``aligntok encode`` calls them."""
    stage, size = tiny32() if toy else paper256()
    return inference(stage.tokenizer.encode, stage.tokenizer, compiled, torch.rand(4 if toy else 256, 3, size, size))


def decoding(toy: bool, compiled: bool) -> tuple[int, float, Callable[[], Any]]:
    """Latents to images: VA-VAE's decoder."""
    stage, _ = tiny32() if toy else paper256()
    shape = stage.tokenizer.spec.latent_shape
    return inference(stage.tokenizer.decode, stage.tokenizer, compiled, torch.randn(4 if toy else 64, *shape))


def inference(
    function: Callable[[Tensor], Tensor], network: nn.Module, compiled: bool, given: Tensor
) -> tuple[int, float, Callable[[], Any]]:
    """Return how many images a call takes, the FLOPs of one, and the call."""
    network.to(DEVICE).eval()
    given = given.to(DEVICE)

    def action(count: int | None = None) -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, DTYPE, enabled=ON_GPU):
            function(given[:count])

    with Flops() as counter:
        action(COUNTED)
    if compiled:
        compile_blocks(network)
    return len(given), counter.total / min(COUNTED, len(given)), action


TRAINING = {"stage2": alignment, "alitok1": causal, "dit": diffusion, "ar": autoregression}
INFERENCE = {"encode": encoding, "decode": decoding}


# Measuring


class Clock(pl.Callback):
    """When each step began, by the GPU's clock, for which the host does not wait; then a profile of more steps."""

    def __init__(self, profiles: bool) -> None:
        self.began: list[Any] = []
        self.first = 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) if profiles else None

    def on_train_batch_start(self, *_: Any) -> None:
        if len(self.began) <= WARM_UP + STEPS:
            self.began.append(moment())
        if len(self.began) == WARM_UP + 1:
            self.first = time.perf_counter()
        if len(self.began) == WARM_UP + STEPS + 1 and self.profiler is not None:
            self.profiler.start()
            self.began.append(None)

    def on_train_end(self, *_: Any) -> None:
        if self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.stop()

    def step(self) -> float:
        """Return the seconds of a step after the warm-up."""
        times = [time for time in self.began if time is not None]
        first, last = times[WARM_UP], times[-1]
        if isinstance(first, float):
            return (last - first) / (len(times) - 1 - WARM_UP)
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / (len(times) - 1 - WARM_UP)

    def kernels(self) -> str:
        """Return the kernels that took the most time of the profiled steps, milliseconds of a step, a line each."""
        if self.profiler is None:
            return ""
        events = [event for event in self.profiler.key_averages() if event.device_type.name == "CUDA"]
        events = sorted(events, key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        lines = [f"    {total / 1e3 / PROFILED:8.2f} ms in all"]
        for e in events[:30]:
            lines.append(f"    {e.self_device_time_total / 1e3 / PROFILED:8.2f} ms {e.count:6d} x {e.key[:110]}")
        return "\n" + "\n".join(lines)


def moment() -> Any:
    """Return a recorded event of the GPU, or the time of a CPU."""
    if not ON_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def train(work: Work, compiled: bool, profiles: bool) -> Clock:
    """Train as a recipe does, and return the times."""
    if compiled:
        load_frozen(work.stage)
        compile_blocks(work.stage)
    clock = Clock(profiles and ON_GPU)
    steps = WARM_UP + STEPS + PROFILED if ON_GPU else WARM_UP + 2
    trainer = pl.Trainer(
        accelerator=DEVICE.type,
        devices=1,
        precision="bf16-mixed" if ON_GPU else "32-true",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[EMA(0.9999), clock],
        log_every_n_steps=1000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(work.stage, DataLoader([work.batch] * steps, batch_size=None, pin_memory=ON_GPU))
    return clock


class Flops(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, whose hooks do not stand ``autograd.grad`` at a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=value)
        return value


def training_flops(work: Work) -> float:
    """Return the FLOPs of a training step, for one image."""
    stage = work.stage.to(DEVICE).train()
    batch = {key: value[:COUNTED].to(DEVICE) for key, value in work.batch.items()}
    with Flops() as counter:
        with torch.autocast(DEVICE.type, DTYPE, enabled=ON_GPU):
            loss = stage.training_step(batch, 0)
        loss.backward()
    stage.zero_grad()
    return counter.total / len(next(iter(batch.values())))


def seconds(action: Callable[[], Any], times: int = 5) -> float:
    """Return the seconds of a call."""
    began = moment()
    for _ in range(times):
        action()
    ended = moment()
    if isinstance(began, float):
        return (ended - began) / times
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / times


def matmul_peak(size: int) -> float:
    """Return the FLOP/s of a bf16 matmul of square random matrices."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / seconds(lambda: a @ b, 20)


if __name__ == "__main__":
    main()
