"""Tokens per second of guided sampling from AliTok-B, against a loop in the published way.

The published way (written from a description of its generation code): float32; the keys and values of a layer grow by
``torch.cat``, the whole sequence is embedded at each step, class and null class run as one batch, gate and value of the
MLP are two layers, the mask of all positions is sliced. Both have the same weights and draw from the same logits; they
take turns. A step is bound by reading the weights, so the last column is the share of the memory bandwidth, measured in
the same run, at which the step reads them. "Layers alone" are the linear layers of a step one after another, with
nothing between them: as fast as a step can be with torch's products of few rows.

    python benchmarks/decoding.py                 # 60 of the 273 tokens, batches 1, 4, 16
    python benchmarks/decoding.py --steps 12 --rounds 1 --batch 1
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.decoding import TokenSampler
from aligntok.decoding.cached import StepLinear
from aligntok.decoding.native import fits
from aligntok.networks import AutoregressiveTransformer

GUIDANCE = (16.0, 1.8)  # of AliTok-B
SIZE = {"width": 768, "depth": 24, "num_heads": 16}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", choices=list(BYTES), default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=60, help="of the 273")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    network = AutoregressiveTransformer(4096, (16, 16), 17, 1000, **SIZE).eval()
    nn.init.normal_(network.head.weight, std=0.1)  # zero at the start, and then every token is as likely
    threads = torch.get_num_threads()
    kind = "CPU" if threads == 1 else "wall-clock"
    print(f"{threads} threads, {kind} time, first {args.steps} steps, torch {torch.__version__}\n")
    print("| batch | way | ms / step | tokens / s | ratio (rounds) | GB/s | of the bandwidth |\n" + "|---" * 7 + "|")
    for batch in args.batch:
        compare(network, batch, args.dtype, args.steps, args.rounds)
    print(f"\nSumming the float32 weights of the linear layers one after another: {1e3 * summed(network):.1f} ms")


def clock() -> float:
    """Return seconds; of the CPU where one thread works, as other work may run beside it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def compare(network: AutoregressiveTransformer, batch: int, dtypes: list[str], steps: int, rounds: int) -> None:
    """Print the rows of one batch size."""
    ways: dict[str, Callable[[], list[float]]] = {"published": lambda: published(network, batch, steps)}
    for dtype in dtypes:
        ways[dtype] = lambda dtype=dtype: ours(network, batch, dtype, steps)
        if fits(network, 2 * batch, getattr(torch, dtype)):
            ways[f"{dtype}, compiled"] = lambda dtype=dtype: ours(network, batch, dtype, steps, compile=True)
        ways[f"{dtype}, layers alone"] = lambda dtype=dtype: layers_alone(network, batch, dtype, steps)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    bandwidths = []
    for _ in range(rounds):
        bandwidths.append(bandwidth())
        for name, run in ways.items():
            seconds[name].append(statistics.median(run()))
    peak = max(bandwidths)
    for name, values in seconds.items():
        step = statistics.median(values)
        ratios = sorted(theirs / own for theirs, own in zip(seconds["published"], values, strict=True))
        rate = weight_bytes(network, BYTES.get(name.split(",")[0], 4)) / step
        print(
            f"| {batch} | {name} | {1e3 * step:.1f} | {batch / step:.0f} | **{statistics.median(ratios):.2f}**"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {rate / 1e9:.1f} | {rate / peak:.0%} of {peak / 1e9:.1f} |",
            flush=True,
        )


def bandwidth() -> float:
    """Return the bytes per second at which all threads read: the best of some sums of 400 MB."""
    values, best = torch.ones(10**8), math.inf
    for _ in range(5):
        began = clock()
        values.sum()
        best = min(best, clock() - began)
    return 4e8 / best


@torch.inference_mode()
def summed(network: AutoregressiveTransformer) -> float:
    """Return the seconds of reading each weight of the linear layers once, the median of ten times."""
    times = [clock()]
    for _ in range(10):
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight.sum()
        times.append(clock())
    return statistics.median(later - now for now, later in itertools.pairwise(times))


def weight_bytes(network: AutoregressiveTransformer, size: int) -> int:
    """Return the bytes of weights that a step reads: all but the embedding table."""
    return size * sum(parameter.numel() for name, parameter in network.named_parameters() if "embed" not in name)


