"""Sampling of token sequences from an autoregressive transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from aligntok.decoding import graph, native
from aligntok.decoding.cached import CachedTransformer
from aligntok.errors import check, check_positive
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.randomness import gumbel_noise, keys_like_ids

Precision = Literal["float32", "bfloat16", "float16"]
GRAPH_DEVICES = ("cuda",)
Step = Callable[[Tensor, int, slice], Tensor]  # ids (R, 1), position and rows, as of ``CachedTransformer``


class TokenSampler:
    """Draw token sequences one token at a time, with keys and values of the earlier tokens kept.

    The logits are guided without a classifier: ``null + scale * (class - null)``, with the power-cosine scale at step i
    of N, ``1 + (guidance_scale - 1) * (1 - cos(pi * (i / N)^guidance_power)) / 2``. While that is 1 the null class
    is not computed: its keys and values of all earlier tokens are made in one pass, just before the guidance begins.

    >>> network = AutoregressiveTransformer(8, (2, 2), 1, num_classes=3, width=16, depth=1, num_heads=2)
    >>> sampler = TokenSampler(guidance_scale=2.0, top_k=4)
    >>> sampler(network, torch.tensor([0, 2]), ids=torch.arange(2), seed=0).shape
    torch.Size([2, 5])

    Args:
        guidance_scale: 1 is no guidance. AliTok uses 16 (B), 6 (L) and 13 (XL).
        guidance_power: 0 guides all steps alike; AliTok uses 1.8, 0.7 and 1.4.
        temperature: Divides the guided logits; 0 takes the most likely token.
        top_k: Draw from the most likely tokens only, this many; None draws from all.
        top_p: Draw from the fewest most likely tokens that have this share of the probability.
        dtype: Of the weights of the linear layers and of keys and values, in a copy.
        compile: Compile the step. On a CUDA GPU: step, guidance and draw as one graph, made in seconds for each number
            of sequences. It stays with the network, with a copy of the weights (read anew at each call) and the keys
            and values, until the network is freed, sampled in another way or trained, or ``release(network)``.
            On a CPU: our own step in C++, a second for each number of sequences, for up to 8 at once (4 with guidance),
            float32 and bfloat16, and sizes that are multiples of 16. Without effect where these do not hold.

    Reference:
        Guidance: Gao et al., MDTv2, arXiv:2303.14389, as AliTok, arXiv:2506.05289, uses it; top-p: Holtzman et al.,
        arXiv:1904.09751.
    """

    def __init__(
        self,
        guidance_scale: float = 1.0,
        guidance_power: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        dtype: Precision = "float32",
        compile: bool = False,
    ) -> None:
        for key, value in {"guidance_scale": guidance_scale, "guidance_power": guidance_power}.items():
            check(0 <= value < math.inf, f"{key}={value}: give a number of at least 0; guidance_scale=1 is no guidance")
        cold = f"temperature={temperature}: give a number of at least 0; 0 takes the most likely token"
        check(0 <= temperature < math.inf, cold)
        check_positive(top_k=top_k)
        check(0 < top_p <= 1, f"top_p={top_p}: give a share above 0 and up to 1; 1 draws from all tokens")
        check(dtype in get_args(Precision), f"dtype={dtype}: give float32, bfloat16 or float16")
        self.guidance_scale, self.guidance_power = guidance_scale, guidance_power
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.dtype, self.compile = dtype, compile

    def __call__(self, network: AutoregressiveTransformer, label: Tensor | None, ids: Tensor, seed: int) -> Tensor:
        """Draw a sequence for each id: a function of (seed, id, label) alone, at any batch size.

        Logits are rounded differently at another batch size: that may tip the choice between equally good tokens.

        Args:
            network: Trained, in any mode; it is not changed.
            label: Classes, (B,) int64; None for an unconditional network.
            ids: (B,) int64.
            seed: Any whole number.

        Returns:
            Tokens (B, N) int64, on the network's device.

        Raises:
            UserError: Guidance without a null class, `top_k` beyond the codebook, a label out of range, or `compile`
                on a CPU without a compiler.
        """
        self.check(network)
        network.check_condition(label)
        if not len(ids):
            return torch.empty(0, network.sequence_length, dtype=torch.int64, device=network.rotary.device)
        with torch.inference_mode(), torch.autocast(network.rotary.device.type, enabled=False):
            tokens = self._sample(network, label, ids, seed)
        return tokens.clone()  # an ordinary tensor

    def check(self, network: AutoregressiveTransformer) -> None:
        """Raise a ``UserError`` where the settings do not fit a network."""
        check(
            self.guidance_scale == 1 or network.null_label is not None,
            f"guidance_scale={self.guidance_scale}: the network has no null class to guide with: set guidance_scale to"
            " 1, or train with null_class=true",
        )
        size = network.codebook_size
        check((self.top_k or 0) <= size, f"top_k={self.top_k}: the network has codebook_size={size} tokens")

    def scales(self, num_steps: int) -> list[float]:
        """Return the guidance scale of each step."""
        ramp = (math.pi * (i / num_steps) ** self.guidance_power for i in range(num_steps))
        return [1 + (self.guidance_scale - 1) * (1 - math.cos(angle)) / 2 for angle in ramp]

    def _sample(self, network: AutoregressiveTransformer, label: Tensor | None, ids: Tensor, seed: int) -> Tensor:
        device, count, length = network.rotary.device, len(ids), network.sequence_length
        scales, dtype = self.scales(length), getattr(torch, self.dtype)
        joins = next((max(i - 1, 0) for i, scale in enumerate(scales) if scale != 1), length)  # step of the null class
        keys = keys_like_ids(ids, seed).to(device)
        starts = network.start_ids(None if label is None else label.to(device), count)
        if joins < length:
            assert network.null_label is not None  # checked
            starts = torch.cat((starts, network.start_ids(torch.full_like(starts, network.null_label), count)))
        if self.compile and device.type in GRAPH_DEVICES:
            key = (device, len(starts), joins, type(self), *vars(self).values())
            make = partial(graph.GraphSampler, network, starts, count, joins, dtype, scales, self.draw)
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return graph.graph_sampler(network, key, make)(network, starts, keys)
        faster = self.compile and device.type == "cpu" and native.fits(network, len(starts), dtype)
        sequence = starts[:, None].repeat(1, length + 1)  # (rows, N + 1): the start, then the tokens
        cached = CachedTransformer(network, len(starts), dtype, pack=not faster)
        step: Step = native.NativeStep(cached) if faster else cached
        for i, scale in enumerate(scales):
            if i == joins > 0:
                cached(sequence[count:, :i], 0, slice(count, None))
            rows = slice(count) if i < joins else slice(len(starts))
            logits = step(sequence[rows, i : i + 1], i, rows)  # (R, codebook_size)
            if scale != 1:
                null = logits[count:]
                logits = null + (logits[:count] - null) * scale
            sequence[:, i + 1].view(-1, count)[:] = self.draw(logits[:count], keys, i)
        return sequence[:count, 1:]

    def draw(self, logits: Tensor, keys: Tensor, step: int | Tensor) -> Tensor:
        """Return tokens (B,) from guided logits (B, codebook_size) float32 and ``keys_like_ids`` (B, 2)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p < 1:
            ordered = logits.sort(descending=True).values
            share = ordered.softmax(dim=-1)
            beyond = share.cumsum(dim=-1) - share >= self.top_p  # enough before it
            least = ordered.masked_fill(beyond, math.inf).amin(dim=-1, keepdim=True)
            logits = logits.masked_fill(logits < least, -math.inf)
        return (logits + gumbel_noise(keys, step, logits.shape[1])).argmax(dim=-1)
