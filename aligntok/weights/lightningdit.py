"""Checkpoints of LightningDiT: its names are mapped to ours and back, nothing is left out on either side.

Yao et al., arXiv:2501.01423. Its training writes a file with ``model``, ``ema``, ``opt`` and ``config``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from aligntok.errors import UserError
from aligntok.networks.dit import DiT
from aligntok.weights.checkpoint import check_fits, read_file

OFFICIAL_NAMES = {  # ours to theirs, applied one after the other
    "embed_latent.": "x_embedder.proj.",
    "embed_time.proj_in.": "t_embedder.mlp.0.",
    "embed_time.proj_out.": "t_embedder.mlp.2.",
    "embed_label.": "y_embedder.embedding_table.",
    ".norm_attention.": ".norm1.",
    ".norm_mlp.": ".norm2.",
    ".attention.": ".attn.",
    ".mlp.proj_in.": ".mlp.w12.",
    ".mlp.proj_out.": ".mlp.w3.",
    ".modulation.": ".adaLN_modulation.1.",
    "head.norm.": "final_layer.norm_final.",
    "head.proj.": "final_layer.linear.",
    "head.": "final_layer.",
}
PATCHES = "x_embedder.proj.weight"  # a convolution there
TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # constants, in the file too
TABLE_TOLERANCE = 1e-4  # their tables are computed in float32, ours in float64


def load_lightningdit(path: str | Path, network: DiT) -> None:
    """Load a LightningDiT checkpoint into a network of the same sizes: the EMA weights, where the file has them.

    Of LightningDiT's options ours are the released ones, SwiGLU, RoPE, RMSNorm and shift, with or without qk-norm.

    Raises:
        UserError: There is no such file, it is no checkpoint of LightningDiT or holds pickled code, or it does not fit.
    """
    network.load_state_dict(lightningdit_state(_weights(read_file(path)), network, str(path)))


def is_lightningdit(path: str | Path) -> bool:
    """Whether a file is a checkpoint with LightningDiT's names.

    Raises:
        UserError: There is no such file, it is no checkpoint, or it holds pickled code.
    """
    return PATCHES in _weights(read_file(path))


def lightningdit_state(state: dict[str, Tensor], network: DiT, what: str = "the state dict") -> dict[str, Tensor]:
    """Return LightningDiT's weights under our names.

    Args:
        state: The official state dict, its constant tables included.
        network: The network they are for.
        what: The file, for the message.

    Raises:
        UserError: A key is missing, unknown or of another shape, or the constant tables are not ours.
    """
    official = to_lightningdit(network)
    remedy = "Give network the file's latent_shape, num_classes, width, depth, num_heads, patch_size and qk_norm"
    check_fits(official, state, what, remedy)
    for key in TABLES:
        worst = (state[key].to(official[key]) - official[key]).abs().max().item()
        if not worst < TABLE_TOLERANCE:
            raise UserError(f"{what} has another {key} than this network (they differ by up to {worst:.2g}). {remedy}")
    return {key: state[official_name(key)].reshape(value.shape) for key, value in network.state_dict().items()}


def to_lightningdit(network: DiT) -> dict[str, Tensor]:
    """Return a network's state dict, with its constant tables, under LightningDiT's names and in its shapes.

    Raises:
        UserError: The network has a wide head, which LightningDiT has not.
    """
    if network.wide_head is not None:
        raise UserError("a network with wide_head cannot be one of LightningDiT's: set wide_head null")
    state = {official_name(key): value for key, value in network.state_dict().items()}
    patch = (network.latent_shape[0], network.patch_size, network.patch_size)
    state[PATCHES] = state[PATCHES].unflatten(1, patch)
    cos, sin = network.rotary.repeat_interleave(2, dim=1).unbind(-1)  # theirs has one entry per channel of a pair
    return {**state, **dict(zip(TABLES, (network.positions[None], cos, sin), strict=True))}


def official_name(key: str) -> str:
    """Return LightningDiT's name of one of our parameters."""
    for ours, theirs in OFFICIAL_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def _weights(content: Any) -> dict[str, Tensor]:
    """Return the state dict in a file: ``ema``, ``model``, or the file itself; without DDP's ``module.``."""
    for key in ("ema", "model"):
        if isinstance(content, dict) and key in content:
            content = content[key]
            break
    if not isinstance(content, dict):
        return {}
    return {str(key).removeprefix("module."): value for key, value in content.items()}
