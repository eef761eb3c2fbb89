"""What a tokenizer's latents are worth to a generator, at the scale of a laptop: AlignTok's claim in direction.

    python benchmarks/latents_for_diffusion.py --seeds 0 1 2

On procedural shapes (12 classes, 32 px, without textures and distractors, so that a small decoder can reconstruct
them) four tokenizers of the same latent shape (16, 8, 8) are trained: AlignTok with w_sp = 1, the same with w_sp = 0,
stage 1 only, and a plain VAE from random weights. The encoder of the first three is a real one, the ImageNet
EfficientNet-Lite0 that pip brings. Every decoder is then refined on its final latents, every tokenizer sees as many
steps, and on the cached latents of each the same diffusion transformer is trained for the same steps.

Measured on samples without guidance (the last column with), a label each, against 6,000 training images:

- FD: Fréchet distance in the features of a judge (a small ViT that no tokenizer knows) to the real images;
- FD of reconstructions: what the decoder alone costs; where it is above the FD of samples, FD measures the decoder;
- FD to reconstructions: the same reference after the tokenizer, so that decoder errors are on both sides;
- FD of latents: in the normalised latent, so it compares one tokenizer's generators, not tokenizers;
- agreement: share of samples that the judge gives the asked label; that of reconstructions is its upper bound.

Runs that are in the results file already are not repeated.

Reference:
    AlignTok, arXiv:2509.25162, tables 1 and 3: gFID 2.17 with w_sp = 1, 3.05 with 0, 3.00 with stage 1 only, 3.31 VAE.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from semantic_preservation import adamw, fit, one_cycle, quiet, vision_encoder
from torch import Tensor

from aligntok.callbacks import EMA
from aligntok.data import Augmentation, LatentDataModule, LatentShards, Shapes
from aligntok.flow import Euler, Guidance
from aligntok.losses import SemanticPreservation
from aligntok.metrics.frechet import frechet_distance
from aligntok.networks import ConvDecoder, ConvEncoder, DiT, GaussianAdapter, LinearAdapter, Tokenizer, VisionEncoder
from aligntok.programs.encode import Views, encode
from aligntok.stages import (
    DecoderRefinement,
    EncoderPretraining,
    LatentAlignment,
    LatentDiffusion,
    Optimization,
    PerceptualAlignment,
    Stage,
)

IMAGE_SIZE, DOWNSAMPLING, CHANNELS, NUM_CLASSES = 32, 4, 16, 12
TRAIN_IMAGES, VAL_IMAGES, BATCH, SAMPLES = 6000, 1200, 32, 1200
VAL_SEED, JUDGE_SEED = 1_000_000, 3_000_000  # far from the seeds of the training images
WIDTH = 24  # of the decoders
GUIDED = 3.0  # guidance scale
KL = 1e-6  # of LDM's VAE
REFINEMENT = 2.5  # the last decoder learns so many times as long as a stage
RUNS = ("AlignTok, w_sp = 1", "w_sp = 0", "stage 1 only", "VAE from scratch")
COLUMNS = {
    "psnr": ("PSNR (dB)", 1.0),
    "probe": ("probe (%)", 100.0),
    "agreement_reconstructions": ("agreement of reconstructions (%)", 100.0),
    "rfd": ("FD of reconstructions", 1.0),
    "fd": ("FD", 1.0),
    "fd_reconstructions": ("FD to reconstructions", 1.0),
    "fd_latent": ("FD of latents", 1.0),
    "agreement": ("agreement (%)", 100.0),
    "agreement_guided": ("agreement, guided (%)", 100.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of each tokenizer stage")
    parser.add_argument("--generator_steps", type=int, default=4000)
    parser.add_argument("--judge_steps", type=int, default=1500)
    parser.add_argument("--results", type=Path, default=Path("runs/latents_for_diffusion"), help="folder")
    args = parser.parse_args()
    quiet()
    args.results.mkdir(parents=True, exist_ok=True)
    setting = f"steps{args.steps}_generator{args.generator_steps}"
    judge = trained_judge(args.judge_steps, args.results / "judge.ckpt")
    for seed in args.seeds:
        for run in RUNS:
            path = args.results / f"{setting}_seed{seed}_{run.replace(' ', '_')}.json"
            if not path.is_file():
                values = experiment(run, seed, args.steps, args.generator_steps, judge, args.results / "work")
                path.write_text(json.dumps(values))
                print(f"seed {seed}  {run:<20} " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
    report(args.results, setting, args.seeds)


def experiment(run: str, seed: int, steps: int, generator_steps: int, judge: Any, work: Path) -> dict[str, float]:
    """Train one tokenizer and a generator on its latents, and return the measures of both."""
    began = time.perf_counter()
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        tokenizer, values = tokenize(run, seed, steps, folder)
        stage = generate(tokenizer, seed, generator_steps, folder)
        values |= measure(stage, judge, seed, folder)
    return {**values, "seconds": time.perf_counter() - began}


def tokenize(run: str, seed: int, steps: int, folder: Path) -> tuple[Tokenizer, dict[str, float]]:
    """Train the tokenizer of a run and its last decoder, write the cache, and return it with PSNR and probe."""
    rate, data = one_cycle(steps), partial(images, seed)
    if run == "VAE from scratch":
        stage = build(
            PerceptualAlignment, seed, one_cycle(2 * steps), vae=True, semantic=SemanticPreservation(0.0), kl_weight=KL
        )
        fit(stage, data(), 2 * steps, folder / "trained", validate=False)
    else:
        first = 2 * steps if run == "stage 1 only" else steps
        fit(build(LatentAlignment, seed, one_cycle(first)), data(), first, folder / "trained", validate=False)
        if run != "stage 1 only":
            semantic = SemanticPreservation(1.0 if run == RUNS[0] else 0.0)
            stage = build(PerceptualAlignment, seed, rate, semantic=semantic)
            stage.init_from(folder / "trained" / "last.ckpt")
            fit(stage, data(), steps, folder / "trained", validate=False)
    last = round(REFINEMENT * steps)
    stage = build(DecoderRefinement, seed, one_cycle(last), vae=run == "VAE from scratch")
    stage.init_from(folder / "trained" / "last.ckpt")
    measured = fit(stage, data(), last, folder / "refined")
    write_cache(stage, data(), folder / "latents")
    return stage.tokenizer, {"psnr": float(measured["val/psnr"]), "probe": float(measured["val/probe"])}


def build(kind: type[Stage], seed: int, rate: dict[int, float], vae: bool = False, **arguments: Any) -> Any:
    pl.seed_everything(seed, verbose=False)
    sizes: dict[str, Any] = {"width": WIDTH, "multipliers": (1, 2, 2), "num_blocks": 1, "num_groups": 8}
    decoder = ConvDecoder(CHANNELS, **sizes)
    encoder: Any = ConvEncoder(CHANNELS, image_size=IMAGE_SIZE, **sizes) if vae else pretrained_encoder()
    adapter = (GaussianAdapter if vae else LinearAdapter)(encoder.width, CHANNELS)
    stage: Any = kind
    return stage(Tokenizer(encoder, adapter, decoder), optimization=Optimization(rate, adamw(0.0)), **arguments)


def pretrained_encoder() -> VisionEncoder:
    """EfficientNet-Lite0 on images enlarged to 64 px: features of stride 8, a grid of 8 x 8."""
    return VisionEncoder("tf_efficientnet_lite0", IMAGE_SIZE, DOWNSAMPLING, weights="offline", layer=2)


def images(seed: int) -> LatentDataModule:
    train = Shapes(TRAIN_IMAGES, IMAGE_SIZE, seed=seed, plain=True)
    val = Shapes(VAL_IMAGES, IMAGE_SIZE, seed=VAL_SEED + seed, plain=True)
    options: dict[str, Any] = {"augmentation": Augmentation("center"), "seed": seed, "calibration_images": 2000}
    return LatentDataModule(train, BATCH, IMAGE_SIZE, val=val, **options)


def write_cache(stage: Any, data: LatentDataModule, folder: Path) -> None:
    encode(stage.tokenizer, data.train, folder, Views(flips=False))


def generate(tokenizer: Tokenizer, seed: int, steps: int, folder: Path) -> LatentDiffusion:
    """Train the generator on the cached latents, and return it with its averaged weights."""
    pl.seed_everything(seed, verbose=False)
    shards = LatentShards(str(folder / "latents"))
    data = LatentDataModule(shards, global_batch_size=64, augmentation=Augmentation(flip=False), seed=seed)
    network = DiT((CHANNELS, 8, 8), NUM_CLASSES, width=128, depth=4, num_heads=4, patch_size=2)
    optimizer = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rate = {0: 0.0, steps // 10: 1e-3, steps: 0.0}
    optimization = Optimization(rate, optimizer)
    stage = LatentDiffusion(network, tokenizer, sampler=Euler(20), seed=seed, optimization=optimization)
    trainer = pl.Trainer(
        **quietly(folder / "generator"),
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[EMA(0.999)],
    )
    trainer.fit(stage, datamodule=data)  # the callback leaves the averaged weights in the module
    return stage.eval()


def quietly(folder: Path) -> dict[str, Any]:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return {"accelerator": "cpu", "devices": 1, "default_root_dir": str(folder), **dict.fromkeys(off, False)}


@torch.no_grad()
def measure(stage: Any, judge: Any, seed: int, folder: Path) -> dict[str, float]:
    """Return the measures of samples and reconstructions."""
    data = images(seed)
    data.setup()
    real = [data.on_after_batch_transfer(batch, 0)["image"] for batch in data.in_order(data.dataset("train"))]
    shards = LatentShards(str(folder / "latents"))
    rows = np.arange(len(shards))
    cached = shards.batch(rows, np.zeros_like(rows))["latent"]  # the images as they are, none mirrored
    ids = torch.arange(SAMPLES)
    label = ids % NUM_CLASSES
    latent = torch.cat([stage.sample(i, y) for i, y in zip(ids.split(400), label.split(400), strict=True)])
    stage.guidance = Guidance(GUIDED)
    guided = torch.cat([stage.sample(i, y) for i, y in zip(ids.split(400), label.split(400), strict=True)])
    decode = stage.tokenizer.decode
    reconstructed = torch.cat([decode(z) for z in cached.split(400)])
    sampled = torch.cat([decode(z) for z in latent.split(400)])
    features = {"real": torch.cat(real), "reconstructed": reconstructed, "sampled": sampled}
    moments = {name: statistics_of(judged(judge, image)) for name, image in features.items()}
    right = [
        (torch.cat([judge(part).argmax(1) for part in image.split(400)]) == torch.arange(len(image)) % NUM_CLASSES)
        for image in (reconstructed, sampled, decode(guided))
    ]
    return {
        "agreement_reconstructions": right[0].float().mean().item(),
        "rfd": distance(moments["real"], moments["reconstructed"]),
        "fd": distance(moments["real"], moments["sampled"]),
        "fd_reconstructions": distance(moments["reconstructed"], moments["sampled"]),
        "fd_latent": distance(statistics_of(cached.flatten(1)), statistics_of(latent.flatten(1))),
        "agreement": right[1].float().mean().item(),
        "agreement_guided": right[2].float().mean().item(),
    }


def judged(judge: Any, image: Tensor) -> Tensor:
    return torch.cat([judge.encoder(part).mean((-2, -1)) for part in image.clamp(0, 1).split(400)])


def statistics_of(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.double().mean(0), features.double().T.cov()


def distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    return frechet_distance(*first, *second).item()


def trained_judge(steps: int, path: Path) -> Any:
    """Return the judge, trained once: a ViT with a convolutional stem, on labels of images of its own."""
    pl.seed_everything(JUDGE_SEED, verbose=False)
    judge = EncoderPretraining(
        vision_encoder(None), NUM_CLASSES, optimization=Optimization(one_cycle(steps), adamw(0.05))
    )
    if not path.is_file():
        train = Shapes(100_000, IMAGE_SIZE, seed=JUDGE_SEED, plain=True)
        val = Shapes(VAL_IMAGES, IMAGE_SIZE, seed=VAL_SEED + JUDGE_SEED, plain=True)
        data = LatentDataModule(train, 64, IMAGE_SIZE, val=val, augmentation=Augmentation("center"))
        with tempfile.TemporaryDirectory() as folder:
            measured = fit(judge, data, steps, Path(folder))
        torch.save({"state_dict": judge.state_dict(), "accuracy": float(measured["val/accuracy"])}, path)
    content = torch.load(path, weights_only=True)
    judge.load_state_dict(content["state_dict"])
    print(f"the judge names {100 * content['accuracy']:.1f} % of the validation images", flush=True)
    return judge.eval()


def report(folder: Path, setting: str, seeds: list[int]) -> None:
    """Print the table: mean and standard deviation over seeds."""
    print(f"\n{setting}, {len(seeds)} seeds; mean ± standard deviation over seeds\n")
    print(f"| latents of | {' | '.join(name for name, _ in COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
    for run in RUNS:
        files = [folder / f"{setting}_seed{seed}_{run.replace(' ', '_')}.json" for seed in seeds]
        values = [json.loads(path.read_text()) for path in files]
        cells = [spread([scale * value[key] for value in values]) for key, (_, scale) in COLUMNS.items()]
        print(f"| {run} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3g} ± {deviation:.2g}"


if __name__ == "__main__":
    main()
