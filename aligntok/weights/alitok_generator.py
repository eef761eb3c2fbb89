"""AliTok's published generators: their names are mapped to ours and back, nothing is left out on either side.

arXiv:2506.05289; the weights of sizes B, L and XL are those of the paper's first version.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.positions import class_first_rotary
from aligntok.weights.alitok import weights_in
from aligntok.weights.checkpoint import check_fits, read_file

OFFICIAL_NAMES = {  # ours to theirs, applied one after the other
    "embed.": "embeddings.",
    ".norm_attention.": ".norm1.",
    ".norm_mlp.": ".norm2.",
    ".attention.": ".attn.",
    ".mlp.proj_out.": ".mlp.w2.",
    "head.": "output.",
}
FUSED, HALVES = ".mlp.proj_in.", (".mlp.w1.", ".mlp.w3.")  # one matrix here, gate and value there
GRID, NUM_PREFIX = (16, 16), 17  # the only layout that was published; no weight tells it


def load_alitok_generator(path: str | Path) -> AutoregressiveTransformer:
    """Load an AliTok generator, in eval mode.

    Raises:
        UserError: There is no such file, it is no AliTok generator, or it holds pickled code.
    """
    return network_from_alitok(weights_in(read_file(path)), str(path))


def is_alitok_generator(path: str | Path) -> bool:
    """Whether a file is a checkpoint with the names of AliTok's generator.

    Raises:
        UserError: There is no such file, it is no checkpoint, or it holds pickled code.
    """
    return weights_in(read_file(path)).keys() >= {"embeddings.weight", "output.weight"}


def network_from_alitok(state: dict[str, Tensor], what: str = "the state dict") -> AutoregressiveTransformer:
    """Build the network of an official state dict, of the sizes found in it, for 17 + 16 * 16 tokens, in eval mode.

    Args:
        state: The official state dict.
        what: The file, for the message.

    Raises:
        UserError: A key is missing, unknown or of another shape.
    """
    with torch.device("meta"):  # no drawing of weights that will be replaced
        network = _empty_network(state, what)
    check_fits(to_alitok(network), state, what, "Give AliTok's own file of generator weights")
    network.to_empty(device="cpu")
    network.load_state_dict({key: _ours(key, state) for key in network.state_dict()})
    network.rotary = class_first_rotary(GRID, NUM_PREFIX, network.width // network.num_heads)  # in no file
    return network.eval()


def to_alitok(network: AutoregressiveTransformer) -> dict[str, Tensor]:
    """Return a network's state dict under AliTok's names."""
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        names = official_names(key)
        state |= zip(names, value.chunk(len(names)), strict=True)
    return state


def official_names(key: str) -> list[str]:
    """Return AliTok's name of one of our parameters, or the two names of its halves."""
    for ours, theirs in OFFICIAL_NAMES.items():
        key = key.replace(ours, theirs)
    return [key.replace(FUSED, half) for half in HALVES] if FUSED in key else [key]


def _ours(key: str, state: dict[str, Tensor]) -> Tensor:
    """Return one of our parameters from an official state dict."""
    return torch.cat([state[name] for name in official_names(key)])


def _empty_network(state: dict[str, Tensor], what: str) -> AutoregressiveTransformer:
    """Build a network of the sizes found in an official state dict."""
    try:
        num_rows, width = state["embeddings.weight"].shape
        codebook_size, hidden = len(state["output.bias"]), len(state["blocks.0.mlp.w1.weight"])
        num_heads = width // len(state["blocks.0.attn.q_norm.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{what} is no generator of AliTok: it lacks {error}") from error
    depth = sum(key.endswith(".norm1.weight") for key in state)
    num_classes = num_rows - codebook_size - 2  # one row is unused, one the null class
    return AutoregressiveTransformer(
        codebook_size, GRID, NUM_PREFIX, num_classes, width, depth, num_heads, hidden=hidden
    )
