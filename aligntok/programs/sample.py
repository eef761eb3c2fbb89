"""``aligntok sample``: samples of a generator as files, PNG for the eye and one ``.npz`` for ADM's evaluator."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor

from aligntok.cache.shards import Bytes
from aligntok.callbacks.generation import setting
from aligntok.data.images import read_image
from aligntok.data.labels import ClassLabels
from aligntok.data.order import Indices
from aligntok.data.prompts import Layout, PromptSamples, read_prompts
from aligntok.errors import check, check_positive
from aligntok.files import hash_tensors, read_json, write_atomically, write_text
from aligntok.messages import building
from aligntok.programs.command import make_parser, read, started
from aligntok.programs.fabric import dealt, held, make_fabric, on_first_rank, progress_of, unfinished, until_signal
from aligntok.stages.generator import GeneratorStage, generator_recipe

DESCRIPTION = """\
Draw samples of a generator into a folder. The same command goes on where it was cut off.

  aligntok sample --config dit.yaml --config sample.yaml --ckpt_path runs/dit/checkpoints/last.ckpt
  aligntok sample --config dit.yaml --config sample.yaml --ckpt_path CHECKPOINT --num_samples 64 --classes [207,360]
  aligntok sample --ckpt_path runs/t2i/checkpoints/last.ckpt --prompts "two foxes on a blue ground"

Of a training recipe its `model` is taken; without one, what the checkpoint says of itself. Sampler and guidance can be
changed: --model.sampler.init_args.num_steps 50."""

RECORD = "samples.json"


@torch.no_grad()
def sample(
    generator: GeneratorStage,
    asked: Sequence[int] | Indices | PromptSamples,
    folder: str | Path,
    fabric: Fabric | None = None,
    block_size: int = 500,
    batch_size: int = 50,
    npz: bool = True,
) -> None:
    """Write a sample of each label, ``png/000042_class7.png``, or of each prompt, and all in one ``.npz``.

    The ``.npz`` holds ``arr_0``, uint8 (N, H, W, 3), in the order of the labels or prompts, and ``arr_1``, the labels
    (N,), if there are some; its name says how many. A sample depends on its place and on its label or prompt alone, so
    any number of ranks writes the same files (another batch size may tip the rounding of a pixel); what is there from
    an earlier call is not drawn again.

    >>> sample(load_generator("last.ckpt"), ClassLabels(64, 1000).labels, "runs/samples")  # doctest: +SKIP

    Args:
        generator: With a tokenizer that decodes; it is left on the device, in eval mode.
        asked: Class of each sample, e.g. ``ClassLabels(50_000, 1000).labels``, or prompts.
        folder: Where the samples are, or will be.
        fabric: Device, precision and ranks; by default one process on whatever there is.
        block_size: Samples that are dealt to a rank at once.
        batch_size: Samples of a batch on one device.
        npz: Also write the ``.npz``.

    Raises:
        UserError: The folder holds samples of something else, or the generator has no such class.
    """
    check_positive(block_size=block_size, batch_size=batch_size)
    check(generator.tokenizer is not None, "samples are decoded by model.tokenizer: name its checkpoint")
    fabric = fabric or make_fabric(devices=1)
    generator.to(fabric.device).eval()
    check_kind(generator, prompts=isinstance(asked, PromptSamples))
    samples = asked if isinstance(asked, PromptSamples) else ClassSamples(np.asarray(asked, dtype=np.int64))
    files = SampleFolder(Path(folder), samples)
    ids = range(len(samples))
    blocks = [ids[first : first + block_size] for first in ids[::block_size]]

    def begin() -> list[range]:
        if generator.network.num_classes is not None:
            generator.network.check_condition(samples.batch(ids)["label"])
        files.begin(what_decides(generator, samples, fabric))
        return unfinished("blocks", blocks, files.is_finished)

    with held(fabric, folder):
        left = on_first_rank(fabric, begin)
        progress = progress_of(fabric, "samples", left)
        for _, part in until_signal(fabric, dealt(fabric, left, batch_size)):
            batch = fabric.to_device({"id": torch.tensor(part), **samples.batch(part)})
            with fabric.autocast():
                files.write(part, generator.predict_step(batch, 0)["image"])
            progress.add(len(part))
        on_first_rank(fabric, lambda: files.finish(npz, blocks))


class ClassSamples:
    """The samples of some labels (N,): which label each id has, and where its picture belongs below a folder.

    >>> ClassSamples(np.array([7, 8])).name(1)
    'png/000001_class8.png'
    """

    def __init__(self, labels: Indices) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, id: int) -> str:
        """Return the place of a sample's picture below the folder."""
        return f"png/{id:06d}_class{self.labels[id]}.png"

    def batch(self, ids: range) -> dict[str, Any]:
        """Return what a generator is asked for by these samples."""
        return {"label": torch.from_numpy(self.labels[ids.start : ids.stop])}

    def record(self) -> dict[str, Any]:
        """Return what decides on the samples."""
        return {"count": len(self), "labels": hashlib.sha256(self.labels.tobytes()).hexdigest()[:16]}

    def write_list(self, folder: Path) -> None:
        """Write nothing: the names of the pictures say the labels."""


