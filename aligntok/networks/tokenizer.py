"""The tokenizer: encoder, adapter and decoder as one network, and the contract that everything else relies on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.networks.encoders import pair


@dataclass(frozen=True)
class TokenizerSpec:
    """What a generator must know of a tokenizer.

    Attributes:
        kind: ``continuous`` (latents) or ``discrete`` (tokens).
        latent_shape: (C, h, w) of one latent.
        image_size: (H, W) of one image in pixels.
        downsampling: Image pixels per latent cell, f.
    """

    kind: Literal["continuous", "discrete"]
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    downsampling: int


class Tokenizer(nn.Module):
    """Image to latent and back: ``decode(encode(image))`` is the reconstruction.

    ``encode`` gives normalised latents, ``(adapter(encoder(image)) - latent_mean) / latent_std``, and ``decode`` takes
    them; mean and std are buffers of the tokenizer, 0 and 1 until they are measured, and nobody else scales.

    Args:
        encoder: Image (B, 3, H, W) in [0, 1] to features (B, width, h, w); has ``width``,
            ``image_size`` and ``downsampling``.
        adapter: Features to raw latent (B, latent_dim, h, w); has ``width`` and ``latent_dim``.
        decoder: Raw latent to image, nominally in [0, 1]; has ``latent_dim``, ``downsampling`` and ``last_layer``.

    Raises:
        UserError: Parts that do not fit each other; both values are named.
    """

    encoder: Any  # any module with the attributes above
    adapter: Any
    decoder: Any
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, encoder: nn.Module, adapter: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.adapter, self.decoder = encoder, adapter, decoder
        for ours, theirs, part, key in (
            (adapter, encoder, "encoder", "width"),
            (adapter, decoder, "decoder", "latent_dim"),
        ):
            if getattr(ours, key) != getattr(theirs, key):
                raise UserError(f"adapter.{key} {getattr(ours, key)} differs from {part}.{key} {getattr(theirs, key)}")
        if encoder.downsampling != decoder.downsampling:
            raise UserError(
                f"encoder.downsampling {encoder.downsampling} differs from decoder.downsampling {decoder.downsampling}:"
                " change the number of decoder levels (2 per level) or the encoder's downsampling"
            )
        latent_dim = int(self.adapter.latent_dim)
        self.register_buffer("latent_mean", torch.zeros(latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_dim, 1, 1))

    @property
    def spec(self) -> TokenizerSpec:
        """What generators, caches and callbacks need to know."""
        size, factor = pair(self.encoder.image_size), int(self.encoder.downsampling)
        shape = (int(self.latent_mean.shape[0]), size[0] // factor, size[1] // factor)
        return TokenizerSpec("continuous", shape, size, factor)

    def encode(self, image: Tensor) -> Tensor:
        """Return the normalised latent (B, C, h, w) of an image (B, 3, H, W) in [0, 1]."""
        return self.normalize(self.adapter(self.encoder(image)))

    def decode(self, latent: Tensor, clamp: bool = True) -> Tensor:
        """Return the image (B, 3, H, W) of a normalised latent (B, C, h, w), in [0, 1] unless ``clamp`` is off."""
        image: Tensor = self.decoder(latent * self.latent_std + self.latent_mean)
        return image.clamp(0, 1) if clamp else image

    def forward(self, image: Tensor) -> Tensor:
        """Return the reconstruction (B, 3, H, W) in [0, 1] of an image (B, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(image))

    def normalize(self, raw_latent: Tensor) -> Tensor:
        """Return the adapter's output in units of the latent's own mean and standard deviation per channel."""
        return (raw_latent - self.latent_mean) / self.latent_std

    @property
    def is_measured(self) -> bool:
        """Whether mean and standard deviation of the latents were measured."""
        return not bool((self.latent_std == 1).all() and (self.latent_mean == 0).all())

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation (C,) of the raw latents.

        Raises:
            UserError: A channel that does not vary, which no generator could use.
        """
        usable = (std > 0) & std.isfinite() & mean.isfinite()
        if not bool(usable.all()):
            dead = (~usable).nonzero().flatten().tolist()
            raise UserError(
                f"latent channels {dead} are constant over the measured images, or not finite: the adapter collapsed"
            )
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))

    def fingerprint(self) -> str:
        """Return a hash of all weights and buffers that shape the latent: equal hash, equal latents."""
        latent_parts = {"encoder": self.encoder, "adapter": self.adapter}
        tensors = {
            f"{part}.{key}": value for part, net in latent_parts.items() for key, value in net.state_dict().items()
        }
        tensors |= {"latent_mean": self.latent_mean, "latent_std": self.latent_std}
        return hash_tensors(tensors, repr(self.spec))


def hash_tensors(tensors: dict[str, Tensor], about: str = "") -> str:
    """Return a hash of tensors with their names, and of what else is said ``about`` them."""
    digest = hashlib.sha256(about.encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