# Ours


class Enough(Exception):
    """Ends the sampling."""


class Clocked(TokenSampler):
    """Notes the time of each step and stops after some."""

    def draw(self, logits: Tensor, keys: Tensor, step: int) -> Tensor:
        tokens = super().draw(logits, keys, step)
        self.times.append(clock())
        if len(self.times) > self.steps:
            raise Enough
        return tokens


def ours(network: AutoregressiveTransformer, batch: int, dtype: str, steps: int, compile: bool = False) -> list[float]:
    """Return the seconds of each step but the first."""
    sampler = Clocked(*GUIDANCE, dtype=dtype, compile=compile)
    sampler.times, sampler.steps = [], steps
    with contextlib.suppress(Enough):
        sampler(network, torch.arange(batch), torch.arange(batch), seed=0)
    return [later - now for now, later in itertools.pairwise(sampler.times)]


@torch.inference_mode()
def layers_alone(network: AutoregressiveTransformer, batch: int, dtype: str, steps: int) -> list[float]:
    """Return the seconds that the linear layers of each step take."""
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    kind, rows = getattr(torch, dtype), 2 * batch
    functions = [StepLinear(linear, kind, rows, pack=True) for linear in linears]
    inputs = [torch.randn(rows, linear.in_features, dtype=kind) for linear in linears]
    times = [clock()]
    for _ in range(steps):
        for function, x in zip(functions, inputs, strict=True):
            function(x)
        times.append(clock())
    return [later - now for now, later in itertools.pairwise(times)]


# The published way


@torch.no_grad()
def published(network: AutoregressiveTransformer, batch: int, steps: int) -> list[float]:
    """Return the seconds of each step but the first."""
    length = network.sequence_length
    mask = torch.full((length + 1, length + 1), -math.inf).triu(1)
    starts = torch.cat((torch.arange(batch), torch.full((batch,), 1000))) + network.codebook_size + 1
    tokens = torch.zeros(batch, 0, dtype=torch.int64)
    cache: list[tuple[Tensor, Tensor] | None] = [None] * len(network.blocks)
    halves = [block.mlp.proj_in.weight.chunk(2) for block in network.blocks]
    times = []
    for step in range(steps + 1):
        scale = 1 + (GUIDANCE[0] - 1) * (1 - math.cos(math.pi * (step / length) ** GUIDANCE[1])) / 2
        x = network.embed(torch.cat((starts[:, None], tokens.repeat(2, 1)), dim=1))[:, step:]
        rotary = network.rotary[: step + 1][step:]
        for index, block in enumerate(network.blocks):
            attention = block.attention
            q, k, v = attention.qkv(norm(block.norm_attention, x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (network.num_heads, -1)) for part in (q, k, v))
            q, k = turn(norm(attention.q_norm, q), rotary), turn(norm(attention.k_norm, k), rotary)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            if cache[index] is not None:
                k, v = torch.cat((cache[index][0], k), dim=2), torch.cat((cache[index][1], v), dim=2)
            cache[index] = (k, v)
            y = F.scaled_dot_product_attention(q, k, v, mask[step : step + 1, : step + 1])
            x = x + attention.proj(y.transpose(1, 2).flatten(2))
            y = norm(block.norm_mlp, x)
            gate, value = halves[index]
            x = x + block.mlp.proj_out(F.silu(F.linear(y, gate)) * F.linear(y, value))
        logits = network.head(norm(network.norm, x))[:, -1]
        guided = logits[batch:] + (logits[:batch] - logits[batch:]) * scale
        drawn = torch.multinomial(guided.softmax(dim=-1), 1)
        tokens = torch.cat((tokens, drawn), dim=1)
        times.append(clock())
    return [later - now for now, later in itertools.pairwise(times)]


def norm(module: nn.Module, x: Tensor) -> Tensor:
    values = x.float()
    return (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + module.eps)).type_as(x) * module.weight


def turn(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs of channels of (B, N, num_heads, head_dim), in real numbers."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cos, sin = rotary[None, :, None].unbind(-1)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(3).type_as(x)


if __name__ == "__main__":
    main()
