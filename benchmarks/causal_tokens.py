r"""What a causal decoder does to tokens, at the scale of a laptop: AliTok's ablation in direction.

    python benchmarks/causal_tokens.py --seeds 0 1 2
    python benchmarks/causal_tokens.py --warmup 100 --runs "bidirectional decoder" "causal decoder"     # equal entropy
    python benchmarks/causal_tokens.py --queries --warmup 400 --perceptual_weight 0 --generator_steps 1200 \
        --seeds 0 1 2 3 4 5 --runs "bidirectional decoder" "causal decoder"                 # tokens that act far away

On procedural shapes (12 classes, 32 px, without textures and distractors) five discrete tokenizers with the same
networks, codebook and steps are trained, 64 tokens on a grid of 8 x 8: with a bidirectional decoder, with a causal
encoder, with a causal decoder, with prefix tokens too, and with the perceptual loss of the prefix. Queries start from
their patches, codes from data, on a sphere, moved by running means, the last layer from the identity, and the
perceptual term waits until the middle, as tokens easily collapse before the decoder reads them.
Stage 2 trains a bidirectional decoder on the frozen tokens of the last. On the cached tokens of each the same
autoregressive transformer is trained for the same steps.

With --warmup the codes start late, from latents that mean something, which keeps all of them in use. With --queries a
patch is read from a query of its own instead of where its token comes in, so that nothing but the causal constraint
ties a token to its place.

Measured on images that none of them saw, and on samples without guidance, a label each:

- accuracy, cross-entropy: of the next token, over the tokens of the grid alone, so that a prefix does not change what
  is averaged, and over all;
- entropy of the codes in bits, and PSNR: tokens that repeat each other or say little are easy to foresee; two
  tokenizers compare where these are alike;
- foreseen: the share of the entropy that the past and the class tell, entropy minus cross-entropy over entropy;
- acts on: one token is replaced by that of another image at the same place, and the squared change of the decoded
  image is shared out among the patches: its own, earlier ones, and the rest;
- rFD, gFD: Fréchet distance to the validation images in the features of a judge that no tokenizer knows.

Runs that are in the results folder already are not repeated.

Reference:
    AliTok, arXiv:2506.05289, table of the ablation: accuracy 5.4 % bidirectional, 10.7 % causal, gFID 2.96 and 1.88.
    TiTok, arXiv:2406.07550, whose decoder reads patches from queries.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from einops import reduce
from latents_for_diffusion import (
    IMAGE_SIZE,
    NUM_CLASSES,
    distance,
    images,
    judged,
    quietly,
    spread,
    statistics_of,
    trained_judge,
)
from semantic_preservation import adamw, one_cycle, quiet
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.init import dirac_

from aligntok.callbacks import EMA
from aligntok.data import LatentDataModule, TokenShards
from aligntok.losses import FeatureDistance, PerceptualTerm, ReconstructionLoss
from aligntok.networks import (
    AutoregressiveTransformer,
    LinearAdapter,
    QueryEncoder,
    TokenDecoder,
    Tokenizer,
    VectorQuantizer,
    VisionEncoder,
)
from aligntok.networks.quantizers import Quantized
from aligntok.networks.transformer import learned
from aligntok.programs.encode import encode
from aligntok.stages import AutoregressiveGeneration, CausalTokenization, DecoderRefinement, Optimization

PATCH, GRID, LATENT_DIM, CODES = 4, (8, 8), 16, 256
WIDTH, NUM_HEADS, DEPTH, DECODER_DEPTH, GENERATOR_DEPTH = 96, 4, 3, 4, 3
SAMPLES, BATCH, AR_BATCH, REPLACED = 1200, 8, 32, 32
RATE = 1e-3  # of the tokenizers, at its peak
RUNS: dict[str, dict[str, Any]] = {  # what differs: of the encoder, of the decoder, of the stage
    "bidirectional decoder": {},
    "causal encoder": {"causal_encoder": True},
    "causal decoder": {"causal": True},
    "+ prefix": {"causal": True, "num_prefix": GRID[1], "auxiliary": "mse"},
    "+ auxiliary loss": {"causal": True, "num_prefix": GRID[1], "auxiliary": "perceptual"},
}
LAST = "+ stage 2"  # on the tokens of the run before
COLUMNS = {
    "psnr": ("PSNR (dB)", 1.0),
    "entropy": ("code entropy (bits)", 1.0),
    "accuracy_grid": ("AR accuracy, grid (%)", 100.0),
    "accuracy": ("AR accuracy, all (%)", 100.0),
    "cross_entropy_grid": ("cross-entropy, grid (bits)", 1.0),
    "foreseen": ("foreseen (%)", 100.0),
    "own": ("acts on own patch (%)", 100.0),
    "earlier": ("on earlier patches (%)", 100.0),
    "rfd": ("rFD", 1.0),
    "gfd": ("gFD", 1.0),
    "agreement": ("agreement (%)", 100.0),
}


class Setting(NamedTuple):
    """What all runs of a table share."""

    queries: bool = False
    warmup: int = 0
    steps: int = 1000
    generator_steps: int = 600
    perceptual_weight: float = 0.1

    def place(self, folder: Path, seed: int, run: str) -> Path:
        """Return the file of a run's measures."""
        setting = "_".join(f"{key}{value:g}" for key, value in self._asdict().items())
        return folder / f"{setting}_seed{seed}_{run.replace(' ', '_')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=[*RUNS], metavar="RUN")
    parser.add_argument(
        "--queries", action="store_true", help="patches are read from queries, not where tokens come in"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of each tokenizer stage")
    parser.add_argument("--warmup", type=int, default=0, help="more steps at first, without codes")
    parser.add_argument("--generator_steps", type=int, default=600)
    parser.add_argument("--perceptual_weight", type=float, default=0.1, help="in the second half of the steps")
    parser.add_argument("--judge_steps", type=int, default=1500)
    parser.add_argument("--results", type=Path, default=Path("runs/causal_tokens"), help="folder")
    args = parser.parse_args()
    quiet()
    args.results.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.queries, args.warmup, args.steps, args.generator_steps, args.perceptual_weight)
    judge = trained_judge(args.judge_steps, args.results / "judge.ckpt")
    for seed in args.seeds:
        for run in args.runs:
            if not setting.place(args.results, seed, run).is_file():
                found = experiment(run, setting, seed, judge, args.results / "work")
                for name, values in found.items():
                    setting.place(args.results, seed, name).write_text(json.dumps(values))
                    print(
                        f"seed {seed}  {name:<22} " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True
                    )
    report(args.results, setting, args.seeds)


