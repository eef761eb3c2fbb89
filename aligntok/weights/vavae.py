"""VA-VAE's published tokenizer, as a ``Tokenizer``: the latents of LightningDiT's checkpoints.

Yao et al., Reconstruction vs. Generation, arXiv:2501.01423.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.networks.adapters import GaussianAdapter
from aligntok.networks.conv import ConvDecoder, ConvEncoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.weights.checkpoint import load_strictly, read_file

LATENT_DIM, WIDTH, MULTIPLIERS = 32, 128, (1, 1, 2, 2, 4)  # f16d32
IN_TRAINING = ("loss.", "linear_proj.", "foundation_model.")  # parts that the tokenizer does not need


def load_vavae(path: str | Path, statistics: str | Path | None = None, image_size: int = 256) -> Tokenizer:
    """Load VA-VAE f16d32.

    Its encoder gives mean and log-variance; ``encode`` returns the mean, normalised, where LightningDiT's cache holds
    one random sample of the posterior.

    Args:
        path: The checkpoint, a state dict or a Lightning checkpoint.
        statistics: LightningDiT's ``latents_stats.pt``, ``mean`` and ``std`` of the latents; without it latents are not
            normalised, and do not fit a generator.
        image_size: Height and width of the images in pixels.

    Raises:
        UserError: A file is missing, holds pickled code, or something else than VA-VAE f16d32.
    """
    content = read_file(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    encoder = ConvEncoder(LATENT_DIM, WIDTH, MULTIPLIERS, num_blocks=2, image_size=image_size)
    decoder = ConvDecoder(LATENT_DIM, WIDTH, MULTIPLIERS, num_blocks=3)
    tokenizer = Tokenizer(encoder, GaussianAdapter(2 * LATENT_DIM, LATENT_DIM), decoder)
    buffers = {"latent_mean": tokenizer.latent_mean, "latent_std": tokenizer.latent_std}
    load_strictly(tokenizer, vavae_state(state) | buffers, str(path))
    if statistics is not None:
        moments = read_file(statistics)
        if not isinstance(moments, dict) or not {"mean", "std"} <= moments.keys():
            raise UserError(f"{statistics} is no latents_stats.pt: it lacks mean or std")
        tokenizer.set_latent_statistics(moments["mean"].float().flatten(), moments["std"].float().flatten())
    return tokenizer.eval()


def vavae_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return VA-VAE's weights under our names."""
    result = {}
    for key, value in state.items():
        if key.startswith(IN_TRAINING):
            continue
        if key.startswith("quant_conv."):  # one convolution there, one for the mean and one for the log-variance here
            name = key.removeprefix("quant_conv.")
            result[f"adapter.project.{name}"], result[f"adapter.project_log_variance.{name}"] = torch.chunk(value, 2)
        elif key.startswith("post_quant_conv."):
            result[f"decoder.{key}"] = value
        else:
            result[key] = value
    return result
