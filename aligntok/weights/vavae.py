"""VA-VAE's published tokenizer, as a ``Tokenizer``: the latents of LightningDiT's checkpoints.

Yao et al., Reconstruction vs. Generation, arXiv:2501.01423.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from aligntok.errors import check
from aligntok.files import misfit
from aligntok.networks.adapters import GaussianAdapter
from aligntok.networks.conv import ConvDecoder, ConvEncoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.published import on_meta
from aligntok.weights.checkpoint import load_strictly, read_file
from aligntok.weights.official import read_official

LATENT_DIM, WIDTH, MULTIPLIERS = 32, 128, (1, 1, 2, 2, 4)  # f16d32
TRAINING_PARTS = ("loss", "linear_proj", "foundation_model")  # which the tokenizer does not need


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
    encoder = ConvEncoder(LATENT_DIM, WIDTH, MULTIPLIERS, num_blocks=2, image_size=image_size)
    decoder = ConvDecoder(LATENT_DIM, WIDTH, MULTIPLIERS, num_blocks=3)
    tokenizer = Tokenizer(encoder, GaussianAdapter(2 * LATENT_DIM, LATENT_DIM), decoder)
    if on_meta():
        return tokenizer.eval()  # nothing to fill
    buffers = {"latent_mean": tokenizer.latent_mean, "latent_std": tokenizer.latent_std}
    load_strictly(tokenizer, vavae_state(read_official(path)) | buffers, str(path))
    if statistics is not None:
        moments = read_file(statistics)
        complete = not misfit(moments, {"mean": Tensor, "std": Tensor})
        check(complete, f"{statistics} is no latents_stats.pt: it lacks mean or std")
        tokenizer.set_latent_statistics(moments["mean"].float().flatten(), moments["std"].float().flatten())
    return tokenizer.eval()


def vavae_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return VA-VAE's weights under our names."""
    result = {}
    for key, value in state.items():
        part, _, name = key.partition(".")
        if part == "quant_conv":  # one convolution there, one for the mean and one for the log-variance here
            result[f"adapter.project.{name}"], result[f"adapter.project_log_variance.{name}"] = value.chunk(2)
        elif part == "post_quant_conv":
            result[f"decoder.{key}"] = value
        elif part not in TRAINING_PARTS:
            result[key] = value
    return result