def experiment(run: str, setting: Setting, seed: int, judge: Any, work: Path) -> dict[str, Any]:
    """Train a tokenizer, and a generator on its tokens; after the last run also stage 2. Return the measures."""
    began = time.perf_counter()
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        stage = tokenize(RUNS[run], setting, seed, folder)
        write_tokens(stage, seed, folder)
        generator = generate(stage.tokenizer, seed, setting.generator_steps, folder)
        values = foreseen(generator, seed) | locality(generator.tokenizer, seed) | drawn(generator, judge, seed)
        found = {run: values | {"seconds": time.perf_counter() - began}}
        if run == [*RUNS][-1]:
            refined = refine(RUNS[run]["num_prefix"], setting, seed, folder)
            generator.frozen_tokenizer.network = refined.tokenizer  # the same tokens, another decoder
            found[LAST] = values | locality(refined.tokenizer, seed) | drawn(generator, judge, seed)
    return found


def tokenizer(
    num_prefix: int = 0,
    causal_encoder: bool = False,
    causal: bool = False,
    head: bool = False,
    queries: bool = False,
    warmup: int = 0,
) -> Tokenizer:
    encoder = QueryEncoder(IMAGE_SIZE, PATCH, WIDTH, DEPTH, NUM_HEADS, num_prefix, causal_encoder, from_patches=True)
    decoder = (QueryDecoder if queries else TokenDecoder)(
        LATENT_DIM, IMAGE_SIZE, PATCH, WIDTH, DECODER_DEPTH, NUM_HEADS, num_prefix, causal=causal, prefix_head=head
    )
    for last in (decoder.head, decoder.prefix_head):
        if last is not None:
            dirac_(last.colour.weight)
    quantizer = LateQuantizer(CODES, LATENT_DIM, "cosine", update="ema", decay=0.9, kmeans_start=True, warmup=warmup)
    return Tokenizer(encoder, LinearAdapter(WIDTH, LATENT_DIM), decoder, quantizer)


