"""Seconds of TextDiT's training step beside DiT's, and of sampling with a prompt's keys and values kept or made anew.

    OMP_NUM_THREADS=1 python benchmarks/text.py
    OMP_NUM_THREADS=1 python benchmarks/text.py --size b --tokens 64 256 --device cuda

Latents of 32x16x16, random weights, features of width 2304 (T5Gemma's), two adapter blocks. A training step is forward
and backward of the loss; sampling is guided Euler. A GPU computes in bfloat16 autocast, with compiled blocks. Ways are
timed in turn, so that other work on the machine meets all of them; the median is shown. With one thread on a CPU
seconds are the process's CPU seconds, else those of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from aligntok.flow import Euler, Guidance
from aligntok.networks import DiT, Text, TextDiT, compile_blocks

SHAPE, TEXT_WIDTH = (32, 16, 16), 2304
SIZES = Path(__file__).parents[1] / "configs" / "size"


class Anew(torch.nn.Module):
    """A network that keeps nothing of a text: each step reads it again."""

    def __init__(self, network: TextDiT) -> None:
        super().__init__()
        self.network, self.latent_shape, self.has_null, self.null = network, SHAPE, True, network.null

    def prepare(self, text: Text) -> Text:
        return text

    def forward(self, latent, t, text):
        return self.network(latent, t, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b", help="of configs/size/text_dit_*.yaml")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="of a text, L")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    sizes = yaml.safe_load((SIZES / f"text_dit_{args.size}.yaml").read_text())["model"]["init_args"]["network"]
    network = TextDiT(SHAPE, TEXT_WIDTH, **sizes["init_args"]).to(device)
    plain = DiT(SHAPE, 1000, **sizes["init_args"], qk_norm=True).to(device)
    for parameter in (*network.parameters(), *plain.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    if device.type == "cuda":
        compile_blocks(network)
        compile_blocks(plain)
    latent, t = torch.randn(args.batch, *SHAPE, device=device), torch.rand(args.batch, device=device)
    label = torch.arange(args.batch, device=device)
    print(
        f"size {args.size}, batch {args.batch}, {device}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}\n"
    )
    sampler, guidance = Euler(args.steps), Guidance(4.5)
    print("| tokens | DiT, s / step | TextDiT, s / step | ratio | sampling anew, s | kept, s | **anew / kept** |")
    print("|---|---|---|---|---|---|---|")
    for count in args.tokens:
        features = torch.randn(args.batch, count, TEXT_WIDTH, device=device)
        text = Text(features, torch.ones(args.batch, count, dtype=torch.bool, device=device))
        ways: dict[str, Callable[[], object]] = {
            "dit": lambda: plain(latent, t, label).square().mean().backward(),
            "text": lambda text=text: network(latent, t, text).square().mean().backward(),
            "anew": lambda text=text: sampler(guidance.velocity(Anew(network), text), latent),
            "kept": lambda text=text: sampler(guidance.velocity(network, text), latent),
        }
        seconds = timed(ways, args.rounds, device)
        dit, reads, anew, kept = (statistics.median(seconds[way]) for way in ways)
        ratios = f"| {reads / dit:.2f} | {anew:.2f} | {kept:.2f} | **{anew / kept:.2f}** |"
        print(f"| {count} | {dit:.3f} | {reads:.3f} {ratios}", flush=True)


def timed(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each way; the first round is left out."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            learns, fast = way in ("dit", "text"), device.type == "cuda"
            with torch.set_grad_enabled(learns), torch.autocast(device.type, torch.bfloat16, enabled=fast):
                start = clock(device)
                run()
                if number:
                    seconds[way].append(clock(device) - start)
    return seconds


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


if __name__ == "__main__":
    main()
