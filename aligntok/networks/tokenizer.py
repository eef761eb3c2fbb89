"""The tokenizer: encoder, adapter, quantizer and decoder as one network, and the contract that all else relies on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aligntok.errors import check
from aligntok.files import hash_tensors
from aligntok.networks.encoders import pair
from aligntok.networks.quantizers import VectorQuantizer


@dataclass(frozen=True)
class TokenizerSpec:
    """What a generator must know of a tokenizer.

    >>> spec = TokenizerSpec("discrete", (8, 1, 21), image_size=(64, 64), downsampling=16, codebook_size=512)
    >>> spec.grid, spec.sequence_length, spec.num_prefix
    ((4, 4), 21, 5)

    Attributes:
        kind: ``continuous`` (latents) or ``discrete`` (tokens).
        latent_shape: (C, h, w) of one latent; (C, 1, N) for a sequence of N, so that adapters, quantizers, statistics,
            caches and fingerprints are the same for grids and sequences.
        image_size: (H, W) of one image in pixels.
        downsampling: Image pixels per cell of the grid, f.
        codebook_size: Number of codes of a discrete tokenizer; none for a continuous one.
    """

    kind: Literal["continuous", "discrete"]
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    downsampling: int
    codebook_size: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image."""
        return self.image_size[0] // self.downsampling, self.image_size[1] // self.downsampling

    @property
    def sequence_length(self) -> int:
        """Tokens of an image, N."""
        return self.latent_shape[1] * self.latent_shape[2]

    @property
    def num_prefix(self) -> int:
        """Tokens before those of the grid."""
        return self.sequence_length - self.grid[0] * self.grid[1]


class Tokenizer(nn.Module):
    """Image to latent or tokens and back: ``decode(encode(image))`` is the reconstruction.

    A continuous tokenizer, without quantizer: ``encode`` gives normalised latents,
    ``(adapter(encoder(image)) - latent_mean) / latent_std``, and ``decode`` takes them; mean and std are buffers of the
    tokenizer, 0 and 1 until they are measured, and nobody else scales. A discrete one: ``encode`` gives the tokens
    (B, N) of the codes nearest to the adapter's output, which is not scaled, and ``decode`` takes them.

    >>> from aligntok.networks import LinearAdapter, QueryEncoder, TokenDecoder
    >>> encoder = QueryEncoder(image_size=16, patch_size=8, width=8, depth=1, num_heads=2, num_prefix=1)
    >>> decoder = TokenDecoder(4, image_size=16, patch_size=8, width=8, depth=1, num_heads=2, num_prefix=1)
    >>> Tokenizer(encoder, LinearAdapter(8, 4), decoder, VectorQuantizer(512, 4)).encode(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 5])

    Args:
        encoder: Image (B, 3, H, W) in [0, 1] to features (B, width, h, w), or (B, width, 1, N) of a sequence; has
            ``width``, ``image_size`` and ``downsampling``, and ``grid``, (h, w), where that is not the image's.
        adapter: Features to raw latent (B, latent_dim, h, w); has ``width`` and ``latent_dim``.
        decoder: Raw latent to image, nominally in [0, 1]; has ``latent_dim``, ``downsampling`` and ``last_layer``, and
            ``sequence_length`` where it takes no other number of vectors.
        quantizer: Raw latent to tokens and back; has ``latent_dim`` and ``codebook_size``. None for a continuous one.

    Raises:
        UserError: Parts that do not fit each other; both values are named.
    """

    encoder: Any  # any module with the attributes above
    adapter: Any
    decoder: Any
    quantizer: Any
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self, encoder: nn.Module, adapter: nn.Module, decoder: nn.Module, quantizer: VectorQuantizer | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.adapter, self.decoder, self.quantizer = encoder, adapter, decoder, quantizer
        pairs = [
            ("adapter", "encoder", "width"),
            ("adapter", "decoder", "latent_dim"),
            ("encoder", "decoder", "downsampling"),
            ("adapter", "adapter" if quantizer is None else "quantizer", "latent_dim"),
        ]
        for part, other, key in pairs:
            ours, theirs = getattr(getattr(self, part), key), getattr(getattr(self, other), key)
            check(ours == theirs, f"{part}.{key} {ours} differs from {other}.{key} {theirs}: give both the same")
        self.register_buffer("latent_mean", torch.zeros(int(self.adapter.latent_dim), 1, 1))
        self.register_buffer("latent_std", torch.ones(int(self.adapter.latent_dim), 1, 1))
        given = self.spec.sequence_length
        taken = getattr(decoder, "sequence_length", given)
        remedy = "give both the same image_size and num_prefix"
        check(given == taken, f"the encoder gives {given} vectors, the decoder takes {taken}: {remedy}")

    @property
    def spec(self) -> TokenizerSpec:
        """What generators, caches and callbacks need to know."""
        size, factor = pair(self.encoder.image_size), int(self.encoder.downsampling)
        h, w = getattr(self.encoder, "grid", (size[0] // factor, size[1] // factor))
        shape = (len(self.latent_mean), h, w)
        if self.quantizer is None:
            return TokenizerSpec("continuous", shape, size, factor)
        return TokenizerSpec("discrete", shape, size, factor, int(self.quantizer.codebook_size))

    def encode(self, image: Tensor) -> Tensor:
        """Return what stands for an image (B, 3, H, W) in [0, 1]: normalised latent (B, C, h, w), or tokens (B, N)."""
        latent = self.normalize(self.adapter(self.encoder(image)))
        return latent if self.quantizer is None else self.quantizer.tokens(latent)

    def decode(self, code: Tensor, clamp: bool = True) -> Tensor:
        """Return the image (B, 3, H, W) of what ``encode`` gives, in [0, 1] unless ``clamp`` is off."""
        return self.decode_latent(self.latent(code), clamp)

    def latent(self, code: Tensor) -> Tensor:
        """Return the latent (B, C, h, w) of what ``encode`` gives: itself, or the codes of tokens (B, N)."""
        if self.quantizer is None:
            return code
        codes: Tensor = self.quantizer.lookup(code)
        return codes.view(len(code), *self.spec.latent_shape)

    def decode_latent(self, latent: Tensor, clamp: bool = True) -> Tensor:
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
        """Whether latents are as generators want them: mean and standard deviation measured, or tokens."""
        return self.quantizer is not None or not bool((self.latent_std == 1).all() and (self.latent_mean == 0).all())

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation (C,) of the raw latents.

        Raises:
            UserError: A channel that does not vary, which no generator could use.
        """
        dead = (~((std > 0) & std.isfinite() & mean.isfinite())).nonzero().flatten().tolist()
        what = "constant over the measured images, or not finite: the adapter collapsed"
        check(not dead, f"latent channels {dead} are {what}")
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))

    def fingerprint(self) -> str:
        """Return a hash of all weights and buffers that shape the latent: equal hash, equal latents."""
        shaping = ("encoder.", "adapter.", "latent_mean", "latent_std")
        tensors = {key: value for key, value in self.state_dict().items() if key.startswith(shaping)}
        if self.quantizer is not None:
            tensors["codebook"] = self.quantizer.codebook
        return hash_tensors(tensors, repr(self.spec))
