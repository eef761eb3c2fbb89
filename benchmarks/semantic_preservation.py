"""What the semantic preservation loss is for, at the scale of a laptop: AlignTok's ablation in direction.

    python benchmarks/semantic_preservation.py --seeds 0 1 2

On procedural shapes (12 classes, 32 px) a small ViT is pretrained on the labels, as a stand-in for a foundation
model: on images of its own, with a convolutional stem (a plain patch embedding names 19 % after 1,500 steps, the stem
53 % after 400), and not to the end, because an encoder that only knows the class (96 % after 1,500 steps) leaves
nothing to decode. Then stage 1, stage 2 with w_sp of 1, 0.1 and 0, the control (stage 1 for as many more steps), and
stage 3 after the w_sp = 1 run. After each, PSNR of the reconstructions and a linear probe on the flattened latents,
both on images that no stage saw. Runs that are in the results file already are not repeated.

Reference:
    AlignTok, arXiv:2509.25162, table of the ablation: without the loss the probe falls from 35 to 9.5 %.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from timm.layers import PatchEmbed
from torch import nn

from aligntok.callbacks import LinearProbe, ReconstructionQuality
from aligntok.data import Augmentation, LatentDataModule, Shapes
from aligntok.losses import SemanticPreservation
from aligntok.networks import ConvDecoder, LinearAdapter, Tokenizer, VisionEncoder
from aligntok.stages import (
    DecoderRefinement,
    EncoderPretraining,
    LatentAlignment,
    Optimization,
    PerceptualAlignment,
    Stage,
)

IMAGE_SIZE, DOWNSAMPLING, WIDTH = 32, 8, 128
TRAIN_IMAGES, VAL_IMAGES, BATCH = 6000, 1200, 32
PRETRAINING_IMAGES, PRETRAINING_BATCH = 100_000, 64
VAL_SEED, PRETRAINING_SEED = 1_000_000, 2_000_000  # far from the seeds of the training images
DEPENDS = {  # run: the stage, the run whose weights it starts from, its arguments
    "stage 1": (LatentAlignment, None, {}),
    "control: stage 1 for longer": (LatentAlignment, "stage 1", {}),
    "stage 2, w_sp = 1": (PerceptualAlignment, "stage 1", {"semantic": SemanticPreservation(1.0)}),
    "stage 2, w_sp = 0.1": (PerceptualAlignment, "stage 1", {"semantic": SemanticPreservation(0.1)}),
    "stage 2, w_sp = 0": (PerceptualAlignment, "stage 1", {"semantic": SemanticPreservation(0.0)}),
    "stage 3 after w_sp = 1": (DecoderRefinement, "stage 2, w_sp = 1", {}),
}
ENCODER = "encoder: features"
SEMANTIC, FREE, CONTROL = "stage 2, w_sp = 1", "stage 2, w_sp = 0", "control: stage 1 for longer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250, help="of each tokenizer stage")
    parser.add_argument("--pretraining_steps", type=int, default=400, help="of the encoder")
    parser.add_argument("--latent_dim", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path("runs/semantic_preservation.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    setting = f"steps={args.steps} pretraining={args.pretraining_steps} latent_dim={args.latent_dim}"
    results: dict[str, dict[str, Any]] = json.loads(args.results.read_text()) if args.results.is_file() else {}
    for seed in args.seeds:
        done = results.get(f"{setting} seed={seed}", {})
        if set(done) == {ENCODER, *DEPENDS}:
            continue
        results[f"{setting} seed={seed}"] = experiment(seed, args.steps, args.pretraining_steps, args.latent_dim)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1))
    report([results[f"{setting} seed={seed}"] for seed in args.seeds], setting)


def experiment(seed: int, steps: int, pretraining_steps: int, latent_dim: int) -> dict[str, dict[str, float]]:
    """Return the measures of all runs of one seed."""
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = partial(images, seed)
        began = time.perf_counter()
        pl.seed_everything(seed, verbose=False)
        optimization = Optimization(one_cycle(pretraining_steps), adamw(0.05))
        pretraining = EncoderPretraining(vision_encoder(None), 12, optimization=optimization)
        own_images = images(PRETRAINING_SEED + seed, PRETRAINING_IMAGES, PRETRAINING_BATCH)
        fitted = fit(pretraining, own_images, pretraining_steps, folder / "encoder")
        results[ENCODER] = {"accuracy": float(fitted["val/accuracy"]), "seconds": time.perf_counter() - began}
        show(seed, ENCODER, results[ENCODER])
        weights = str(folder / "encoder" / "encoder.safetensors")
        for run, (kind, previous, arguments) in DEPENDS.items():
            began = time.perf_counter()
            pl.seed_everything(seed, verbose=False)
            decoder = ConvDecoder(latent_dim, width=16, multipliers=(1, 2, 4, 4), num_blocks=1, num_groups=8)
            tokenizer = Tokenizer(vision_encoder(weights), LinearAdapter(WIDTH, latent_dim), decoder)
            stage = kind(tokenizer, optimization=Optimization(one_cycle(steps), adamw(0.0)), **arguments)
            if previous is not None:
                stage.init_from(folder / previous / "last.ckpt")
            fitted = fit(stage, data(), steps, folder / run)
            names = ("psnr", "probe", "probe_pooled")
            results[run] = {name: float(fitted[f"val/{name}"]) for name in names}
            results[run]["seconds"] = time.perf_counter() - began
            show(seed, run, results[run])
    return results


def images(seed: int, count: int = TRAIN_IMAGES, batch: int = BATCH) -> LatentDataModule:
    train = Shapes(count, IMAGE_SIZE, seed=seed)
    val = Shapes(VAL_IMAGES, IMAGE_SIZE, seed=VAL_SEED + seed)
    return LatentDataModule(train, batch, IMAGE_SIZE, val=val, augmentation=Augmentation("center"), seed=seed)


def vision_encoder(weights: str | None) -> VisionEncoder:
    size = {"patch_size": DOWNSAMPLING, "embed_dim": WIDTH, "depth": 4, "num_heads": 4, "embed_layer": ConvStem}
    return VisionEncoder("vit_tiny_patch16_224", IMAGE_SIZE, DOWNSAMPLING, weights=weights, model_args=size)


class ConvStem(PatchEmbed):
    """Convolutions of stride 2 instead of one large patch: Xiao et al., Early Convolutions, arXiv:2106.14881."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.proj.out_channels
        widths = [self.proj.in_channels, width // 4, width // 2, width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, width, 1))


def adamw(weight_decay: float) -> Any:
    return partial(torch.optim.AdamW, weight_decay=weight_decay)


def one_cycle(steps: int) -> dict[int, float]:
    """Rise over the first tenth to 1e-3, fall to zero at the end."""
    return {0: 0.0, steps // 10: 1e-3, steps: 0.0}


def fit(stage: Stage, data: LatentDataModule, steps: int, folder: Path, validate: bool = True) -> dict[str, Any]:
    """Train, keep the checkpoint, and return what a validation at the end measured."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(stage, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    if not validate:
        return {}
    judge = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[ReconstructionQuality(), LinearProbe()] if not isinstance(stage, EncoderPretraining) else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    judge.validate(stage, datamodule=data, verbose=False)
    return dict(judge.callback_metrics)


def report(seeds: list[dict[str, dict[str, float]]], setting: str) -> None:
    """Print the table and the statement."""
    print(f"\n{setting}, {len(seeds)} seeds; mean ± standard deviation over seeds\n")
    print("| run | PSNR (dB) | probe, flattened (%) | probe, averaged (%) | seconds |\n|---|---|---|---|---|")
    for run in DEPENDS:
        cells = [spread(run, "psnr", seeds), *(spread(run, n, seeds, 100) for n in ("probe", "probe_pooled"))]
        print(f"| {run} | {' | '.join(cells)} | {mean(run, 'seconds', seeds):.0f} |")
    print(f"\nThe pretrained encoder names {spread(ENCODER, 'accuracy', seeds, 100)} % of the validation images.")
    loss = 1 - mean(FREE, "probe", seeds) / mean(SEMANTIC, "probe", seeds)
    gain = mean(FREE, "psnr", seeds) - mean(SEMANTIC, "psnr", seeds)
    control = mean(SEMANTIC, "psnr", seeds) - mean(CONTROL, "psnr", seeds)
    print(
        f"probe with w_sp=0 is {100 * loss:.0f} % lower than with w_sp=1 (at least a third: {yes(loss >= 1 / 3)}), PSNR"
        f" higher by {gain:.2f} dB ({yes(gain > 0)}); stage 2 with w_sp=1 is {control:+.2f} dB from the control"
    )
    kept = mean(SEMANTIC, "probe", seeds) / mean("stage 1", "probe", seeds)
    print(f"stage 2 with w_sp=1 keeps {100 * kept:.0f} % of stage 1's probe")


def mean(run: str, name: str, seeds: list[dict[str, dict[str, float]]]) -> float:
    return statistics.fmean(seed[run][name] for seed in seeds)


def spread(run: str, name: str, seeds: list[dict[str, dict[str, float]]], scale: float = 1.0) -> str:
    values = [scale * seed[run][name] for seed in seeds]
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def show(seed: int, run: str, values: dict[str, float]) -> None:
    text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    print(f"seed {seed}  {run:<28} {text}", flush=True)


def quiet() -> None:
    import logging

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
