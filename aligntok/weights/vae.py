"""The VAEs of Stable Diffusion and FLUX.1 as a ``Tokenizer``: baselines for everything that trains on latents.

Two kinds of files hold them: folders of diffusers (``config.json`` and safetensors) and single files with latent
diffusion's names, also Black Forest Labs' ``ae.safetensors`` and whole checkpoints of Stable Diffusion.

Rombach et al., arXiv:2112.10752; Podell et al., SDXL, arXiv:2307.01952; Esser et al., SD3, arXiv:2403.03206.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aligntok.errors import UserError, check, words_of
from aligntok.files import read_json
from aligntok.networks.adapters import GaussianAdapter
from aligntok.networks.conv import ConvDecoder, ConvEncoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.published import on_meta
from aligntok.weights.checkpoint import SUFFIX, load_strictly
from aligntok.weights.official import read_official
from aligntok.weights.vavae import vavae_state

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # of a folder of diffusers
WIDTH, MULTIPLIERS, NUM_BLOCKS, NUM_GROUPS = 128, (1, 2, 4, 4), 2, 32  # of the four published ones
IMAGE_SIZE = 256
PREFIXES = ("first_stage_model.", "vae.")  # in checkpoints that hold more than the VAE


class Published(NamedTuple):
    """Latent channels, and the scale and shift that generators see: ``(latent - shift) * scaling``."""

    latent_dim: int
    scaling: float
    shift: float = 0.0


PUBLISHED = {
    "sd": Published(4, 0.18215),
    "sdxl": Published(4, 0.13025),
    "sd3": Published(16, 1.5305, 0.0609),
    "flux": Published(16, 0.3611, 0.1159),
}
CONTENT = {  # of a config.json, as far as we read it
    "_class_name": "AutoencoderKL",
    "act_fn": ("silu", None),
    "norm_num_groups": (int, None),
    "scaling_factor": (float, None),
    "shift_factor": (float, None),
    "latents_mean": ([float], None),
    "latents_std": ([float], None),
}
LDM_NAMES = {  # pieces of diffusers' names, as regular expressions, and latent diffusion's
    r"\.down_blocks\.": ".down.",
    r"\.up_blocks\.": ".up.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.resnets\.": ".block.",
    r"\.attentions\.": ".attn.",
    r"\.(down|up)samplers\.0\.": r".\1sample.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.conv_norm_out\.": ".norm_out.",
    r"(\.attn\S*)\.group_norm\.": r"\1.norm.",
    r"(\.attn\S*)\.(?:to_q|query)\.": r"\1.q.",
    r"(\.attn\S*)\.(?:to_k|key)\.": r"\1.k.",
    r"(\.attn\S*)\.(?:to_v|value)\.": r"\1.v.",
    r"(\.attn\S*)\.(?:to_out\.0|proj_attn)\.": r"\1.proj_out.",  # the second ones are of diffusers before 0.15
}


def load_vae(
    path: str | Path,
    kind: Literal["sd", "sdxl", "sd3", "flux"] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Tokenizer:
    """Load the VAE of SD 1.x, SDXL, SD3, FLUX.1, or any ``AutoencoderKL`` of these parts, in eval mode.

    Its scale and shift are the statistics of the latents, so that ``encode`` gives what generators on it are trained
    on: ``(mean of the posterior - shift) * scaling``.

    >>> tokenizer = load_vae("FLUX.1-schnell/vae", "flux")  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 256, 256)))  # doctest: +SKIP

    Args:
        path: A folder of diffusers (a pipeline's is ``vae`` in it), or a single file: .safetensors, .ckpt or .pt.
        kind: Which published one it must be. A single file needs it, for it does not say its scale and shift; and the
            sizes are known before the file is there.
        image_size: Height and width of the images in pixels; by default 256.

    Raises:
        UserError: There is no such file, it is of another class, not of this kind, or a weight is missing, unknown or
            of another shape.
    """
    check(kind in (None, *PUBLISHED), f"kind {kind}: give one of {', '.join(PUBLISHED)}, or null for any in a folder")
    published, image_size = None if kind is None else PUBLISHED[kind], image_size or IMAGE_SIZE
    nothing_to_fill = on_meta()
    if published and nothing_to_fill:
        return _build(published.latent_dim, image_size)
    path = Path(path).expanduser()
    config = _read_config(path) if path.is_dir() else {}
    state = vae_state(read_vae(path / WEIGHTS if path.is_dir() else path))
    if published is None:
        check(bool(config), f"{path} does not say its scale: give kind, one of {', '.join(PUBLISHED)}")
        tokenizer = _build_like(state, image_size, config.get("norm_num_groups") or NUM_GROUPS, path)
    else:
        tokenizer = _build(published.latent_dim, image_size)
    if nothing_to_fill:
        return tokenizer
    buffers = {"latent_mean": tokenizer.latent_mean, "latent_std": tokenizer.latent_std}
    load_strictly(tokenizer, state | buffers, str(path))
    default = published or PUBLISHED["sd"]  # diffusers' own, for configs older than these keys
    scaling, shift = config.get("scaling_factor") or default.scaling, config.get("shift_factor") or default.shift
    text = f"{path} has scaling_factor {scaling} and shift_factor {shift}, but kind {kind} has {default[1:]}"
    check(published is None or (scaling, shift) == default[1:], f"{text}: give another kind, or none")
    means, stds = config.get("latents_mean") or [shift], config.get("latents_std") or [1.0]
    count = len(tokenizer.latent_mean)
    fits = len(means) in (1, count) and len(stds) in (1, count)
    check(fits, f"{path / CONFIG} has latents_mean and latents_std of other than {count} channels")
    tokenizer.set_latent_statistics(torch.tensor(means).expand(count), torch.tensor(stds).expand(count) / scaling)
    return tokenizer


def read_vae(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a VAE in a file, under the file's names without the VAE's prefix.

    Raises:
        UserError: There is no such file, it is damaged, or it holds pickled code.
    """
    check(path.is_file(), f"there is no {path}: give a folder with {CONFIG} and {WEIGHTS}, or a single file")
    if path.suffix != SUFFIX:
        return _without_prefix(read_official(path))
    try:
        with safe_open(path, "pt") as file:
            wanted = _without_prefix({key: key for key in file.keys()})  # noqa: SIM118  # no mapping
            return {key: file.get_tensor(name) for key, name in wanted.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or only a part of one ({words_of(error)})") from error


def vae_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a VAE's weights, of diffusers' or of latent diffusion's names, under our names and in our shapes.

    Where there are no quant convolutions, as in SD3 and FLUX.1, ours do nothing.
    """
    last = max((int(key.split(".")[2]) for key in state if key.startswith("decoder.up_blocks.")), default=0)
    result = {}
    for key, value in state.items():
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{last - int(match[1])}.", key)
        for piece, theirs in LDM_NAMES.items():
            name = re.sub(piece, theirs, name)
        matrix = re.search(r"\.attn\S*\.(q|k|v|proj_out)\.weight$", name) and value.ndim == 2
        result[name] = value[:, :, None, None] if matrix else value
    widths = {"quant_conv": "encoder.conv_out.bias", "post_quant_conv": "decoder.conv_in.weight"}
    for name, like in widths.items():
        if like in result and not any(key.startswith(f"{name}.") for key in result):
            width = result[like].shape[0] if name == "quant_conv" else result[like].shape[1]
            result |= {f"{name}.weight": torch.eye(width)[:, :, None, None], f"{name}.bias": torch.zeros(width)}
    return vavae_state(result)


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Return what is under a prefix of the VAE in a checkpoint of more; without one, all."""
    for prefix in PREFIXES:
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            return found
    return state


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a folder of diffusers."""
    path = folder / CONFIG
    remedy = f"the folder of the VAE alone, {folder / 'vae'}" if (folder / "vae").is_dir() else "a folder of diffusers"
    check(path.is_file(), f"{folder} has no {CONFIG}: give {remedy}")
    config: dict[str, Any] = read_json(path, {"_class_name": (str, None)})
    name = config.get("_class_name")
    text = f"{folder} is of class {name}, but load_vae takes an AutoencoderKL (of SD 1.x, SDXL, SD3 or FLUX.1)"
    check(name == CONTENT["_class_name"], text)
    return dict(read_json(path, CONTENT))


def _build(latent_dim: int, image_size: int | tuple[int, int]) -> Tokenizer:
    """Return a tokenizer of the published sizes."""
    encoder = ConvEncoder(latent_dim, WIDTH, MULTIPLIERS, NUM_BLOCKS, image_size, (), NUM_GROUPS)
    decoder = ConvDecoder(latent_dim, WIDTH, MULTIPLIERS, NUM_BLOCKS + 1, (), NUM_GROUPS)
    return Tokenizer(encoder, GaussianAdapter(2 * latent_dim, latent_dim), decoder).eval()


def _build_like(state: dict[str, Tensor], image_size: int | tuple[int, int], num_groups: int, path: Path) -> Tokenizer:
    """Return a tokenizer of the sizes in a state dict of our names."""

    def levels(part: str) -> tuple[int, list[int], int, list[int]]:
        """Return width, multipliers, blocks of a level and levels with attention."""
        found = [i for i in range(len(state)) if f"{part}.{i}.block.0.conv1.bias" in state]
        widths = [len(state[f"{part}.{i}.block.0.conv1.bias"]) for i in found]
        blocks = sum(f"{part}.0.block.{j}.conv1.bias" in state for j in range(len(state)))
        width = widths[0]
        return width, [w // width for w in widths], blocks, [i for i in found if f"{part}.{i}.attn.0.q.bias" in state]

    try:
        latent_dim = state["decoder.conv_in.weight"].shape[1]
        width, multipliers, blocks, attended = levels("encoder.down")
        encoder = ConvEncoder(latent_dim, width, multipliers, blocks, image_size, attended, num_groups)
        width, multipliers, blocks, attended = levels("decoder.up")
        decoder = ConvDecoder(latent_dim, width, multipliers, blocks, attended, num_groups)
        return Tokenizer(encoder, GaussianAdapter(2 * latent_dim, latent_dim), decoder).eval()
    except (LookupError, ValueError) as error:  # UserErrors of sizes too
        raise UserError(f"{path} holds no VAE of an encoder and a decoder ({words_of(error)})") from error
