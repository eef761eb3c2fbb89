"""Seconds per image of AliTok's generators beside a diffusion transformer: the headline of arXiv:2506.05289.

AR-B, L and XL draw 272 tokens with the published guidance, ``TokenSampler`` with ``compile`` in bfloat16; DiT-XL/1
takes 249 guided Euler steps in bfloat16 autocast with compiled blocks (on a CPU in float32, uncompiled). Weights are
random: speed does not depend on them. What turns tokens and latents into images is shown apart. The bound of the first
is reading weights, keys and values at the bandwidth of a large copy, that of the others arithmetic at the rate of a
large matmul, both measured here.

    python benchmarks/sampling.py                  # a GPU: in full, batch 64 and 1; a CPU: a few steps, scaled up
    python benchmarks/sampling.py --toy            # tiny networks, in seconds

The paper, on an A800 in float32 at batch 64: 10.1 images/s for L, 6.3 for XL, 0.6 for LightningDiT.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aligntok.decoding import TokenSampler, release
from aligntok.errors import words_of
from aligntok.flow import Euler, Guidance
from aligntok.networks import AutoregressiveTransformer, ConvDecoder, DiT, compile_blocks
from aligntok.networks.token_decoder import TokenDecoder

CODES, GRID, PREFIX, CLASSES, SHAPE = 4096, (16, 16), 16, 1000, (32, 16, 16)
AR = {  # width, depth, heads, and guidance scale and power
    "AR-B": ((768, 24, 16), (16.0, 1.8)),
    "AR-L": ((1024, 24, 16), (6.0, 0.7)),
    "AR-XL": ((1280, 32, 16), (13.0, 1.4)),
    "AR-toy": ((32, 2, 2), (4.0, 1.0)),
}
DITS = {"DiT-XL/1": (1152, 28, 16), "DiT-toy": (32, 2, 2)}
EULER_STEPS = 249
DIT_GUIDANCE = {"scale": 10.0, "channels": 3}  # in all steps: from t = 0
COLUMNS = (
    "row",
    "batch",
    "images/s",
    "s / image",
    "work / image",
    "of the bound",
    "peak memory",
    "made in",
    "measured",
)


@dataclass
class Row:
    """A line of the table.

    Attributes:
        seconds: Per image.
        work: Bytes read or FLOPs, per image.
        peak: Of the machine, in such units per second.
        memory: The most that was allocated, bytes; 0 on a CPU.
        made: Seconds of the first call, with compiling.
        measured: How much of it was run.
    """

    name: str
    batch: int
    seconds: float
    work: float
    unit: str
    peak: float
    memory: int
    made: float
    measured: str

    @property
    def share(self) -> float:
        """Share of the bound that was reached."""
        return self.work / self.peak / self.seconds

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.batch} | {1 / self.seconds:.3g} | {self.seconds:.4g}"
            f" | {self.work / (1e9 if self.unit == 'B' else 1e12):.3g} {'GB' if self.unit == 'B' else 'TFLOP'}"
            f" | {self.share:.0%} | {self.memory / 2**30:.1f} GiB | {self.made:.1f} s | {self.measured} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1] if on_gpu() else [2])
    parser.add_argument("--toy", action="store_true", help="tiny networks: a try of this program")
    parser.add_argument("--attention", action="store_true", help="only: ways to attend from one query, on a GPU")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if on_gpu() else f"CPU, {torch.get_num_threads()} threads"
    rates = f"copy {bandwidth() / 1e9:.0f} GB/s, matmul {matmul_peak() / 1e12:.3g} TFLOP/s"
    print(f"{name}, torch {torch.__version__}; {rates}\n", flush=True)
    if args.attention:
        attention_ways()
        return
    first = args.batch[0]
    sizes = ["AR-toy"] if args.toy else ["AR-B", "AR-L", "AR-XL"]
    rows: list[Callable[[], Row]] = [partial(ar_row, size, first) for size in sizes]
    rows += [partial(dit_row, "DiT-toy" if args.toy else "DiT-XL/1", first)]
    rows += [partial(decoder_row, kind, first, args.toy) for kind in ("tokens", "latents")]
    rows += [partial(ar_row, size, batch) for size in sizes for batch in args.batch[1:]]
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    failed = False
    for row in rows:
        try:
            print(row(), flush=True)
        except Exception as error:  # the rows after it are worth having
            failed = True
            print(f"| {row.args[0]} | {row.args[1]} | failed: {words_of(error)} |", flush=True)
            traceback.print_exc(limit=-6)
    sys.exit(int(failed))


# Rows


def ar_row(size: str, batch: int) -> Row:
    """Measure drawing tokens, e.g. of "AR-B"; on a CPU of a shorter sequence, scaled up."""
    sizes, guidance = AR[size]
    grid, prefix = (GRID, PREFIX) if on_gpu() else ((2, 2), 4)
    network = reset(lambda: AutoregressiveTransformer(CODES, grid, prefix, CLASSES, *sizes))
    sampler = TokenSampler(*guidance, dtype="bfloat16", compile=True)
    ids = torch.arange(batch)
    label = (ids % CLASSES).to(device())
    seconds, made = timed(lambda: sampler(network, label, ids, seed=0))
    full = PREFIX + GRID[0] * GRID[1]
    drawn = network.sequence_length
    linear = sum(weight.numel() for name, weight in network.named_parameters() if "embed" not in name)
    cached = 2 * 2 * batch * sizes[0] * sizes[1] * (full + 1) / 2  # keys and values of both rows, of the average token
    measured = "in full" if drawn == full else f"{drawn} of {full} tokens"
    row = finished(size, batch, seconds * full / drawn, 2 * full * (linear + cached), "B", made, measured)
    release(network)
    return row


def dit_row(size: str, batch: int, num_steps: int = EULER_STEPS) -> Row:
    """Measure sampling of latents; on a CPU by one step, scaled up."""
    steps = num_steps if on_gpu() else 1
    network = reset(lambda: DiT(SHAPE, CLASSES, *DITS[size]))
    if on_gpu():
        compile_blocks(network)
    label = torch.arange(batch, device=device()) % CLASSES
    noise = torch.randn(batch, *SHAPE, device=device())
    velocity = Guidance(**DIT_GUIDANCE).velocity(network, label)

    def sample(count: int) -> Tensor:
        with torch.inference_mode(), torch.autocast(device(), torch.bfloat16, enabled=on_gpu()):
            return Euler(count)(velocity, noise)

    began = time.perf_counter()
    sample(1)
    synchronize()
    made = time.perf_counter() - began
    seconds, _ = timed(lambda: sample(steps), rounds=1, warm=False)
    with torch.device("meta"):
        meta = DiT(SHAPE, CLASSES, *DITS[size])
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        meta(torch.empty(1, *SHAPE), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    work = batch * 2 * num_steps * counter.get_total_flops()
    measured = "in full" if steps == num_steps else f"{steps} of {num_steps} steps"
    return finished(
        f"{size}, {num_steps} guided steps", batch, seconds * num_steps / steps, work, "FLOP", made, measured
    )


def decoder_row(kind: str, batch: int, toy: bool = False) -> Row:
    """Measure from quantized tokens, or from latents, to images of 256 px."""
    if kind == "tokens":
        width, depth, heads = (32, 1, 2) if toy else (1024, 24, 16)
        shape: tuple[int, ...] = (32, 1, PREFIX + 256)
        build = partial(TokenDecoder, 32, 256, 16, width, depth, heads, PREFIX, num_buffer=32)
    else:
        shape = SHAPE
        build = partial(ConvDecoder, 32, 32 if toy else 128, (1, 1, 2, 2, 4), 1 if toy else 3)
    network = reset(build)
    count = batch if on_gpu() else 1
    latent = torch.randn(count, *shape, device=device())

    def decode() -> Tensor:
        with torch.inference_mode(), torch.autocast(device(), torch.bfloat16, enabled=on_gpu()):
            return network(latent)  # type: ignore[no-any-return]

    seconds, made = timed(decode)
    with torch.device("meta"):
        meta = build()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        meta(torch.empty(1, *shape))
    return finished(f"decoder of {kind}", count, seconds, count * counter.get_total_flops(), "FLOP", made, "in full")


def finished(name: str, batch: int, seconds: float, work: float, unit: str, made: float, measured: str) -> Row:
    """Return the row of a batch's seconds and work."""
    peak = bandwidth() if unit == "B" else matmul_peak()
    memory = torch.cuda.max_memory_allocated() if on_gpu() else 0
    return Row(name, batch, seconds / batch, work / batch, unit, peak, memory, made, measured)


