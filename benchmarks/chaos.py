"""Whatever happens to a chain, each step ends as if nothing had, or says what is wrong and keeps what there was.

    OMP_NUM_THREADS=1 python benchmarks/chaos.py --trials 100

Stages 1, 2 and 3, the cache, a diffusion transformer and its samples, at toy size on a folder of digits. A trial takes
what an undisturbed chain has made, and runs one step of it anew with one fault, drawn with its moment from a seed; then
the damage is mended as the message says, and the same command runs until it has ended. A trial is good if

- each run ended with 0, or after a signal with 130 or 143, or with 2 and one line that says what is wrong, and
- what the step made at the end equals, bit for bit, what the undisturbed step made (with a NaN: one with that NaN).

A step runs in a process that is forked from this one, which has imported everything.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from kill_resume import COMPARED, ENCODER, differences
from PIL import Image
from sklearn.datasets import load_digits

import aligntok.cli
import aligntok.programs.encode
import aligntok.programs.repair
import aligntok.programs.sample  # noqa: F401  # what a forked process needs is here already
from aligntok.__main__ import main as aligntok_main
from aligntok.data import ImageFolder, LatentShards  # noqa: F401

STEPS, SAVE_EVERY, NAN_STEP = 12, 4, 6
LAST = "checkpoints/last.ckpt"
CHAIN = {  # the words of each step, in order
    "stage1": "fit --config stage1.yaml --ckpt_path last",
    "stage2": f"fit --config stage2.yaml --init_from stage1/{LAST} --ckpt_path last",
    "stage3": f"fit --config stage3.yaml --init_from stage2/{LAST} --ckpt_path last",
    "latents": f"encode --config latents.yaml --tokenizer stage3/{LAST}",
    "dit": "fit --config dit.yaml --ckpt_path last",
    "samples": f"sample --config dit.yaml --config samples.yaml --ckpt_path dit/{LAST}",
}
FITS = ("stage1", "stage2", "stage3", "dit")
SIGNALS = {"kill -9": signal.SIGKILL, "TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "Ctrl-C": signal.SIGINT}
FAULTS = {  # name: steps that it may happen to
    **dict.fromkeys(SIGNALS, tuple(CHAIN)),
    "full disk": tuple(CHAIN),
    "corrupt checkpoint": FITS,
    "truncated checkpoint": FITS,
    "damaged input": ("stage2", "stage3", "latents", "samples"),
    "damaged shard": ("latents", "dit"),
    "NaN batch": FITS,
    "vanished image": ("stage1", "stage2", "stage3", "latents"),
}


class Poison(pl.Callback):
    """Makes the gradient of one step NaN, where the environment says so."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if os.environ.get("CHAOS_NAN") and trainer.global_step == NAN_STEP:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("nan"))


class Run(NamedTuple):
    """How a run of a step ended."""

    code: int
    text: str


class Step:
    """One step of the chain in a folder of its own, where the earlier ones are done."""

    def __init__(self, name: str, folder: Path, made: Path) -> None:
        self.name, self.folder, self.runs = name, folder, []
        if folder != made:
            shutil.copytree(made, folder, ignore=lambda path, names: not_before(name, names))
        self.output, self.log = folder / name, folder.with_name(f"{folder.name}.txt")  # a full disk takes no log

    def run(self, fault: Callable[[int], None] | None = None, words: str | None = None) -> Run:
        """Run the step; ``fault`` is called with its process. Note how it ended."""
        sys.stdout.flush()
        process = os.fork()
        if not process:
            os._exit(child(self.folder, self.log, (words or CHAIN[self.name]).split()))
        if fault is not None:
            fault(process)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.runs.append(Run(code, self.log.read_text(errors="replace")))
        return self.runs[-1]

    def finish(self) -> None:
        """Run the step until it has ended well."""
        for _ in range(3):
            if self.run().code == 0:
                return

    def problem(self, expected: Any) -> str:
        """Return what was not as it should be, nothing where all was."""
        for code, text in self.runs:
            said = [line for line in text.splitlines() if line.startswith("aligntok: error:")]
            if "Traceback" in text or code not in (0, 2, 130, 143, -signal.SIGKILL) or (code == 2) != bool(said):
                return f"exit {code}: {' / '.join(text.strip().splitlines()[-2:])[-300:]}"
        if self.runs[-1].code:
            return f"no end: {self.runs[-1].text.strip().splitlines()[-1][-300:]}"
        return next(differences(expected, made(self.output)), "")


def not_before(name: str, names: list[str]) -> set[str]:
    """Return the names of the steps that come with or after this one."""
    order = list(CHAIN)
    return set(names) & set(order[order.index(name) :])


def child(folder: Path, log: Path, words: list[str]) -> int:
    """Be a process that runs a command, and return its exit code."""
    os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)
    try:
        return aligntok_main(words)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def made(output: Path) -> Any:
    """Return what a step made: the state in a run's last checkpoint, or a hash of each file."""
    if (output / LAST).is_file():
        checkpoint = torch.load(output / LAST, weights_only=True)
        return {key: checkpoint[key] for key in COMPARED if key in checkpoint}
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


