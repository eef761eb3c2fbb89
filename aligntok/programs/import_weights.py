"""``aligntok import alitok FILE``: published weights as a checkpoint of ours, with a config that runs it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from aligntok.files import write_atomically, write_text
from aligntok.networks import Tokenizer
from aligntok.programs.parser import Parser
from aligntok.weights.alitok import from_alitok, recipe_from_alitok
from aligntok.weights.checkpoint import write_exported
from aligntok.weights.official import read_official

DESCRIPTION = """\
Turn the published weights of AliTok (ali-vilab/alitok) into a checkpoint of ours and a config that runs it.

  aligntok import alitok AliTok.pth                 weights/alitok/tokenizer.safetensors and tokenizer.yaml
  aligntok import alitok AliTok_B.bin               weights/alitok/ar_b.safetensors and ar_b.yaml, on that tokenizer

Then `aligntok validate --config weights/alitok/tokenizer.yaml` measures its reconstructions, and
`aligntok sample --config weights/alitok/ar_b.yaml --config sample.yaml` draws."""

WATCHED = {
    "reconstruction_grid": {"class_path": "aligntok.callbacks.ReconstructionGrid"},
    "quality": {"class_path": "aligntok.callbacks.ReconstructionQuality"},
    "codebook": {"class_path": "aligntok.callbacks.CodebookHealth"},
    "rfid": {
        "class_path": "aligntok.callbacks.ReconstructionFID",
        "init_args": {"features": {"class_path": "aligntok.metrics.InceptionFeatures"}},
    },
}
GUIDANCE = {768: ("ar_b", 16.0, 1.8), 1024: ("ar_l", 6.0, 0.7), 1280: ("ar_xl", 13.0, 1.4)}  # width: size, their g, p


def import_command(arguments: list[str]) -> None:
    """Run ``aligntok import`` with the words that follow it.

    Raises:
        UserError: There is no such file, it is none of AliTok's, or it holds pickled code.
    """
    parser = Parser("import", DESCRIPTION)
    parser.add_argument("project", choices=["alitok"], help="whose weights")
    parser.add_argument("file", metavar="FILE", type=Path, help="as published")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("weights/alitok"))
    options = parser.parse_args(arguments)
    official, folder = read_official(options.file), options.output
    module, recipe = from_alitok(official, str(options.file)), recipe_from_alitok(official, str(options.file))
    if isinstance(module, Tokenizer):
        stage, part, (name, config) = "DecoderRefinement", "tokenizer", tokenizer_config(recipe)
    else:
        stage, part, (name, config) = "AutoregressiveGeneration", "network", generator_config(recipe, folder)
    weights, path = folder / f"{name}.safetensors", folder / f"{name}.yaml"
    state = {f"{part}.{key}": value for key, value in module.state_dict().items()}
    write_atomically(weights, partial(write_exported, state=state, stage=stage, parts={part: recipe}))
    write_text(path, yaml.safe_dump({**config, "ckpt_path": str(weights)}, sort_keys=False))
    print(path, flush=True)


def tokenizer_config(recipe: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a name for the files of a tokenizer, and a config that measures it."""
    return "tokenizer", {
        "layers": ["base.yaml", "data/imagenet.yaml"],
        "output": "runs/alitok_tokenizer",
        "model": {"class_path": "aligntok.stages.DecoderRefinement", "init_args": {"tokenizer": recipe}},
        "callbacks": WATCHED,
    }


def generator_config(recipe: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """Return a name for the files of a generator, and a config that draws with the tokenizer in the same folder."""
    size, scale, power = GUIDANCE.get(recipe["init_args"]["width"], ("ar", 1.0, 1.0))
    tokenizer = {"init_args": {"path": str(folder / "tokenizer.safetensors")}}
    sampler = {"init_args": {"guidance_scale": scale, "guidance_power": power}}
    return size, {
        "layers": ["base.yaml", "stage/autoregressive.yaml", "data/imagenet.yaml"],
        "output": f"runs/alitok_{size}",
        "model": {"init_args": {"network": recipe, "tokenizer": tokenizer, "sampler": sampler}},
    }