# The machine


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if on_gpu() else "cpu"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def reset(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network on the device, in eval mode, after what the row before left."""
    torch.compiler.reset()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device(device()):
        return build().eval()


def timed(run: Callable[[], object], rounds: int = 3, warm: bool = True) -> tuple[float, float]:
    """Return the median seconds, and those of the call before, which compiles."""
    times = []
    for _ in range(rounds + warm):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm:]), times[0]


@cache
def bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes."""
    count = 2**30 if on_gpu() else 2**25
    source = torch.ones(count, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * count / timed(lambda: target.copy_(source), rounds=5)[0]


@cache
def matmul_peak() -> float:
    """Return the FLOP/s of a square matmul, in bfloat16 on a GPU."""
    size, dtype = (8192, torch.bfloat16) if on_gpu() else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    repeats = 10 if on_gpu() else 1

    def run() -> None:
        for _ in range(repeats):
            a @ b

    return 2 * size**3 * repeats / timed(run, rounds=5)[0]


# Attention of one query


def attention_ways() -> None:
    """Print microseconds of one layer's attention of AR-B, and its share of the bandwidth."""
    from aligntok.decoding import attention_triton
    from aligntok.decoding.attention import attend

    def sums(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        scores = (keys.float() * q.float()).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask[:, None], -float("inf")).softmax(dim=-2)
        return (weights * values.float()).sum(-2, keepdim=True).to(q.dtype)

    compiled = torch.compile(sums, dynamic=False)
    print("| rows | tokens | way | us | of the bandwidth |\n|---|---|---|---|---|")
    for rows in (128, 2):
        q = torch.randn(rows, 16, 1, 48, device=device(), dtype=torch.bfloat16)
        keys, values = (torch.randn(rows, 16, 272, 48, device=device(), dtype=torch.bfloat16) for _ in range(2))
        for count in (128, 272):
            position = torch.tensor([count - 1], device=device())
            k, v, mask = keys[:, :, :count], values[:, :, :count], torch.ones(count, dtype=torch.bool, device=device())
            ways = {
                "attend": partial(attend, q, keys, values, position),
                "SDPA, exact length": partial(F.scaled_dot_product_attention, q, k, v),
                "SDPA, mask": partial(F.scaled_dot_product_attention, q, k, v, mask[None]),
                "sums, compiled": partial(compiled, q, k, v, mask),
            }
            for name, way in ways.items():
                with torch.inference_mode():
                    seconds = graph_seconds(way)
                share = 2 * 2 * rows * 16 * count * 48 / seconds / bandwidth()
                print(f"| {rows} | {count} | {name} | {1e6 * seconds:.1f} | {share:.0%} |", flush=True)
            for tile in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4), (128, 8), (256, 8)) if on_gpu() else ():
                attention_triton.TILES = {True: tile, False: tile}
                with torch.inference_mode():
                    seconds = graph_seconds(ways["attend"])
                share = 2 * 2 * rows * 16 * count * 48 / seconds / bandwidth()
                print(f"| {rows} | {count} | tile {tile} | {1e6 * seconds:.1f} | {share:.0%} |", flush=True)


def graph_seconds(way: Callable[[], Tensor], repeats: int = 50) -> float:
    """Return the seconds of a call; on a GPU in a graph, without the host."""
    way()
    if not on_gpu():
        return timed(way)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            way()
    return timed(graph.replay)[0] / repeats


if __name__ == "__main__":
    main()