# Faults: each runs the step with it, and mends what it did


def send(number: int, moment: float) -> Callable[[int], None]:
    """Return a fault: a signal, so many seconds after the start."""

    def fault(process: int) -> None:
        end = time.monotonic() + moment
        while time.monotonic() < end and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(process, number)

    return fault


def full_disk(step: Step, draw: random.Random, size: int) -> None:
    """Run the step on a disk that has room for a part of what it writes, then for all; needs a user who may mount."""
    disk = step.folder.with_name("disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(disk)], check=True)
    try:
        shutil.copytree(step.folder, disk, dirs_exist_ok=True)
        room = shutil.disk_usage(disk).used + int(draw.uniform(0.05, 1.1) * size)
        subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
        home, step.folder, step.output = step.folder, disk, disk / step.name
        step.run()
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        step.finish()
        shutil.copytree(disk, home, dirs_exist_ok=True)
        step.folder, step.output = home, home / step.name
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        disk.rmdir()


def cut_off(step: Step, draw: random.Random, seconds: float) -> None:
    """Let the step begin, and end it somewhere."""
    step.run(send(signal.SIGTERM, draw.uniform(0.3, 1.0) * seconds))


def damage(path: Path, draw: random.Random, cut: bool = False) -> bytes:
    """Change one byte of a file, or cut it off; return what was in it."""
    before = path.read_bytes()
    place = draw.randrange(len(before))
    path.unlink()  # other names of the file stay as they are
    path.write_bytes(before[:place] if cut else before[:place] + bytes([before[place] ^ 0xFF]) + before[place + 1 :])
    return before


def damaged_checkpoint(step: Step, draw: random.Random, seconds: float, cut: bool) -> None:
    """Damage what a run would go on from; then go on from an earlier one, or begin anew."""
    cut_off(step, draw, seconds)
    last = step.output / LAST
    if not last.is_file():
        return step.finish()
    damage(last, draw, cut)
    if step.run().code == 0:  # a byte that nobody reads
        return None
    last.unlink()
    if kept := sorted(last.parent.glob("step_*.ckpt")):
        shutil.copy(kept[-1], last)
    step.finish()
    return None


def damaged_input(step: Step, draw: random.Random) -> None:
    """Damage the checkpoint that the step begins with, and bring it back."""
    words = CHAIN[step.name].split()
    path = step.folder / next(word for word in words if word.endswith(LAST))
    before = damage(path, draw, draw.random() < 0.5)
    step.run()
    path.write_bytes(before)
    if step.runs[-1].code:
        step.finish()


def damaged_shard(step: Step, draw: random.Random, seconds: float) -> None:
    """Damage a file of the cache, as it is written or as it is read; then repair it."""
    if step.name == "latents":
        step.run()
    else:
        cut_off(step, draw, seconds)
    files = [path for path in (step.folder / "latents").rglob("*") if path.is_file() and path.suffix != ".yaml"]
    before = {path: path.read_bytes() for path in files}
    path = draw.choice(sorted(files))
    damage(path, draw, draw.random() < 0.5)
    step.run()
    if step.name != "latents" and step.run(words="repair latents").code:
        shutil.rmtree(step.folder / "latents")  # a manifest that is none: "restore it, or write the cache again"
        step.run(words=CHAIN["latents"])
    if any(path.read_bytes() != content for path, content in before.items()):
        step.runs.append(Run(1, f"{path.name} of the cache is not repaired"))
        return
    step.finish()


def vanished_image(step: Step, draw: random.Random, seconds: float) -> None:
    """Take an image away while the step runs, all but its name, as where a link leads nowhere; then bring it back."""
    path = draw.choice(sorted((step.folder / "images").rglob("*.png")))
    content, moment = path.read_bytes(), draw.uniform(0, seconds)

    def fault(process: int) -> None:
        time.sleep(moment)
        path.unlink()
        path.symlink_to("nowhere")

    ended = step.run(fault)
    path.unlink()
    path.write_bytes(content)
    if ended.code == 0 and path.name in ended.text:  # it went on without, and said so
        shutil.rmtree(step.output)
    step.finish()


def trial(fault: str, step: Step, draw: random.Random, seconds: float, size: int) -> None:
    """Run a step with a fault until it has ended."""
    if fault in SIGNALS:
        step.run(send(SIGNALS[fault], draw.uniform(0.05, 1) * seconds))
        step.finish()
    elif fault == "full disk":
        full_disk(step, draw, size)
    elif fault.endswith("checkpoint"):
        damaged_checkpoint(step, draw, seconds, fault.startswith("trunc"))
    elif fault == "damaged input":
        damaged_input(step, draw)
    elif fault == "damaged shard":
        damaged_shard(step, draw, seconds)
    elif fault == "vanished image":
        vanished_image(step, draw, seconds)
    else:
        step.run(send(signal.SIGKILL, draw.uniform(0.3, 1) * seconds))
        step.finish()


def prepare(folder: Path) -> None:
    """Write the images and a config for each step."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:240], digits.target[:240], strict=True)):
        path = folder / "images" / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((32, 32)).convert("RGB").save(path)
    images = {"class_path": "aligntok.data.ImageFolder", "init_args": {"root": "images"}}
    decoder = {"latent_dim": 8, "width": 8, "multipliers": [1, 2, 2, 2], "num_blocks": 1, "num_groups": 4}
    tokenizer = {
        "encoder": {"init_args": {**ENCODER, "weights": None}},
        "adapter": {"init_args": {"width": 64, "latent_dim": 8}},
        "decoder": {"init_args": decoder},
    }
    optimization = {"optimization": {"learning_rate": {0: 0.0, 4: 1e-3, STEPS: 1e-4}}}
    run = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "val_check_interval": 6},
        "callbacks": {
            "checkpoint": {"init_args": {"every_n_steps": SAVE_EVERY, "keep_every_n_steps": SAVE_EVERY}},
            "ema": {"init_args": {"decay": 0.9}},
            "poison": {"class_path": "chaos.Poison"},
        },
    }
    data = {"global_batch_size": 16, "num_workers": 0, "image_size": 32, "augmentation": {"flip": False}}
    for name, layer in (
        ("stage1", "latent_alignment"),
        ("stage2", "perceptual_alignment"),
        ("stage3", "decoder_refinement"),
    ):
        config = {
            "layers": ["base.yaml", f"stage/{layer}.yaml", "stage/tokenizer.yaml", "data/folder.yaml"],
            "output": name,
            "model": {"init_args": {"tokenizer": {"init_args": tokenizer}, **optimization}},
            "data": {**data, "train": images, "calibration_images": 64},
            "trainer": run["trainer"],
            "callbacks": {**run["callbacks"], "probe": None},
        }
        write(folder, name, config)
    write(folder, "latents", {"output": "latents", "images": images, "image_size": 32, "num_workers": 0})
    generator = {
        "layers": ["base.yaml", "stage/latent_diffusion.yaml", "size/dit_debug.yaml"],
        "output": "dit",
        "model": {"init_args": {"tokenizer": {"init_args": {"path": f"stage3/{LAST}"}}, **optimization}},
        "data": {
            "train": {"class_path": "aligntok.data.LatentShards", "init_args": {"folder": "latents", "verify": True}},
            "global_batch_size": 16,
            "augmentation": {"flip": False},
        },
        **run,
    }
    write(folder, "dit", generator)
    write(folder, "samples", {"layers": ["sample.yaml"], "output": "samples", "num_samples": 40})


def write(folder: Path, name: str, config: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def undisturbed(folder: Path) -> dict[str, tuple[float, int]]:
    """Run the chain; return the seconds and the bytes that each step took."""
    costs = {}
    for name in CHAIN:
        step, began = Step(name, folder, folder), time.monotonic()
        ended = step.run()
        if ended.code:
            raise SystemExit(f"{name} ended with {ended.code}:\n{ended.text}")
        size = sum(path.stat().st_size for path in step.output.rglob("*") if path.is_file())
        costs[name] = time.monotonic() - began, size
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of faults, steps and moments")
    parser.add_argument("--first", type=int, default=1, help="number of the first trial")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    good, clean = 0, {}
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        chain = Path(name) / "chain"
        chain.mkdir()
        prepare(chain)
        costs = undisturbed(chain)
        for step, (seconds, size) in costs.items():
            print(f"{step}: {seconds:.1f} s, {size / 1e6:.2f} MB", flush=True)
        print("\n| trial | step | fault | exit codes | result |\n|---|---|---|---|---|", flush=True)
        for number in range(args.first, args.first + args.trials):
            draw = random.Random(f"{args.seed}.{number}")
            fault = draw.choice(list(FAULTS))
            step = Step(draw.choice(FAULTS[fault]), Path(name) / f"trial{number}", chain)
            os.environ["CHAOS_NAN"] = "1" if fault == "NaN batch" else ""
            key = step.name, fault == "NaN batch"
            if key not in clean and key[1]:
                whole = Step(step.name, Path(name) / f"nan_{step.name}", chain)
                whole.run()
                clean[key] = made(whole.output)
            elif key not in clean:
                clean[key] = made(chain / step.name)
            trial(fault, step, draw, *costs[step.name])
            problem = step.problem(clean[key])
            good += not problem
            codes = " ".join(str(run.code) for run in step.runs)
            print(f"| {number} | {step.name} | {fault} | {codes} | {problem or 'OK'} |", flush=True)
            shutil.rmtree(step.folder)
    print(f"\n{good}/{args.trials}")
    return 0 if good == args.trials else 1


if __name__ == "__main__":
    sys.exit(main())
