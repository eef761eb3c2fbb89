"""Where a token of ``causal_tokens.py`` acts: on its own patch, on patches before it, or on patches after it.

    python benchmarks/token_locality.py --seeds 0 1 2

A causal decoder forbids that a token acts on earlier patches. What it has to mend is how much tokens do so where they
may: under a bidirectional decoder. Tokenizers are trained as in ``causal_tokens.py``, with queries that start from
their patches and with separate ones, as AliTok has them. Then one token of a validation image is replaced by that of
another image at the same place, and the squared change of the decoded image is shared out among the patches.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from causal_tokens import GRID, Setting, tokenize, validation
from einops import reduce
from latents_for_diffusion import spread
from semantic_preservation import quiet

RUNS: dict[str, tuple[dict[str, Any], Setting]] = {  # what differs, and the setting
    "bidirectional decoder, queries from patches": ({}, Setting(warmup=100)),
    "bidirectional decoder, separate queries": ({"from_patches": False}, Setting(warmup=500)),
    "bidirectional decoder with queries": ({}, Setting(queries=True, warmup=400, perceptual_weight=0.0)),
    "causal decoder with queries": ({"causal": True}, Setting(queries=True, warmup=400, perceptual_weight=0.0)),
}
IMAGES, TOKENS = 200, 32  # to replace tokens in, and how many in each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=[*RUNS], metavar="RUN")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    quiet()
    print("| tokenizer | PSNR (dB) | own patch (%) | earlier (%) | later (%) |\n" + "|---" * 5 + "|")
    for run in args.runs:
        rows = [measured(run, seed, args.steps) for seed in args.seeds]
        print(f"| {run} | {' | '.join(spread(list(column)) for column in zip(*rows, strict=True))} |", flush=True)


def measured(run: str, seed: int, steps: int) -> tuple[float, ...]:
    """Return PSNR, and the share of a token's action on its own patch, on earlier and on later ones in percent."""
    parts, setting = RUNS[run]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenize(parts, setting._replace(steps=steps), seed, Path(folder)).tokenizer
    tokens, _, error = validation(tokenizer, seed)
    shares = torch.cat([shares_of(tokenizer, tokens[:IMAGES], place) for place in places(tokens.shape[1])])
    return (-10 * error.log10().mean().item(), *(100 * shares.mean(0)).tolist())


def places(length: int) -> list[int]:
    return torch.linspace(0, length - 1, TOKENS).round().long().tolist()


@torch.no_grad()
def shares_of(tokenizer: Any, tokens: torch.Tensor, place: int) -> torch.Tensor:
    """Return (B, 3): own, earlier and later patches' shares of the change that another token at a place makes."""
    other = tokens.clone()
    other[:, place] = tokens.roll(1, dims=0)[:, place]
    tokens, other = (part[other[:, place] != tokens[:, place]] for part in (tokens, other))
    change = (tokenizer.decode(other, clamp=False) - tokenizer.decode(tokens, clamp=False)).square()
    h, w = GRID
    patches = reduce(change, "b c (h p) (w q) -> b (h w)", "sum", h=h, w=w)
    own, before, after = patches[:, place], patches[:, :place].sum(1), patches[:, place + 1 :].sum(1)
    return torch.stack((own, before, after), dim=1) / patches.sum(1, keepdim=True)


if __name__ == "__main__":
    main()