class QueryDecoder(TokenDecoder):
    """A token decoder with a query of its own for each vector, from which the patch is read, as in TiTok.

    In AliTok's decoder a patch is read where its token comes in, so that the residual stream ties the two together.
    Here a token reaches a patch through attention alone. All see all; if `causal`, a token sees the tokens up to its
    own place, and a query sees the tokens and queries up to its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queries = learned(self.sequence_length, self.positions.shape[1])
        earlier = torch.ones(self.sequence_length, self.sequence_length, dtype=torch.bool).tril()
        seen = torch.cat((torch.cat((earlier, torch.zeros_like(earlier)), dim=1), torch.cat((earlier, earlier), dim=1)))
        self.register_buffer("mask", seen if self.causal else None, persistent=False)

    def _outputs(self, latent: Tensor) -> Tensor:
        x = self.proj_in(latent.flatten(2).transpose(1, 2)) + self.positions[-self.sequence_length :]
        x = torch.cat((x, self.queries.expand(len(x), -1, -1)), dim=1)
        outputs: Tensor = self.norm_out(self.transformer(x, self.mask)[:, -self.sequence_length :])
        return outputs


class LateQuantizer(VectorQuantizer):
    """Passes the latents of the first training steps on, so that codes start from latents that mean something."""

    def __init__(self, *args: Any, warmup: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.warmup = warmup

    def forward(self, latent: Tensor, ids: Tensor | None = None) -> Quantized:
        if not self.training or not self.warmup:
            return super().forward(latent, ids)
        self.warmup -= 1
        tokens, nothing = latent[:, 0].flatten(1).long(), latent.new_zeros(())
        return Quantized(latent, tokens, nothing, nothing)


def tokenize(run: dict[str, Any], setting: Setting, seed: int, folder: Path) -> Any:
    """Train stage 1."""
    pl.seed_everything(seed, verbose=False)
    parts = {key: value for key, value in run.items() if key != "auxiliary"}
    auxiliary = run.get("auxiliary", "none")
    network = tokenizer(**parts, head=auxiliary != "none", queries=setting.queries, warmup=setting.warmup)
    stage = CausalTokenization(network, auxiliary=auxiliary, **losses(setting, setting.warmup + setting.steps))
    fit(stage, small_batches(seed), setting.warmup + setting.steps, folder / "stage1")
    return stage


def write_tokens(stage: Any, seed: int, folder: Path) -> None:
    """Cache the tokens of the training images."""
    encode(stage.tokenizer, images(seed).train, folder / "tokens")


def refine(num_prefix: int, setting: Setting, seed: int, folder: Path) -> Any:
    pl.seed_everything(seed, verbose=False)
    stage = DecoderRefinement(tokenizer(num_prefix, queries=setting.queries), **losses(setting, setting.steps))
    stage.init_from(folder / "stage1" / "last.ckpt")
    fit(stage, small_batches(seed), setting.steps, folder / "stage2")
    return stage


def small_batches(seed: int) -> LatentDataModule:
    data = images(seed)
    data.global_batch_size = BATCH
    return data


def losses(setting: Setting, steps: int) -> dict[str, Any]:
    """Return the loss that all tokenizers share: MSE and a perceptual distance in an ImageNet network."""
    judge = VisionEncoder("tf_efficientnet_lite0", IMAGE_SIZE, PATCH, weights="offline", layer=2)
    weight = {steps // 2: 0.0, steps // 2 + 1: setting.perceptual_weight}
    perceptual = PerceptualTerm(FeatureDistance(judge, [1, 2]), weight)
    return {
        "loss": ReconstructionLoss("mse", {"perceptual": perceptual}),
        "optimization": Optimization({0: 0.0, steps // 10: RATE, steps: 0.0}, adamw(0.0)),
    }


def fit(stage: Any, data: LatentDataModule, steps: int, folder: Path, **options: Any) -> None:
    trainer = pl.Trainer(
        **quietly(folder),
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(stage, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    stage.eval()


def generate(tokenizer: Tokenizer, seed: int, steps: int, folder: Path) -> Any:
    """Train the generator on the cached tokens, and return it with its averaged weights."""
    pl.seed_everything(seed, verbose=False)
    data = LatentDataModule(TokenShards(str(folder / "tokens")), global_batch_size=AR_BATCH, seed=seed)
    spec = tokenizer.spec
    network = AutoregressiveTransformer(
        CODES, spec.grid, spec.num_prefix, NUM_CLASSES, WIDTH, GENERATOR_DEPTH, NUM_HEADS
    )
    stage = AutoregressiveGeneration(
        network, tokenizer, seed=seed, optimization=Optimization(one_cycle(steps), adamw(0.03))
    )
    fit(stage, data, steps, folder / "generator", callbacks=[EMA(0.99)])
    return stage


@torch.no_grad()
def foreseen(stage: Any, seed: int) -> dict[str, float]:
    """Return how well the generator foresees the tokens of the validation images, and how much these say."""
    tokens, label, error = validation(stage.tokenizer, seed)
    logits = torch.cat([stage.network(t[:, :-1], y) for t, y in zip(tokens.split(200), label.split(200), strict=True)])
    surprise = cross_entropy(logits.transpose(1, 2), tokens, reduction="none") / math.log(2)
    right = (logits.argmax(-1) == tokens).float()
    prefix = stage.network.num_prefix
    shares = torch.bincount(tokens[:, prefix:].flatten(), minlength=CODES).double() / tokens[:, prefix:].numel()
    entropy = -(shares * shares.clamp_min(1e-12).log2()).sum().item()
    return {
        "psnr": -10 * error.log10().mean().item(),
        "entropy": entropy,
        "accuracy": right.mean().item(),
        "accuracy_grid": right[:, prefix:].mean().item(),
        "cross_entropy": surprise.mean().item(),
        "cross_entropy_grid": surprise[:, prefix:].mean().item(),
    }


def validation(tokenizer: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (B, N), labels (B,) and squared errors (B,) of the validation images."""
    rows = []
    for image, label in validation_images(seed):
        tokens = tokenizer.encode(image)
        rows.append((tokens, label, (tokenizer.decode(tokens) - image).square().flatten(1).mean(1)))
    tokens, label, error = (torch.cat(column) for column in zip(*rows, strict=True))
    return tokens, label, error


