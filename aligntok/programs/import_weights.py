"""``aligntok import alitok FILE``: published weights as a checkpoint of ours, with a config that runs it."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from aligntok.files import write_atomically, write_text
from aligntok.networks import AutoregressiveTransformer, LinearAdapter, QueryEncoder, TokenDecoder, Tokenizer
from aligntok.networks import VectorQuantizer as Quantizer
from aligntok.programs.parser import Parser
from aligntok.weights.alitok import load_alitok
from aligntok.weights.checkpoint import write_exported

DESCRIPTION = """\
Turn the published weights of AliTok (ali-vilab/alitok) into a checkpoint of ours and a config that runs it.

  aligntok import alitok AliTok.pth                 weights/alitok/tokenizer.safetensors and tokenizer.yaml
  aligntok import alitok AliTok_B.bin               weights/alitok/ar_b.safetensors and ar_b.yaml, on that tokenizer

Then `aligntok validate --config weights/alitok/tokenizer.yaml` measures its reconstructions, and
`aligntok sample --config weights/alitok/ar_b.yaml --config sample.yaml` draws."""

TOKENIZER = "tokenizer"
WATCHED = {
    "reconstruction_grid": {"class_path": "aligntok.callbacks.ReconstructionGrid"},
    "quality": {"class_path": "aligntok.callbacks.ReconstructionQuality"},
    "codebook": {"class_path": "aligntok.callbacks.CodebookHealth"},
    "rfid": {
        "class_path": "aligntok.callbacks.ReconstructionFID",
        "init_args": {"features": {"class_path": "aligntok.metrics.InceptionFeatures"}},
    },
}
GUIDANCE = {
    768: ("ar_b", 16.0, 1.8),
    1024: ("ar_l", 6.0, 0.7),
    1280: ("ar_xl", 13.0, 1.4),
}  # width: size, AliTok's g, p


def import_command(arguments: list[str]) -> None:
    """Run ``aligntok import`` with the words that follow it.

    Raises:
        UserError: There is no such file, it is none of AliTok's, or it holds pickled code.
    """
    parser = Parser(
        prog="aligntok import",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("project", choices=["alitok"], help="whose weights")
    parser.add_argument("file", metavar="FILE", type=Path, help="as published")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("weights/alitok"))
    options = parser.parse_args(arguments)
    module = load_alitok(options.file)
    if isinstance(module, Tokenizer):
        written = import_tokenizer(module, options.output)
    else:
        written = import_generator(module, options.output)
    print(written, flush=True)


def import_tokenizer(tokenizer: Tokenizer, output: Path) -> Path:
    """Write the tokenizer and its config; return the config."""
    recipe = recipe_of_tokenizer(tokenizer)
    config = {
        "layers": ["base.yaml", "data/imagenet.yaml"],
        "output": f"runs/alitok_{TOKENIZER}",
        "model": {"class_path": "aligntok.stages.DecoderRefinement", "init_args": {"tokenizer": recipe}},
        "callbacks": WATCHED,
    }
    return write(output, TOKENIZER, "DecoderRefinement", TOKENIZER, tokenizer, recipe, config)


def import_generator(network: AutoregressiveTransformer, output: Path) -> Path:
    """Write the generator and its config; return the config."""
    size, scale, power = GUIDANCE.get(network.width, ("ar", 1.0, 1.0))
    recipe = recipe_of_network(network)
    tokenizer = {"init_args": {"path": str(output / f"{TOKENIZER}.safetensors")}}
    sampler = {"init_args": {"guidance_scale": scale, "guidance_power": power}}
    config = {
        "layers": ["base.yaml", "stage/autoregressive.yaml", "data/imagenet.yaml"],
        "output": f"runs/alitok_{size}",
        "model": {"init_args": {"network": recipe, "tokenizer": tokenizer, "sampler": sampler}},
    }
    return write(output, size, "AutoregressiveGeneration", "network", network, recipe, config)


def write(
    folder: Path, name: str, stage: str, part: str, module: nn.Module, recipe: dict[str, Any], config: dict[str, Any]
) -> Path:
    """Write weights and config of a stage's part; return the config's path."""
    state: dict[str, Tensor] = {f"{part}.{key}": value for key, value in module.state_dict().items()}
    path = folder / f"{name}.safetensors"
    write_atomically(path, partial(write_exported, state=state, stage=stage, parts={part: recipe}))
    written = folder / f"{name}.yaml"
    write_text(written, yaml.safe_dump({**config, "ckpt_path": str(path)}, sort_keys=False))
    return written


def recipe_of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return class paths and arguments of a tokenizer of AliTok's parts."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    image_size, quantizer = list(encoder.image_size), tokenizer.quantizer
    sizes = {"image_size": image_size, "patch_size": encoder.downsampling, "num_prefix": encoder.num_prefix}
    parts = {
        "encoder": recipe(QueryEncoder, **sizes, **blocks(encoder)),
        "adapter": recipe(LinearAdapter, width=encoder.width, latent_dim=decoder.latent_dim),
        "decoder": recipe(
            TokenDecoder,
            latent_dim=decoder.latent_dim,
            **sizes,
            **blocks(decoder),
            num_buffer=len(decoder.buffer_tokens),
            causal=decoder.causal,
            prefix_head=decoder.prefix_head is not None,
        ),
        "quantizer": recipe(
            Quantizer,
            codebook_size=quantizer.codebook_size,
            latent_dim=quantizer.latent_dim,
            update=quantizer.update,
        ),
    }
    return recipe(Tokenizer, **parts)


def blocks(part: Any) -> dict[str, int]:
    """Return the sizes of a transformer."""
    first = part.transformer.blocks[0].attn
    return {"width": first.qkv.in_features, "depth": len(part.transformer.blocks), "num_heads": first.num_heads}


def recipe_of_network(network: AutoregressiveTransformer) -> dict[str, Any]:
    """Return class path and arguments of a generator's network."""
    block: Any = network.blocks[0]
    return recipe(
        AutoregressiveTransformer,
        codebook_size=network.codebook_size,
        grid=list(network.grid),
        num_prefix=network.num_prefix,
        num_classes=network.num_classes,
        width=network.width,
        depth=len(network.blocks),
        num_heads=network.num_heads,
        hidden=block.mlp.proj_out.in_features,
    )


def recipe(kind: type, **arguments: Any) -> dict[str, Any]:
    """Return a module as YAML names it."""
    return {"class_path": f"{kind.__module__.rsplit('.', 1)[0]}.{kind.__name__}", "init_args": arguments}
