"""The files that a run needs: where they come from, what stands for those not written yet, and what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from omegaconf import OmegaConf

from aligntok.data.shards import Shards
from aligntok.data.sources import length
from aligntok.errors import UserError
from aligntok.layers import find_config, read_command, read_configs, shipped_configs
from aligntok.programs.fetch import parts_of, published_weights
from aligntok.published import find_published
from aligntok.references import CLASSES_OF_MISSING
from aligntok.stages import Stage
from aligntok.stages.supported import check_precision, check_strategy
from aligntok.stages.tokenizer_stage import tokenizer_is_loaded
from aligntok.weights.checkpoint import UNWRITTEN, build, read_checkpoint
from aligntok.weights.migration import STAGE_KEY

IMAGENET = 1_281_167, 1000  # images, classes
FILES = {"path": "checkpoint", "folder": "cache", "root": "images", "weights": "weights", "statistics": "statistics"}


class Need(NamedTuple):
    """A file or folder that a run needs: what, where, whether it is there, and the command that brings it."""

    kind: str
    place: str
    here: bool
    source: str


def needs(config: Any) -> list[Need]:
    """Return the files and folders that a config names, each once."""
    found: dict[str, Need] = {}
    for kind, arguments in parts_of(config):
        weights = published_weights(kind, arguments)
        if weights is not None:
            here = find_published(weights.name) is not None or in_cache_of_hub(weights.url)
            found[weights.name] = Need("weights", weights.name, here, "aligntok fetch")
        for key, what in FILES.items():
            place = arguments.get(key)
            if isinstance(place, str) and not (key == "weights" and place in ("hub", "offline")):
                writer, verb = writer_of(Path(place)), "encode" if what == "cache" else "fit"
                source = f"aligntok {verb} --config {writer}" if writer else "yours"
                found[place] = Need(what, place, Path(place).expanduser().exists(), source)
    return list(found.values())


def in_cache_of_hub(url: str) -> bool:
    """Whether the hub's own cache has what is at an address of the hub."""
    repository, _, file = url.split("/", 3)[-1].partition("/resolve/main/")
    return bool(file) and isinstance(try_to_load_from_cache(repository, file), str)


def problems(stage: Any, data: Any, config: Any, num_gpus: int, size: int) -> Iterator[str]:
    """Yield all that would stop a run before its first step, as far as it can be seen without running it.

    Args:
        stage: On the meta device.
        data: The data module.
        config: Of ``fit``.
        num_gpus: Of this machine that it wants.
        size: Bytes of a checkpoint.
    """
    for need in needs(config):
        if not need.here and need.kind not in ("images", "cache"):  # these are opened, below
            yield f"{need.kind} {need.place} is not here: {need.source}"
    for split in ("train", "val", "test"):
        source = getattr(data, split)
        if isinstance(source, torch.utils.data.Dataset):
            look = partial(data.open, split) if "train" in (split, *data.sources) else length
            yield from said(partial(look, source))
    previous = config.ckpt_path or config.init_from
    if previous:
        yield from said(lambda: read_checkpoint(previous) if config.ckpt_path else stage.init_from(previous))
    elif stage.needs_previous and not tokenizer_is_loaded(config.model):
        yield f"{type(stage).__name__} starts from a previous stage: add --init_from CHECKPOINT of that stage"
    folder = Path(config.output)
    if not config.ckpt_path and (folder / "checkpoints" / "last.ckpt").is_file():
        yield f"{folder} already holds a run: go on with it by --ckpt_path last, or give another --output"
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        yield f"{there} cannot be written: name an --output where you may write"
    if free < 2 * size:
        yield f"{there} has {free / 1e9:.1f} GB left; a checkpoint beside the last one takes {2 * size / 1e9:.1f} GB"
    if config.trainer.accelerator != "cpu" and torch.cuda.device_count() < num_gpus:
        yield f"this machine has {torch.cuda.device_count()} GPUs, and the run wants {num_gpus} of a machine"
    yield from said(lambda: check_strategy(config.trainer.strategy))
    yield from said(lambda: check_precision(config.trainer.precision, fit=True))


def said(action: Any) -> Iterator[str]:
    """Yield what is wrong, where an action raises a ``UserError``."""
    try:
        action()
    except UserError as error:
        yield str(error)


# What is not there yet


@contextmanager
def unwritten_files() -> Iterator[None]:
    """Take sizes from recipes where checkpoints are missing, and the number of classes where images are."""
    tokens = UNWRITTEN.set(planned_checkpoint), CLASSES_OF_MISSING.set(lambda source: counts_of(source)[1])
    try:
        yield
    finally:
        UNWRITTEN.reset(tokens[0])
        CLASSES_OF_MISSING.reset(tokens[1])


def counts_of(source: Any) -> tuple[int, int, str]:
    """Return the numbers of images and classes of a source, and a word where these could only be assumed."""
    try:
        return length(source), len(getattr(source, "classes", ())), ""
    except UserError:
        writer = writer_of(source.folder) if isinstance(source, Shards) else None
        if writer is None:
            return *IMAGENET, ", as many as ImageNet's: these are not here"
        return counts_of(build(read_configs(writer)["images"], torch.utils.data.Dataset))  # type: ignore[type-var]


def planned_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return, on the meta device, what the shipped recipe would save that would write a checkpoint."""
    name = writer_of(path)
    return None if name is None else saved_by(name)


@cache
def saved_by(name: str) -> dict[str, Any]:
    """Return what a recipe saves."""
    config: Any = OmegaConf.create(read_command(["--config", name])[0])
    recipe: Any = OmegaConf.to_container(config.model, resolve=True)
    with torch.device("meta"):
        stage = build(recipe, Stage)
    arguments = {"_class_path": recipe["class_path"], **recipe["init_args"]}
    return {"state_dict": stage.state_dict(), "hyper_parameters": arguments, STAGE_KEY: type(stage).__name__}


@cache
def outputs() -> dict[Path, str]:
    """Return the folders into which shipped configs write."""
    read = {name: yaml.safe_load(find_config(name, shipped_first=True).read_text()) for name in shipped_configs()}
    return {
        Path(content["output"]): name
        for name, content in read.items()
        if "output" in content and "steps" not in content
    }


def writer_of(path: Path) -> str | None:
    """Return the shipped config that writes a folder, or a checkpoint in one: by its path, or by a name it alone has.

    >>> writer_of(Path("runs/stage3/checkpoints/last.ckpt")), writer_of(Path("elsewhere/encoder/checkpoints/last.ckpt"))
    ('stage3.yaml', 'quickstart/encoder.yaml')
    """
    folder = path.parents[1] if path.parent.name == "checkpoints" else path
    alike = [name for output, name in outputs().items() if output.name == folder.name]
    return outputs().get(folder, alike[0] if len(alike) == 1 else None)