def validation_images(seed: int) -> list[tuple[Tensor, Tensor]]:
    data = images(seed)
    data.setup()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.in_order(data.dataset("val"))]
    return [(batch["image"], batch["label"]) for batch in batches]


@torch.no_grad()
def locality(tokenizer: Any, seed: int) -> dict[str, float]:
    """Return the shares of what a token does to the decoded image that lie in its own patch and in earlier ones.

    Over some places of the grid, each in 200 images.
    """
    tokens, _, _ = validation(tokenizer, seed)
    prefix = tokenizer.spec.num_prefix
    places = torch.linspace(0, tokens.shape[1] - prefix - 1, REPLACED).round().long().tolist()
    shares = torch.cat([shares_of(tokenizer, tokens[:200], prefix, place) for place in places])
    own, earlier = shares.mean(0).tolist()
    return {"own": own, "earlier": earlier}


def shares_of(tokenizer: Any, tokens: Tensor, prefix: int, place: int) -> Tensor:
    """Return own and earlier patches' shares of the change that another token at a place of the grid makes, (B, 2)."""
    other = tokens.clone()
    other[:, prefix + place] = tokens.roll(1, dims=0)[:, prefix + place]
    differ = other[:, prefix + place] != tokens[:, prefix + place]
    images = (tokenizer.decode(part[differ], clamp=False) for part in (other, tokens))
    change = reduce((next(images) - next(images)).square(), "b c (h p) (w q) -> b (h w)", "sum", h=GRID[0], w=GRID[1])
    return torch.stack((change[:, place], change[:, :place].sum(1)), dim=1) / change.sum(1, keepdim=True)


