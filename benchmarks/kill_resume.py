"""A run that is killed and resumed is the uninterrupted run, bit for bit.

    python benchmarks/kill_resume.py --trials 20

Stage 2 with a GAN and an EMA, through the command line. The whole process group gets SIGKILL at a random moment between
its first step and its end, so also while a checkpoint is written or validation runs with the averaged weights; then the
run goes on by ``--ckpt_path last``. At the end its last checkpoint must equal that of a run which nobody touched:
averaged and raw weights, optimizer, schedules, EMA, semantic anchor, step, position in the data.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 60, 5
STARTED = "  stage:"  # first line of the summary that a run prints before its first step
COMPARED = (
    *("state_dict", "current_model_state", "averaging_state", "anchor", "optimizer_states", "lr_schedulers"),
    *("global_step", "LatentDataModule"),
)
ENCODER = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "downsampling": 8,
    "model_args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}


class StepFile(pl.Callback):
    """Appends each finished step to ``steps.txt``: how far a killed run came."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        with (Path(trainer.default_root_dir) / "steps.txt").open("a") as file:
            file.write(f"{trainer.global_step}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as name:
        folder = Path(name)
        config = prepare(folder, args.threads)
        began, ended = finish(config, folder / "reference", args.threads)
        seconds = ended - began
        reference = load(folder / "reference")
        print(f"reference: {STEPS} steps in {seconds:.1f} s, a checkpoint every {SAVE_EVERY}\n", flush=True)
        print(
            "| trial | killed after | step | saved step | in a write | resumed run |\n" + "|---" * 6 + "|", flush=True
        )
        good = 0
        for number in range(1, args.trials + 1):
            good += trial(number, config, folder, reference, seconds, moments, args.threads)
    print(f"\n{good}/{args.trials} bit-equal to the uninterrupted run")
    return 0 if good == args.trials else 1


def trial(
    number: int, config: Path, folder: Path, reference: dict, seconds: float, moments: random.Random, threads: int
) -> bool:
    """Kill a run at a random moment, resume it until it is done, and compare."""
    output = folder / f"trial{number}"
    moment = None
    while moment is None:
        moment = kill(config, output / "run", moments.uniform(0, seconds), threads)
        if moment is None:  # it was faster than the reference and had ended
            output = output.with_name(output.name + "_")
    run = output / "run"
    last = run / "checkpoints" / "last.ckpt"
    steps = (run / "steps.txt").read_text().split() if (run / "steps.txt").is_file() else []
    saved = torch.load(last, weights_only=True)["global_step"] if last.is_file() else 0
    half = any((run / "checkpoints").glob(".*.partial"))
    finish(config, run, threads)
    difference = next(differences(reference, load(run)), None)
    result = "OK" if difference is None else f"DIFF {difference}"
    row = (number, f"{moment:.2f} s", steps[-1] if steps else 0, saved, "yes" if half else "no", result)
    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return difference is None


def kill(config: Path, output: Path, seconds: float, threads: int) -> float | None:
    """Start a run and kill it so many seconds after its first step begins; None if it had ended by then."""
    process = start(config, output, threads)
    try:
        wait_for_first_step(process)
        time.sleep(seconds)
    finally:
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return None if ended or process.returncode != -signal.SIGKILL else seconds


def finish(config: Path, output: Path, threads: int) -> tuple[float, float]:
    """Run, or go on, to the end; return the moments of the first step and of the end."""
    process = start(config, output, threads)
    began = wait_for_first_step(process)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{output} ended with {process.returncode}:\n{text}")
    return began, time.monotonic()


def start(config: Path, output: Path, threads: int) -> subprocess.Popen:
    return fit("--config", str(config), "--output", str(output), "--ckpt_path", "last", threads=threads)


def fit(*arguments: str, threads: int) -> subprocess.Popen:
    """Start ``aligntok fit`` in a process group of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "aligntok", "fit", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_first_step(process: subprocess.Popen) -> float:
    """Return the moment of the summary, or of the end: a run that was killed after its last step prints none."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(STARTED):
            return time.monotonic()
    if process.wait():
        raise SystemExit(f"the run ended with {process.returncode} before its first step:\n{''.join(lines)}")
    return time.monotonic()


def prepare(folder: Path, threads: int) -> Path:
    """Pretrain a tiny encoder, run stage 1, and return the config of stage 2."""
    weights = str(folder / "encoder" / "encoder.safetensors")
    tokenizer = {
        "encoder": {"init_args": {**ENCODER, "weights": weights}},
        "adapter": {"init_args": {"width": 64, "latent_dim": 8}},
        "decoder": {
            "init_args": {"latent_dim": 8, "width": 8, "multipliers": [1, 2, 2, 2], "num_blocks": 1, "num_groups": 4}
        },
    }
    optimization = {"optimization": {"learning_rate": {0: 0.0, 10: 1e-3, STEPS: 1e-4}}}
    data = {
        "global_batch_size": 64,
        "augmentation": {"flip": True},
    }  # 22 steps an epoch: the run crosses two ends
    encoder = {
        "layers": ["base.yaml", "stage/encoder_pretraining.yaml", "data/digits.yaml"],
        "output": str(folder / "encoder"),
        "model": {"init_args": {"encoder": {"init_args": ENCODER}, "num_classes": 10, **optimization}},
        "trainer": {"max_steps": 20, "limit_val_batches": 0},
    }
    stage1 = {
        "layers": ["base.yaml", "stage/latent_alignment.yaml", "stage/tokenizer.yaml", "data/digits.yaml"],
        "output": str(folder / "stage1"),
        "model": {"init_args": {"tokenizer": {"init_args": tokenizer}, **optimization}},
        "data": data,
        "trainer": {"max_steps": 20, "limit_val_batches": 0},
    }
    judge = {"class_path": "aligntok.networks.VisionEncoder", "init_args": {**ENCODER, "weights": weights}}
    critic = {"class_path": "aligntok.networks.PatchDiscriminator", "init_args": {"width": 8, "num_layers": 2}}
    distance = {"class_path": "aligntok.losses.FeatureDistance", "init_args": {"encoder": judge}}
    adversarial = {  # both start within the run: the discriminator at 10, its opinion counts from 20 on
        "class_path": "aligntok.losses.AdversarialLoss",
        "init_args": {"discriminator": critic, "weight": {19: 0.0, 20: 0.5}, "discriminator_start": 10},
    }
    stage2 = {
        "layers": ["base.yaml", "stage/perceptual_alignment.yaml", "stage/tokenizer.yaml", "data/digits.yaml"],
        "model": {
            "init_args": {
                "tokenizer": {"init_args": tokenizer},
                **optimization,
                "loss": {"init_args": {"perceptual": {"features": {"distance": distance}}, "adversarial": adversarial}},
            }
        },
        "data": data,
        "trainer": {
            "max_steps": STEPS,
            "val_check_interval": 15,
        },
        "callbacks": {
            "checkpoint": {"init_args": {"every_n_steps": SAVE_EVERY}},
            "ema": {"init_args": {"decay": 0.9}},
            "reconstruction_grid": {"init_args": {"every_n_steps": 7}},
            "probe": None,
            "steps": {"class_path": "kill_resume.StepFile"},
        },
        "init_from": str(folder / "stage1" / "checkpoints" / "last.ckpt"),
    }
    paths = [folder / f"{name}.yaml" for name in ("encoder", "stage1", "stage2")]
    for path, config in zip(paths, (encoder, stage1, stage2), strict=True):
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    for path in paths[:2]:
        process = fit("--config", str(path), threads=threads)
        text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{path.stem} ended with {process.returncode}:\n{text}")
    return paths[2]


def load(output: Path) -> dict[str, Any]:
    """Return what is compared of a run's last checkpoint."""
    checkpoint = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in COMPARED}


def differences(ours: Any, theirs: Any, key: str = "") -> Iterator[str]:
    """Yield the keys at which two nested values differ, to the last bit and type."""
    if type(ours) is not type(theirs):
        yield f"{key}: {type(ours).__name__} and {type(theirs).__name__}"
    elif isinstance(ours, dict):
        if list(ours) != list(theirs):
            yield f"{key}: other keys {sorted(set(map(str, ours)) ^ set(map(str, theirs)))}"
        for name in ours.keys() & theirs.keys():
            yield from differences(ours[name], theirs[name], f"{key}.{name}")
    elif isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            yield f"{key}: {len(ours)} and {len(theirs)} entries"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(a, b, f"{key}.{i}")
    elif isinstance(ours, torch.Tensor):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape or not bits_equal(ours, theirs):
            gap = (ours.double() - theirs.double()).abs().max().item() if ours.shape == theirs.shape else float("nan")
            yield f"{key}: by up to {gap:.3g}"
    elif ours != theirs:
        yield f"{key}: {ours!r} and {theirs!r}"


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors of one shape and dtype hold the same bits: unlike ``torch.equal``, -0 is not 0."""
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


if __name__ == "__main__":
    sys.exit(main())
