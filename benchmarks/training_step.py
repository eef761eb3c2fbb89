"""Seconds and peak memory of a training step of stage 2, against a loop with two optimizers as VA-VAE's is written.

    python benchmarks/training_step.py --size tiny32
    python benchmarks/training_step.py --size paper256 --batch 1 --rounds 2 --steps 2

Ours is ``PerceptualAlignment`` as it is, with the GAN's adaptive weight and the perceptual term, under gradient
clipping and the guard against gradients that are not finite. The peer is a LightningModule with manual optimisation
around the SAME networks, semantic loss and anchor: a generator's turn with two extra ``autograd.grad`` at the last
layer and a discriminator whose weights take gradients that are thrown away, then a discriminator's turn in which the
loss module evaluates the perceptual network again; no guard, and torch's default AdamW where our
configs say ``fused``. A Lightning Trainer drives both, in alternation, on the same batches. Before that, one step of
each shows that both give generator and discriminator the same gradients. Peak memory is that of a process which runs
only one of them. With one thread (``OMP_NUM_THREADS=1``) the seconds are the process's CPU seconds, which other work
on the machine hardly touches; with more they are those of the wall clock.

Peer: hustvl/LightningDiT at 2725fed, vavae/ldm/modules/losses/contperceptual.py and vavae/ldm/models/autoencoder.py.
"""

import argparse
import gc
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import vgg16

from aligntok import published
from aligntok.losses import (
    LPIPS,
    AdversarialLoss,
    FeatureDistance,
    PerceptualTerm,
    ReconstructionLoss,
    hinge,
)
from aligntok.networks import ConvDecoder, Frozen, LinearAdapter, PatchDiscriminator, Tokenizer, VisionEncoder
from aligntok.stages import Optimization, PerceptualAlignment

ADAPTIVE_EPS, MAX_ADAPTIVE = 1e-4, 1e4  # VA-VAE's
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
SKIPPED = 1  # steps at the start of each round, in which the optimizer allocates its state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny32")
    parser.add_argument("--batch", type=int, default=None, help="images; by default 32 for tiny32, 1 for paper256")
    parser.add_argument("--rounds", type=int, default=8, help="alternations")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way in a round")
    parser.add_argument("--fused_peer", action="store_true", help="give the peer our fused optimizer too")
    parser.add_argument("--only", choices=list(WAYS), help="run one way and print its peak memory")
    parser.add_argument("--no_memory", action="store_true", help="leave out the two processes that measure memory")
    args = parser.parse_args()
    quiet()
    batch = args.batch or {"tiny32": 32, "paper256": 1}[args.size]
    if args.only:
        stage, images = build(args.size, batch)
        before = peak()
        run(WAYS[args.only](stage), images, 1 + SKIPPED)
        print(f"{before:.3f} {peak():.3f}")
        return
    memory = {} if args.no_memory else {way: memory_of(way, args.size, batch) for way in WAYS}
    for way, (before, most) in memory.items():
        print(f"{way}: peak memory {most:.2f} GB, {before:.2f} GB of it before the first step", flush=True)
    stage, images = build(args.size, batch)
    modules = {name: make(stage) for name, make in WAYS.items()}
    print(f"{args.size}, batch {batch}, {torch.get_num_threads()} threads, {args.rounds} x {args.steps} steps")
    modules["two optimizers"].fused = args.fused_peer or None
    compare_gradients(stage, modules, images)
    put_sections(modules)
    seconds = {name: [] for name in WAYS}
    sections: dict[str, dict[str, float]] = {name: defaultdict(float) for name in WAYS}
    for number in range(args.rounds):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            times = run(modules[name], images, args.steps + SKIPPED)[SKIPPED:]
            seconds[name].append(statistics.median(times))
            for row, value in [*SECONDS.items(), ("all", sum(times))]:
                sections[name][row] += value / args.steps / args.rounds
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["two optimizers"], strict=True)]
    ratio = statistics.median(ratios)
    unit = "CPU s" if CLOCK is time.process_time else "s"
    print(f"\n| way | {unit} / step (median) | peak memory (GB) | of it before the first step |\n|---|---|---|---|")
    for name in WAYS:
        before, most = memory.get(name, (float("nan"),) * 2)
        print(f"| {name} | {statistics.median(seconds[name]):.4f} | {most:.2f} | {before:.2f} |")
    print(f"\nratio of the times: {ratio:.2f} (median of {len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f});"
          f" at least 1.2: {'yes' if ratio >= 1.2 else 'no'}")  # fmt: skip
    if memory:
        print(f"ratio of the peak memories: {memory['two optimizers'][1] / memory['ours'][1]:.2f}")
    print("\n| section (ms per step, exclusive) | ours | two optimizers |\n|---|---|---|")
    for row in sorted(set().union(*sections.values()), key=lambda row: -sections["ours"][row]):
        print(f"| {row} | " + " | ".join(f"{1e3 * sections[name][row]:.1f}" for name in WAYS) + " |")


