"""AliTok's published tokenizers: their names are mapped to ours and back, nothing is left out on either side.

arXiv:2506.05289; the weights are those of the paper's first version, of its second stage, or of its first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.networks.adapters import LinearAdapter
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.networks.query_encoder import QueryEncoder
from aligntok.networks.token_decoder import TokenDecoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.weights.checkpoint import check_fits, read_file

OFFICIAL_NAMES = {  # ours to theirs, applied one after the other
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
OURS_ALONE = ("latent_mean", "latent_std")  # 0 and 1 for tokens
QUERIES, POSITIONS = "latent_tokens", "encoder.latent_token_positional_embedding"  # a sum there, one table here
CODES, USAGE = "quantize.embedding.weight", "quantize.embed_prob"
HEAD_DIM = 64  # of encoder and decoder


def load_alitok(path: str | Path) -> Tokenizer:
    """Load an AliTok tokenizer of either stage, in eval mode.

    Raises:
        UserError: There is no such file, it is no AliTok tokenizer, or it holds pickled code.
    """
    return tokenizer_from_alitok(weights_in(read_file(path)), str(path))


def is_alitok(path: str | Path) -> bool:
    """Whether a file is a checkpoint with the names of AliTok's tokenizer.

    Raises:
        UserError: There is no such file, it is no checkpoint, or it holds pickled code.
    """
    return weights_in(read_file(path)).keys() >= {QUERIES, CODES}


def tokenizer_from_alitok(state: dict[str, Tensor], what: str = "the state dict") -> Tokenizer:
    """Build the tokenizer of an official state dict, of the sizes found in it, in eval mode.

    A file with the prefix's head is of the first stage: its decoder is causal. Images are square.

    Args:
        state: The official state dict.
        what: The file, for the message.

    Raises:
        UserError: A key is missing, unknown or of another shape.
    """
    with torch.device("meta"):  # no drawing of weights that will be replaced
        tokenizer = _empty_tokenizer(state, what)
    official = to_alitok(tokenizer)
    if USAGE not in state:  # written only where codes were clustered
        del official[USAGE]
    check_fits(official, state, what, "Give AliTok's own file of tokenizer weights")
    tokenizer.to_empty(device="cpu")
    ours = {
        key: state[official_name(key)].reshape(value.shape)
        for key, value in tokenizer.state_dict().items()
        if official_name(key) in state
    }
    ours["encoder.queries"] = state[QUERIES] + state[POSITIONS]
    ours.setdefault("quantizer.usage", torch.zeros(len(state[CODES])))
    constants = {
        "latent_mean": torch.zeros_like(tokenizer.latent_mean),
        "latent_std": torch.ones_like(tokenizer.latent_std),
    }
    tokenizer.load_state_dict(ours | constants)
    tokenizer.quantizer.reset_counts()
    return tokenizer.eval()


def to_alitok(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return a tokenizer's state dict under AliTok's names and in its shapes.

    Raises:
        UserError: The tokenizer is not made of AliTok's parts.
    """
    parts = {"encoder": QueryEncoder, "adapter": LinearAdapter, "quantizer": VectorQuantizer, "decoder": TokenDecoder}
    for key, kind in parts.items():
        if not isinstance(getattr(tokenizer, key), kind):
            raise UserError(f"{key} {type(getattr(tokenizer, key)).__name__} is not AliTok's, which is {kind.__name__}")
    state = {official_name(key): value for key, value in tokenizer.state_dict().items() if key not in OURS_ALONE}
    state[QUERIES] = torch.zeros_like(state[POSITIONS])
    for head in ("decoder.ffn.0.weight", "decoder.ffn_aux.0.weight"):
        if head in state:
            state[head] = state[head][:, :, None, None]  # a 1x1 convolution there
    return state


def official_name(key: str) -> str:
    """Return AliTok's name of one of our parameters."""
    for ours, theirs in OFFICIAL_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def _empty_tokenizer(state: dict[str, Tensor], what: str) -> Tokenizer:
    """Build a tokenizer of the sizes found in an official state dict."""
    try:
        width, _, patch_size, _ = state["encoder.patch_embed.weight"].shape
        num_patches, num_queries = len(state["encoder.positional_embedding"]), len(state[QUERIES])
        decoder_width, latent_dim = state["decoder.decoder_embed.weight"].shape
        num_buffer, num_codes = len(state["decoder.class_embedding"]), len(state[CODES])
    except (KeyError, ValueError) as error:
        raise UserError(f"{what} is no tokenizer of AliTok: it lacks {error}") from error
    first_stage = "decoder.ffn_aux.0.weight" in state
    image_size, num_prefix = math.isqrt(num_patches) * patch_size, num_queries - num_patches
    encoder = QueryEncoder(image_size, patch_size, width, _depth(state, "encoder"), width // HEAD_DIM, num_prefix)
    decoder = TokenDecoder(
        latent_dim,
        image_size,
        patch_size,
        decoder_width,
        _depth(state, "decoder"),
        decoder_width // HEAD_DIM,
        num_prefix,
        num_buffer,
        causal=first_stage,
        prefix_head=first_stage,
    )
    quantizer = VectorQuantizer(num_codes, latent_dim, update="clustering" if first_stage else "gradient")
    return Tokenizer(encoder, LinearAdapter(width, latent_dim), decoder, quantizer)


def _depth(state: dict[str, Tensor], part: str) -> int:
    """Return the number of blocks of a part."""
    return sum(key.startswith(f"{part}.transformer.") and key.endswith(".ln_1.weight") for key in state)


def weights_in(content: Any) -> dict[str, Tensor]:
    """Return the state dict in a file: ``ema``, ``model``, ``state_dict``, or the file itself; without ``module.``."""
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        return {}
    return {str(key).removeprefix("module."): value for key, value in content.items()}