@torch.no_grad()
def drawn(stage: Any, judge: Any, seed: int) -> dict[str, float]:
    """Return the measures of reconstructions and samples."""
    real = torch.cat([image for image, _ in validation_images(seed)])
    reconstructed = torch.cat([stage.tokenizer(part) for part in real.split(200)])
    ids = torch.arange(SAMPLES)
    label = ids % NUM_CLASSES
    tokens = torch.cat([stage.sample(i, y) for i, y in zip(ids.split(200), label.split(200), strict=True)])
    sampled = torch.cat([stage.tokenizer.decode(part) for part in tokens.split(200)])
    moments = [statistics_of(judged(judge, image)) for image in (real, reconstructed, sampled)]
    named = torch.cat([judge(part.clamp(0, 1)).argmax(1) for part in sampled.split(200)])
    error = (reconstructed - real).square().flatten(1).mean(1)
    return {
        "psnr": -10 * error.log10().mean().item(),
        "rfd": distance(moments[0], moments[1]),
        "gfd": distance(moments[0], moments[2]),
        "agreement": (named == label).float().mean().item(),
    }


def report(folder: Path, setting: Setting, seeds: list[int]) -> None:
    """Print the table: mean and standard deviation over seeds; and whether the causal decoder is ahead."""
    print(f"\n{setting}, {len(seeds)} seeds; mean ± standard deviation over seeds\n")
    print(f"| tokenizer | {' | '.join(name for name, _ in COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
    files = {run: [setting.place(folder, seed, run) for seed in seeds] for run in (*RUNS, LAST)}
    values = {
        run: [json.loads(path.read_text()) for path in paths]
        for run, paths in files.items()
        if all(path.is_file() for path in paths)
    }
    for value in itertools.chain(*values.values()):
        value["foreseen"] = 1 - value["cross_entropy_grid"] / value["entropy"]
    for run, found in values.items():
        cells = [spread([scale * value[key] for value in found]) for key, (_, scale) in COLUMNS.items()]
        print(f"| {run} | {' | '.join(cells)} |")
    if {"causal decoder", "bidirectional decoder"} <= values.keys():
        print("\ncausal minus bidirectional decoder, by seed:")
        for key, (name, scale) in COLUMNS.items():
            pairs = pairs_of(values)
            print(f"{name}: {', '.join(f'{scale * (ours[key] - theirs[key]):+.2f}' for ours, theirs in pairs)}")
        for key in ("accuracy_grid", "cross_entropy_grid", "gfd"):
            name, scale = COLUMNS[key]
            at_equal_psnr(name, [scale * (a[key] - b[key]) for a, b in pairs_of(values)], values)


def pairs_of(values: dict[str, Any]) -> list[tuple[dict[str, float], dict[str, float]]]:
    return list(zip(values["causal decoder"], values["bidirectional decoder"], strict=True))


def at_equal_psnr(name: str, differences: list[float], values: dict[str, Any]) -> None:
    """Print the line through the pairs' differences over those of PSNR: where it crosses 0 dB, and its slope."""
    if len(differences) < 3:
        return
    psnr = torch.tensor([ours["psnr"] - theirs["psnr"] for ours, theirs in pairs_of(values)], dtype=torch.float64)
    design = torch.stack((torch.ones_like(psnr), psnr), dim=1)
    inverse, target = torch.linalg.inv(design.T @ design), torch.tensor(differences, dtype=torch.float64)
    line = inverse @ design.T @ target
    variance = (target - design @ line).square().sum() / (len(target) - 2)
    (level, slope), (error, slope_error) = line.tolist(), (variance * inverse.diagonal()).sqrt().tolist()
    found = f"{level:+.2f} ± {error:.2f}, and {slope:+.2f} ± {slope_error:.2f} for each dB"
    print(f"{name} at equal PSNR: {found} (standard errors)")


if __name__ == "__main__":
    main()
