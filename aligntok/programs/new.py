"""``aligntok new FOLDER``: a config for the recipes ``photos/*.yaml``, chosen from the images and the device."""

from __future__ import annotations

import json
import os
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from aligntok.data.folders import ImageFolder
from aligntok.data.sources import spread_over
from aligntok.errors import check
from aligntok.files import write_text
from aligntok.programs.parser import Parser

DESCRIPTION = """\
Look at a folder of images, in class folders or flat, and at the device, and write a config for the photo recipes:
how large the images, how many in a batch, how many steps, each with its reason. The commands that follow are printed.

  aligntok new ~/Pictures/pets"""

NUM_LOOKED_AT = 200  # images whose size is read
MIN_IMAGES = 20
HELD_OUT = 0.1  # of the images, for validation: LatentDataModule's default
LARGE = 1500  # pixels of the shorter side from which reading takes longer than training
LEARNING_RATE = (0.001, 0.0003)  # on a CPU, on a GPU: its longer runs and its GAN want a smaller one; ours
GIB_PER_IMAGE = 0.25  # of a GPU's memory, for a 128 px image in a training step with GAN; ours, on the safe side


@dataclass(frozen=True)
class Images:
    """What is in a folder: number of images and classes, and the median of their shorter sides in pixels."""

    count: int
    num_classes: int
    side: int


@dataclass(frozen=True)
class Choices:
    """Numbers of a config, each with the reason in words.

    >>> choices = choose(Images(2000, 12, 375), gpu_memory=None)
    >>> choices.image_size
    (64, 'a CPU; four times the pixels take four times as long')
    """

    image_size: tuple[int, str]
    global_batch_size: tuple[int, str]
    max_steps: tuple[int, str]
    width: tuple[int, str]


def new_command(arguments: list[str]) -> None:
    """Run ``aligntok new`` with the words that follow it.

    Raises:
        UserError: The folder holds too few images, or none that can be read; the config exists.
    """
    parser = Parser("new", DESCRIPTION)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="images in class folders, or in one flat folder")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the config; by default FOLDER's name .yaml, here")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.expanduser().resolve()
    path: Path = options.output or Path(f"{folder.name or 'images'}.yaml")
    check(path.suffix == ".yaml", f"--output {path}: give a name that ends in .yaml")
    check(not path.exists(), f"{path} exists and stays as it is: give another --output, or remove it")
    images, memory = look_at(folder), gpu_memory()
    choices = choose(images, memory)
    write_text(path, config(folder, images, choices, on_gpu=memory is not None))
    print(f"{images.count} images, shorter side {images.side} px (median), {images.num_classes or 'no'} classes")
    for name, (value, reason) in vars(choices).items():
        print(f"{name} {value}: {reason}")
    if images.side >= LARGE:
        print("The images are large: reading them takes longer than training. Copies of 512 px train as well.")
    print(f"\nWrote {path}. Change what you like, then:\n")
    print("\n".join(f"  {command}" for command in commands(path, folder, on_gpu=memory is not None)))


def look_at(folder: Path) -> Images:
    """Return what is in a folder of images.

    Raises:
        UserError: It holds too few images, or none that can be read.
    """
    source = ImageFolder(str(folder))
    names = source.index[1]
    check(len(names) >= MIN_IMAGES, f"{folder} holds {len(names)} images: give at least {MIN_IMAGES}")
    sides = []
    for index in spread_over(len(names), NUM_LOOKED_AT):
        try:
            with Image.open(folder / os.fsdecode(names[index])) as image:
                sides.append(min(image.size))
        except (OSError, SyntaxError, ValueError):  # `fit` names it and counts it
            continue
    check(bool(sides), f"{folder}: no image can be read ({min(len(names), NUM_LOOKED_AT)} of {len(names)} tried)")
    return Images(len(names), len(source.classes), int(statistics.median(sides)))