# The peer


class TwoOptimizers(pl.LightningModule):
    """VA-VAE's training step around the networks of our stage."""

    def __init__(self, stage: PerceptualAlignment) -> None:
        super().__init__()
        self.stage = stage
        self.automatic_optimization = False
        self.fused: bool | None = None  # torch's default, as theirs

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        groups, rate = self.stage.parameter_groups(), self.stage.optimization.learning_rate
        options = {"lr": rate, "betas": (0.5, 0.9), "weight_decay": 0.0, "fused": self.fused}
        return [torch.optim.AdamW(group.parameters.values(), **options) for group in groups.values()]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        image = batch["image"]
        features = self.stage.tokenizer.encoder(image)
        latent, _ = self.stage.adapt(features, batch)
        terms = self.stage.latent_terms(image, features, latent)
        reconstruction = self.stage.tokenizer.decode(latent, clamp=False)
        generator, discriminator = self.optimizers()

        loss, logs = self.generator_loss(image, reconstruction)
        for name, (weight, value) in terms.items():
            loss, logs[name] = loss + weight * value, value.detach()
        with section("optimizer"):
            generator.zero_grad()
        self.manual_backward(loss)
        with section("optimizer"):
            generator.step()

        loss = self.discriminator_loss(image, reconstruction, logs)
        with section("optimizer"):
            discriminator.zero_grad()
        self.manual_backward(loss)
        with section("optimizer"):
            discriminator.step()
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(image))

    def reconstruction_loss(self, image: Tensor, reconstruction: Tensor, logs: dict[str, Tensor]) -> Tensor:
        distance = self.stage.loss.perceptual["perceptual"]
        l1, perceptual = F.l1_loss(reconstruction, image), distance(reconstruction, image)
        logs |= {"l1": l1.detach(), "perceptual": perceptual.detach()}
        return l1 + perceptual

    def generator_loss(self, image: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        adversarial, logs = self.stage.loss.adversarial, {}
        rec = self.reconstruction_loss(image, reconstruction, logs)
        with section("D forward"):
            gan = -adversarial.discriminator(reconstruction).mean()
        with section("adaptive weight"):
            last = self.stage.tokenizer.decoder.last_layer
            rec_gradient = torch.autograd.grad(rec, last, retain_graph=True)[0]
            gan_gradient = torch.autograd.grad(gan, last, retain_graph=True)[0]
            scale = (rec_gradient.norm() / (gan_gradient.norm() + ADAPTIVE_EPS)).clamp(0, MAX_ADAPTIVE).detach()
        logs |= {"gan_generator": gan.detach(), "gan_adaptive_weight": scale}
        return rec + adversarial.weight * scale * gan, logs

    def discriminator_loss(self, image: Tensor, reconstruction: Tensor, logs: dict[str, Tensor]) -> Tensor:
        self.reconstruction_loss(image, reconstruction, logs)  # their loss module begins with it, both times
        with section("D forward"):
            real = self.stage.loss.adversarial.discriminator(image)
            fake = self.stage.loss.adversarial.discriminator(reconstruction.detach())
        logs |= {"gan_logit_real": real.detach().mean(), "gan_logit_fake": fake.detach().mean()}
        return hinge(real, fake)


WAYS: dict[str, Callable[[PerceptualAlignment], pl.LightningModule]] = {
    "ours": lambda stage: stage,
    "two optimizers": TwoOptimizers,
}


# Sizes


def build(size: str, batch: int) -> tuple[PerceptualAlignment, list[dict[str, Tensor]]]:
    """Return the stage with random weights, and a few batches."""
    torch.manual_seed(0)
    stage, image_size = SIZES[size]()
    images = [{"image": torch.rand(batch, 3, image_size, image_size)} for _ in range(4)]
    stage.measure_latents([images[0]["image"]])
    return stage, images


def tiny32() -> tuple[PerceptualAlignment, int]:
    """The quickstart's size; the encoder's architecture is also the judge."""
    vit = partial(
        VisionEncoder,
        "vit_tiny_patch16_224",
        32,
        8,
        weights=None,
        model_args={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    )
    decoder = ConvDecoder(8, width=16, multipliers=(1, 2, 4, 4), num_blocks=1, num_groups=8)
    tokenizer = Tokenizer(vit(), LinearAdapter(128, 8), decoder)
    return alignment(tokenizer, FeatureDistance(vit()), PatchDiscriminator(32, num_layers=2)), 32


def paper256() -> tuple[PerceptualAlignment, int]:
    """The paper's size: DINOv2-L/14, VA-VAE's decoder and discriminator, LPIPS with VGG-16; all weights random."""
    decoder = ConvDecoder(32, width=128, multipliers=(1, 1, 2, 2, 4), num_blocks=3)
    encoder = VisionEncoder("vit_large_patch14_dinov2.lvd142m", 256, 16, weights=None)
    lpips = LPIPS()
    lpips.network = Frozen(random_lpips)
    return alignment(Tokenizer(encoder, LinearAdapter(1024, 32), decoder), lpips, PatchDiscriminator()), 256


def random_lpips() -> nn.Module:
    """LPIPS' network with random weights: a benchmark needs no download."""
    with patch.object(published, "published_state", lambda *_: vgg16().state_dict()):
        return LPIPS.build()


def alignment(tokenizer: Tokenizer, perceptual: nn.Module, discriminator: nn.Module) -> PerceptualAlignment:
    optimizer = partial(torch.optim.AdamW, betas=(0.5, 0.9), weight_decay=0.0, fused=True)  # as in our configs
    adversarial = AdversarialLoss(discriminator, weight=0.5)
    loss = ReconstructionLoss("l1", {"perceptual": PerceptualTerm(perceptual)}, adversarial)
    return PerceptualAlignment(tokenizer, loss, Optimization(1e-4, optimizer))


SIZES = {"tiny32": tiny32, "paper256": paper256}


# Measuring


class Clock(pl.Callback):
    """Seconds of each training step, from batch to weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if len(self.seconds) == SKIPPED:
            SECONDS.clear()
        self.began = CLOCK()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(CLOCK() - self.began)


class FirstGradients(pl.Callback):
    """Copies each group's gradients after the backward that is the last to concern it, before clipping."""

    def __init__(self, stage: PerceptualAlignment) -> None:
        self.stage, self.gradients = stage, {}

    def on_after_backward(self, *args: Any) -> None:
        for name, group in self.stage.parameter_groups().items():
            if (
                name == "discriminator" or name not in self.gradients
            ):  # the peer's second backward is the discriminator's
                self.gradients[name] = [None if p.grad is None else p.grad.clone() for p in group.parameters.values()]


def run(module: pl.LightningModule, images: list[dict[str, Tensor]], steps: int, *extra: pl.Callback) -> list[float]:
    """Train for some steps with a fresh optimizer; return the seconds of each."""
    clock = Clock()
    turns = 2 if isinstance(module, TwoOptimizers) else 1  # Lightning counts the steps of both optimizers
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps * turns,
        max_epochs=-1,
        gradient_clip_val=None,  # theirs has none: the same work on both sides
        callbacks=[*extra, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, DataLoader(images, batch_size=None))
    module.zero_grad()
    module.trainer = None  # with it goes the optimizer's state
    del trainer
    gc.collect()
    return clock.seconds


def compare_gradients(stage: PerceptualAlignment, modules: dict[str, Any], images: list[dict[str, Tensor]]) -> None:
    """Show that both ways give the same gradients, else stop."""
    given = stage.optimization
    stage.optimization = replace(given, learning_rate=0.0)  # weights stay
    found = {}
    for name, module in modules.items():
        callback = FirstGradients(stage)
        run(module, images, 1, callback)
        found[name] = callback.gradients
    stage.optimization = given
    for group in ("generator", "discriminator"):
        pairs = list(zip(*(gradients[group] for gradients in found.values()), strict=True))
        assert all((a is None) == (b is None) for a, b in pairs)
        gap = sum((a - b).double().square().sum() for a, b in pairs if a is not None).sqrt()
        norm = sum(b.double().square().sum() for _, b in pairs if b is not None).sqrt()
        print(f"{group}: gradients of both ways differ by {gap / norm:.1e} of their norm")
        if not gap <= 1e-4 * norm:
            raise SystemExit("the two ways do not optimise the same thing")


def memory_of(way: str, size: str, batch: int) -> tuple[float, float]:
    """Return the peak memory (GB) of a process that runs one way: before the first step, and after."""
    command = [sys.executable, __file__, "--size", size, "--batch", str(batch), "--only", way]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = output.split()[-2:]
    return float(before), float(after)


def peak() -> float:
    """Return the peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB


# Profile: exclusive time by section

SECONDS: dict[str, float] = defaultdict(float)
STACK: list[str] = []
MARK = [0.0]


def enter(name: str | None) -> None:
    """Book the time since the last mark on the innermost section, then go one in, or out."""
    now = CLOCK()
    if STACK:
        SECONDS[STACK[-1]] += now - MARK[0]
    MARK[0] = now
    STACK.append(name) if name else STACK.pop()


@contextmanager
def section(name: str) -> Iterator[None]:
    enter(name)
    try:
        yield
    finally:
        enter(None)


def timed(name: str | Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with section(name if isinstance(name, str) else name()):
            return function(*args, **kwargs)

    return call


def put_sections(modules: dict[str, Any]) -> None:
    """Wrap the parts of a step, in both ways, so that their time is booked in ``SECONDS``."""
    stage: PerceptualAlignment = modules["ours"]
    tokenizer, adversarial = stage.tokenizer, stage.loss.adversarial
    forwards = {
        "encoder forward": tokenizer.encoder,
        "decoder forward": tokenizer.decoder,
        "anchor forward": stage.anchor.network[0],
        "perceptual forward": stage.loss.perceptual["perceptual"],
        "D forward": adversarial.discriminator,
    }
    for name, network in forwards.items():
        network.forward = timed(name, network.forward)
    adversarial.adaptive_weight = timed("adaptive weight", adversarial.adaptive_weight)
    for module in modules.values():
        module.backward = timed("backward", module.backward)
    stage.optimizer_step = timed("optimizer", stage.optimizer_step)
    stage.training_step = timed("rest of the step", stage.training_step)
    modules["two optimizers"].training_step = timed("rest of the step", modules["two optimizers"].training_step)
    stage.configure_gradient_clipping = timed("norms, clipping, guard", stage.configure_gradient_clipping)
    turns = cycle(["perceptual backward", "D backward to the image"])

    def which() -> str:
        return STACK[-1] if STACK[-1] == "adaptive weight" else next(turns)

    torch.autograd.grad = timed(which, torch.autograd.grad)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
