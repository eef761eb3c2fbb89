"""AliTok's published tokenizers and generators: names are mapped to ours and back, nothing is left out on either side.

arXiv:2506.05289; the weights are those of the paper's first version: tokenizers of the second stage or of the first,
generators of sizes B, L and XL.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligntok.errors import UserError, check
from aligntok.networks.adapters import LinearAdapter
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.positions import class_first_rotary
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.networks.query_encoder import QueryEncoder
from aligntok.networks.token_decoder import TokenDecoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.weights.checkpoint import build, check_fits
from aligntok.weights.official import copy_official_, read_official, to_official

TOKENIZER_NAMES = {  # ours to theirs, see ``official_names``
    "adapter.project.": "encoder.conv_out.",
    "encoder.embed.": "encoder.patch_embed.",
    "encoder.positions": "encoder.positional_embedding",
    "encoder.queries": "encoder.latent_token_positional_embedding",
    "quantizer.codebook": "quantize.embedding.weight",
    "quantizer.usage": "quantize.embed_prob",
    "decoder.proj_in.": "decoder.decoder_embed.",
    "decoder.buffer_tokens": "decoder.class_embedding",
    "decoder.positions": "decoder.latent_token_positional_embedding",
    "decoder.head.proj.": "decoder.ffn.0.",
    "decoder.head.colour.": "decoder.conv_out.",
    "decoder.prefix_head.proj.": "decoder.ffn_aux.0.",
    "decoder.prefix_head.colour.": "decoder.conv_out_aux.",
    ".norm_out.": ".ln_post.",
    ".transformer.norm.": ".ln_pre.",
    ".transformer.blocks.": ".transformer.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj.",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
GENERATOR_NAMES = {
    "embed.": "embeddings.",
    ".norm_attention.": ".norm1.",
    ".norm_mlp.": ".norm2.",
    ".attention.": ".attn.",
    ".mlp.proj_in.": ".mlp.w1. .mlp.w3.",  # one matrix here, gate and value there
    ".mlp.proj_out.": ".mlp.w2.",
    "head.": "output.",
}
PARTS = {"encoder": QueryEncoder, "adapter": LinearAdapter, "quantizer": VectorQuantizer, "decoder": TokenDecoder}
QUERIES, POSITIONS = "latent_tokens", "encoder.latent_token_positional_embedding"  # a sum there, one table here
CODES, USAGE = "quantize.embedding.weight", "quantize.embed_prob"
HEAD, PREFIX_HEAD = "decoder.ffn.0.weight", "decoder.ffn_aux.0.weight"  # 1x1 convolutions there
HEAD_DIM = 64  # of encoder and decoder
GRID, NUM_PREFIX = (16, 16), 17  # of the generators' tokens: the only layout that was published; no weight tells it


def load_alitok(path: str | Path) -> Tokenizer | AutoregressiveTransformer:
    """Load a published tokenizer, of either stage, or the network of a generator, in eval mode.

    Raises:
        UserError: There is no such file, it is neither, or it holds pickled code.
    """
    return from_alitok(read_official(path), str(path))


def from_alitok(state: dict[str, Tensor], what: str = "the state dict") -> Tokenizer | AutoregressiveTransformer:
    """Build the network of an official state dict, of the sizes found in it, in eval mode; ``what`` names the file.

    A tokenizer with the prefix's head is of the first stage: its decoder is causal. Images are square. A generator
    writes 17 + 16 * 16 tokens.

    >>> network = AutoregressiveTransformer(8, GRID, NUM_PREFIX, 2, width=16, depth=1, num_heads=1, hidden=32)
    >>> from_alitok(to_alitok(network)).num_classes
    2

    Raises:
        UserError: A key is missing, unknown or of another shape.
    """
    recipe = recipe_from_alitok(state, what)
    with torch.device("meta"):  # no drawing of weights that will be replaced
        module = build(recipe, Tokenizer) if CODES in state else build(recipe, AutoregressiveTransformer)
    expected = to_alitok(module)
    if USAGE not in state:  # written only where codes were clustered
        expected.pop(USAGE, None)
    check_fits(expected, state, what, "Give AliTok's own file")
    module.to_empty(device="cpu")
    if isinstance(module, AutoregressiveTransformer):
        copy_official_(module, state, GENERATOR_NAMES)
        module.rotary = class_first_rotary(GRID, NUM_PREFIX, module.width // module.num_heads)  # in no file
        return module.eval()
    scale = {"latent_mean": torch.zeros(module.adapter.latent_dim), "latent_std": torch.ones(module.adapter.latent_dim)}
    usage = {USAGE: torch.zeros(len(state[CODES]))}
    copy_official_(module, scale | usage | state | {POSITIONS: state[QUERIES] + state[POSITIONS]}, TOKENIZER_NAMES)
    module.quantizer.reset_counts()
    return module.eval()


def to_alitok(module: Tokenizer | AutoregressiveTransformer) -> dict[str, Tensor]:
    """Return the state dict of a tokenizer or of a generator's network under AliTok's names and in its shapes.

    Raises:
        UserError: The tokenizer is not made of AliTok's parts.
    """
    if isinstance(module, AutoregressiveTransformer):
        return to_official(module.state_dict(), GENERATOR_NAMES)
    for key, kind in PARTS.items():
        part = getattr(module, key)
        check(isinstance(part, kind), f"{key} {type(part).__name__} is not AliTok's, which is {kind.__name__}")
    state = to_official(module.state_dict(), TOKENIZER_NAMES)
    del state["latent_mean"], state["latent_std"]  # 0 and 1 for tokens
    state[QUERIES] = torch.zeros_like(state[POSITIONS])
    return {key: value[:, :, None, None] if key in (HEAD, PREFIX_HEAD) else value for key, value in state.items()}


def recipe_from_alitok(state: dict[str, Tensor], what: str = "the state dict") -> dict[str, Any]:
    """Return class path and arguments of the network of an official state dict, as YAML names them.

    Args:
        state: The official state dict.
        what: The file, for the message.

    Raises:
        UserError: It is neither a tokenizer's nor a generator's.
    """
    try:
        return _tokenizer_recipe(state) if CODES in state else _generator_recipe(state)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{what} has neither the names of AliTok's tokenizer nor of its generators (it lacks {error})"
        ) from error


def _tokenizer_recipe(state: dict[str, Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = state["encoder.patch_embed.weight"].shape
    num_patches, num_queries = len(state["encoder.positional_embedding"]), len(state[QUERIES])
    decoder_width, latent_dim = state["decoder.decoder_embed.weight"].shape
    first_stage = PREFIX_HEAD in state
    depth, decoder_depth = (
        sum(key.startswith(f"{part}.transformer.") and key.endswith(".ln_1.weight") for key in state)
        for part in ("encoder", "decoder")
    )
    sizes = {
        "image_size": math.isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "num_prefix": num_queries - num_patches,
    }
    heads = {"num_buffer": len(state["decoder.class_embedding"]), "causal": first_stage, "prefix_head": first_stage}
    codes = {"codebook_size": len(state[CODES]), "update": "clustering" if first_stage else "gradient"}
    return _recipe(
        Tokenizer,
        encoder=_recipe(QueryEncoder, **sizes, width=width, depth=depth, num_heads=width // HEAD_DIM),
        adapter=_recipe(LinearAdapter, width=width, latent_dim=latent_dim),
        decoder=_recipe(
            TokenDecoder,
            latent_dim=latent_dim,
            **sizes,
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_width // HEAD_DIM,
            **heads,
        ),
        quantizer=_recipe(VectorQuantizer, latent_dim=latent_dim, **codes),
    )


def _generator_recipe(state: dict[str, Tensor]) -> dict[str, Any]:
    num_rows, width = state["embeddings.weight"].shape
    codebook_size = len(state["output.bias"])
    return _recipe(
        AutoregressiveTransformer,
        codebook_size=codebook_size,
        grid=list(GRID),
        num_prefix=NUM_PREFIX,
        num_classes=num_rows - codebook_size - 2,  # one row is unused, one the null class
        width=width,
        depth=sum(key.endswith(".norm1.weight") for key in state),
        num_heads=width // len(state["blocks.0.attn.q_norm.weight"]),
        hidden=len(state["blocks.0.mlp.w1.weight"]),
    )


def _recipe(kind: type[nn.Module], **arguments: Any) -> dict[str, Any]:
    """Return a module as YAML names it, by the path that users import it from."""
    return {"class_path": f"aligntok.networks.{kind.__name__}", "init_args": arguments}