def gpu_memory() -> float | None:
    """Return the memory of the GPU in GiB, ``None`` where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def choose(images: Images, gpu_memory: float | None) -> Choices:
    """Return the numbers for some images on a GPU of so many GiB, or on a CPU (``None``)."""
    on_gpu = gpu_memory is not None
    largest, most, passes, longest, width = (128, 64, 200, 20_000, 64) if on_gpu else (64, 32, 10, 500, 16)
    size = max(32, min(largest, power_of_two(images.side)))
    learnt = round(images.count * (1 - HELD_OUT))
    fitting = int(gpu_memory / GIB_PER_IMAGE) if gpu_memory is not None else most
    batch = min(most, power_of_two(fitting), power_of_two(learnt // 2))
    steps = min(longest, max(200, 100 * round(passes * learnt / batch / 100)))
    device = f"a GPU of {gpu_memory:.0f} GiB" if on_gpu else "a CPU; four times the pixels take four times as long"
    limit = "an epoch needs two batches" if batch < min(most, fitting) else device.partition(";")[0]
    epochs = f"{steps * batch / learnt:.0f} passes over {learnt} images, at most {longest} steps"
    return Choices(
        image_size=(size, device if size == largest else f"the images have {images.side} px"),
        global_batch_size=(batch, limit),
        max_steps=(steps, f"of each stage: {epochs}"),
        width=(width, "of the decoder, where most of the time goes"),
    )


def power_of_two(number: int) -> int:
    """Return the largest power of two that is not above a number, at least 1."""
    return 1 << max(number, 1).bit_length() - 1


def config(folder: Path, images: Images, choices: Choices, on_gpu: bool) -> str:
    """Return the config as YAML with the reasons as comments."""
    said = {name: f"{value}   # {reason}" for name, (value, reason) in vars(choices).items()}
    steps = choices.max_steps[0]
    weight = f"{{{steps * 2 // 5}: 0.0, {steps // 2}: 0.5}}"
    gan = f"    loss: {{init_args: {{adversarial: {{init_args: {{weight: {weight}}}}}}}}}   # from the middle on\n"
    return f"""\
# Written by `aligntok new`: {images.count} images, {images.num_classes or "no"} classes.
# It goes over the recipes photos/stage1.yaml to photos/stage3.yaml; change what you like.
{"layers: [stage/offline_gan.yaml, run/gpu.yaml]" if on_gpu else ""}
data:
  train: {{class_path: aligntok.data.ImageFolder, init_args: {{root: {json.dumps(str(folder))}}}}}
  image_size: {said["image_size"]}
  global_batch_size: {said["global_batch_size"]}
model:
  init_args:
{gan if on_gpu else ""}\
    optimization:   # rises, and falls to 0 at max_steps
      learning_rate: {{0: 0.0, {steps // 20}: {LEARNING_RATE[on_gpu]}, {steps}: 0.0}}
    tokenizer:
      init_args:
        decoder:
          init_args:
            width: {said["width"]}
trainer:
  max_steps: {said["max_steps"]}
  val_check_interval: {steps // 2}   # steps between measurements
"""


def commands(path: Path, folder: Path, on_gpu: bool) -> list[str]:
    """Return the commands from images to samples, in the order in which to run them."""
    runs = f"runs/{path.stem}"
    last = {name: f"{runs}/{name}/checkpoints/last.ckpt" for name in ("stage1", "stage2", "stage3", "dit")}
    words = []
    for stage, before in (("stage1", None), ("stage2", "stage1"), ("stage3", "stage2")):
        start = ["--init_from", last[before]] if before else []
        layers = ["--config", f"photos/{stage}.yaml", "--config", str(path)]
        words.append(["fit", *layers, "--output", f"{runs}/{stage}", *start])
    images = ["--config", "photos/cache.yaml", "--images.root", str(folder)]
    words.append(["encode", *images, "--tokenizer", last["stage3"], "--output", f"{runs}/latents"])
    larger = ["--config", "size/dit_s.yaml", "--config", "run/gpu.yaml", "--trainer.max_steps", "20000"]
    larger += ["--model.optimization.learning_rate", "2.0e-4"]
    data = ["--data.train.folder", f"{runs}/latents", "--model.tokenizer.path", last["stage3"]]
    words.append(["fit", "--config", "photos/dit.yaml", *(larger if on_gpu else []), *data, "--output", f"{runs}/dit"])
    words.append(["sample", "--ckpt_path", last["dit"], "--num_samples", "100", "--output", f"{runs}/samples"])
    words.append(["report", runs])
    return [shlex.join(["aligntok", *line]) for line in words]