class SampleFolder:
    """The pictures of a folder.

    >>> SampleFolder(Path("runs/samples"), ClassSamples(np.array([7, 8]))).path(1).as_posix()
    'runs/samples/png/000001_class8.png'

    Args:
        folder: With ``png/`` in it, or GenEval's folders.
        samples: What is asked for.
    """

    def __init__(self, folder: Path, samples: ClassSamples | PromptSamples) -> None:
        self.folder, self.samples = folder, samples

    def path(self, id: int) -> Path:
        """Return the place of a sample."""
        return self.folder / self.samples.name(id)

    def begin(self, record: dict[str, Any]) -> None:
        """Keep what decides on the samples; refuse a folder that holds samples of something else."""
        path = self.folder / RECORD
        there = read_json(path, dict) if path.exists() else record
        for key, ours in record.items():
            check(key in there, f"{path} is broken: it does not say {key}. Give another --output")
            what = f"holds samples of {key} {there[key]}, but this run's {key} is {ours} (see {RECORD})"
            check(there[key] == ours, f"{self.folder} {what}: give another --output")
        write_text(path, json.dumps(record, indent=1))
        self.samples.write_list(self.folder)

    def is_finished(self, ids: range) -> bool:
        """Tell whether the pictures of these samples are there; each was written whole or not at all."""
        return all(self.path(id).is_file() for id in ids)

    def write(self, ids: range, image: Tensor) -> None:
        """Write images (B, 3, H, W) in [0, 1]."""
        pixels = image.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        def save(id: int) -> None:
            picture = Image.fromarray(pixels[id - ids.start])
            write_atomically(self.path(id), lambda path: picture.save(path, format="png"))

        with ThreadPoolExecutor() as pool:
            list(pool.map(save, ids))

    def read(self, id: int) -> Bytes:
        """Return the pixels of a sample's picture, (H, W, 3)."""
        return np.asarray(read_image(self.path(id)))

    def finish(self, npz: bool, blocks: Sequence[range]) -> None:
        """Write the ``.npz`` from the pictures, block by block, so that 50,000 of them need no memory."""
        count = len(self.samples)
        print(f"{self.folder}: {count:,} samples, such as {self.samples.name(0)}", flush=True)
        if not npz:
            return
        height, width, _ = self.read(0).shape
        path = self.folder / f"samples_{count}x{height}x{width}x3.npz"
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}

        def pack(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor() as pool:
                    np.lib.format.write_array_header_1_0(cast(BinaryIO, file), header)
                    for ids in blocks:
                        for pixels in pool.map(self.read, ids):
                            file.write(pixels.tobytes())
                if self.samples.labels is not None:
                    with archive.open("arr_1.npy", "w") as file:
                        np.lib.format.write_array(cast(BinaryIO, file), self.samples.labels, allow_pickle=False)

        write_atomically(path, pack)
        print(f"{path}: arr_0 for ADM's evaluator, or `aligntok evaluate {path} --reference REFERENCE`", flush=True)


def check_kind(generator: GeneratorStage, prompts: bool) -> None:
    """Raise a ``UserError`` where a generator of classes is given prompts, or one of texts is given none."""
    what, reads = type(generator).__name__, generator.reads_text
    check(reads or not prompts, f"{what} takes classes and reads no prompts: leave out --prompts, give --classes")
    check(prompts or not reads, f"{what} reads prompts and takes no classes: give --prompts FILE or a text")


def what_decides(generator: Any, samples: ClassSamples | PromptSamples, fabric: Fabric) -> dict[str, Any]:
    """Return what decides on the samples."""
    return {
        "network": hash_tensors(generator.network.state_dict()),
        "guide": None if generator.guide is None else hash_tensors(generator.guide.network.state_dict()),
        "tokenizer": hash_tensors(generator.tokenizer.state_dict()),  # its fingerprint leaves out the decoder
        **{name: setting(part) for name, part in generator.sampling().items()},
        "seed": generator.seed,
        "precision": fabric.strategy.precision.precision,
        **({"text_encoder": generator.text_encoder_fingerprint} if generator.reads_text else {}),
        **samples.record(),
    }


def sample_command(arguments: list[str]) -> None:
    """Run ``aligntok sample`` with the words that follow it."""
    parser = make_parser("sample", "runs/samples", DESCRIPTION)
    add = parser.add_argument
    parser.add_subclass_arguments(GeneratorStage, "model", required=True, help="The generator's stage.")
    add("--ckpt_path", type=str | None, help="Checkpoint of its run.")
    add("--ema", type=float | None, help="Decay of the average to take; 0 for none. By default the first.")
    add("--init_from", type=str | None, help="Weights alone, such as LightningDiT's, in place of --ckpt_path.")
    add("--num_samples", type=int | None, help="How many; of a generator that takes classes.")
    add("--prompts", type=str | None, help="A text, or a file: .txt, a line each, .tsv, .jsonl, .json; see the docs.")
    add("--samples_per_prompt", type=int, default=1, help="Of each prompt; GenEval wants 4.")
    add("--layout", type=Layout, default="png", help="Of the folder of prompts: png, or geneval for its evaluation.")
    labels = parser.add_class_arguments(ClassLabels, skip={"num_classes", "num_samples"}, instantiate=False)
    own = parser.add_function_arguments(sample, skip={"generator", "asked", "folder", "fabric"})
    shared = {"model", "ckpt_path", "ema", "init_from"}
    prompts = ("prompts", "samples_per_prompt", "layout")
    options = read(parser, arguments, {*labels, *own, *prompts, "num_samples"}, shared, generator_recipe)
    given = options.ckpt_path is not None
    check(
        given or options.init_from is not None, "sample needs the weights: --ckpt_path CHECKPOINT or --init_from FILE"
    )
    check(given or options.ema is None, "--ema picks an average of --ckpt_path, and --init_from has none: leave it out")
    wanted = "say what to draw: --num_samples of a generator of classes, or --prompts FILE or a text; one of the two"
    check((options.num_samples is None) == (options.prompts is not None), wanted)
    with started(parser, "sample", options) as fabric:
        with building():
            generator: GeneratorStage = parser.instantiate(options).model
        if given:
            generator.load(options.ckpt_path, options.ema)
        else:
            generator.init_from(options.init_from)
        check_kind(generator, prompts=options.prompts is not None)
        asked: Indices | PromptSamples
        if options.prompts is None:
            numbers = {key: options[key] for key in ("num_samples", *labels)}
            asked = ClassLabels(num_classes=generator.network.num_classes or 1, **numbers).labels
        else:
            asked = PromptSamples(read_prompts(options.prompts), options.samples_per_prompt, options.layout)
        sample(generator, asked, options.output, fabric, **{key: options[key] for key in own})
