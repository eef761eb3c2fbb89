"""Checkpoints of LightningDiT: its names are mapped to ours and back, nothing is left out on either side.

Yao et al., arXiv:2501.01423. Its training writes a file with ``model``, ``ema``, ``opt`` and ``config``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from aligntok.errors import check
from aligntok.networks.dit import DiT
from aligntok.weights.checkpoint import check_fits
from aligntok.weights.official import copy_official_, read_official, to_official

OFFICIAL_NAMES = {  # ours to theirs, see ``official_names``
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

    >>> import tempfile, torch
    >>> network, path = DiT((4, 2, 2), 10, width=8, depth=1, num_heads=1), tempfile.mkdtemp() + "/dit.pt"
    >>> torch.save({"ema": to_lightningdit(network)}, path)
    >>> load_lightningdit(path, network)

    Raises:
        UserError: There is no such file, it is no checkpoint of LightningDiT or holds pickled code, or it does not fit.
    """
    from_lightningdit(read_official(path), network, str(path))


def is_lightningdit(path: str | Path) -> bool:
    """Whether a file, which must be a checkpoint, has LightningDiT's names."""
    return PATCHES in read_official(path)


def num_classes_of(path: str | Path) -> int:
    """Return the number of classes of a LightningDiT checkpoint, beside its null class."""
    return len(read_official(path)["y_embedder.embedding_table.weight"]) - 1


def from_lightningdit(state: dict[str, Tensor], network: DiT, what: str = "the state dict") -> None:
    """Copy an official state dict, its constant tables included, into a network of the same sizes.

    Raises:
        UserError: A key is missing, unknown or of another shape, or the constant tables are not ours.
    """
    official = to_lightningdit(network)
    remedy = "Give network the file's latent_shape, num_classes, width, depth, num_heads, patch_size and qk_norm"
    check_fits(official, state, what, remedy)
    for key in TABLES:
        worst = (state[key].to(official[key]) - official[key]).abs().max().item()
        check(
            worst < TABLE_TOLERANCE, f"{what} has another {key} than this network (off by up to {worst:.2g}). {remedy}"
        )
    copy_official_(network, state, OFFICIAL_NAMES)


def to_lightningdit(network: DiT) -> dict[str, Tensor]:
    """Return a network's state dict, with its constant tables, under LightningDiT's names and in its shapes.

    Raises:
        UserError: The network has a wide head, which LightningDiT has not.
    """
    check(network.wide_head is None, "a network with wide_head cannot be one of LightningDiT's: set wide_head null")
    state = to_official(network.state_dict(), OFFICIAL_NAMES)
    state[PATCHES] = state[PATCHES].reshape(-1, network.latent_shape[0], network.patch_size, network.patch_size)
    cos, sin = network.rotary.repeat_interleave(2, dim=1).unbind(-1)  # theirs has one entry per channel of a pair
    return {**state, **dict(zip(TABLES, (network.positions[None], cos, sin), strict=True))}
