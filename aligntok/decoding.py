"""Sampling of token sequences from an autoregressive transformer."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.flow.noise import gumbel_noise, keys_like_ids
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.layers import KeyValueCache

Precision = Literal["float32", "bfloat16", "float16"]


class TokenSampler:
    """Draw token sequences one token at a time, with keys and values of the earlier tokens kept.

    The logits are guided without a classifier: ``null + scale * (class - null)``, with the power-cosine scale at step i
    of N, ``1 + (guidance_scale - 1) * (1 - cos(pi * (i / N)^guidance_power)) / 2``. The null class is computed from the
    first step on at which the scale is not 1.

    Args:
        guidance_scale: 1 is no guidance. AliTok uses 16 (B), 6 (L) and 13 (XL).
        guidance_power: 0 guides all steps alike; AliTok uses 1.8, 0.7 and 1.4.
        temperature: Divides the guided logits; 0 takes the most likely token.
        top_k: Draw from the most likely tokens only, this many; None draws from all.
        top_p: Draw from the fewest most likely tokens that have this share of the probability.
        dtype: Of the weights of the linear layers and of keys and values, in a copy.
        compile: Compile the step with ``torch.compile``, with a fixed shape: worth it on a GPU and for many batches.

    Raises:
        UserError: If an argument is out of range.

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
            if not 0 <= value < math.inf:
                raise UserError(f"{key}={value}: give a number of at least 0; guidance_scale=1 is no guidance")
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature={temperature}: give a number of at least 0; 0 takes the most likely token")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k}: give at least 1, or null to draw from all tokens")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: give a share above 0 and up to 1; 1 draws from all tokens")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype={dtype}: give float32, bfloat16 or float16")
        self.guidance_scale, self.guidance_power = guidance_scale, guidance_power
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.dtype, self.compile = dtype, compile

    @torch.no_grad()
    def __call__(self, network: AutoregressiveTransformer, label: Tensor | None, ids: Tensor, seed: int) -> Tensor:
        """Draw a sequence for each id: a function of (seed, id, label) alone, at any batch size.

        At another batch size the logits may be rounded differently, which tips a token now and then where two are
        equally good to the last digits.

        Args:
            network: Trained, in any mode; it is not changed.
            label: Classes, (B,) int64; None for an unconditional network.
            ids: (B,) int64.
            seed: Any whole number.

        Returns:
            Tokens (B, N) int64, on the network's device.

        Raises:
            UserError: Guidance without a null class, `top_k` beyond the codebook, or a label out of range.
        """
        self.check(network)
        network.check_labels(label)
        with torch.autocast(network.rotary.device.type, enabled=False):
            return self._sample(network, label, ids, seed)

    def check(self, network: AutoregressiveTransformer) -> None:
        """Raise a ``UserError`` where the settings do not fit a network."""
        if self.guidance_scale != 1 and network.null_label is None:
            raise UserError(
                f"guidance_scale={self.guidance_scale}: the network has no null class to guide with: set guidance_scale"
                " to 1, or train with null_class=true"
            )
        if self.top_k is not None and self.top_k > network.codebook_size:
            raise UserError(f"top_k={self.top_k}: the network has codebook_size={network.codebook_size} tokens")

    def scales(self, num_steps: int) -> list[float]:
        """Return the guidance scale of each step."""
        ramp = (math.pi * (i / num_steps) ** self.guidance_power for i in range(num_steps))
        return [1 + (self.guidance_scale - 1) * (1 - math.cos(angle)) / 2 for angle in ramp]

    def _sample(self, network: AutoregressiveTransformer, label: Tensor | None, ids: Tensor, seed: int) -> Tensor:
        device, count, length = network.rotary.device, len(ids), network.sequence_length
        scales = self.scales(length)
        guided = next((i for i, scale in enumerate(scales) if scale != 1), length)  # the first step with guidance
        joins = max(guided - 1, 0) if guided < length else length  # the null class needs its own keys one step before
        keys = keys_like_ids(ids, seed).to(device)
        starts = network.start_ids(label, count).to(device)
        if guided < length:
            assert network.null_label is not None  # checked
            starts = torch.cat((starts, network.start_ids(torch.full_like(starts, network.null_label), count)))
        sequence = starts[:, None].repeat(1, length + 1)  # the start, then the tokens; rows: class, then null
        light = light_copy(network, getattr(torch, self.dtype))
        caches = new_caches(network, len(starts), getattr(torch, self.dtype))
        step = torch.compile(light.next_logits, dynamic=False) if self.compile else light.next_logits
        for i, scale in enumerate(scales):
            if i == joins and i > 0:
                light.next_logits(sequence[count:, :i], rows(caches, slice(count, None)), 0)
            if i in (0, joins):
                current = caches if i == joins else rows(caches, slice(count))
            batch = len(current[0].keys)
            start = torch.tensor([i], device=device) if self.compile else i
            logits = step(sequence[:batch, i : i + 1], current, start).float()
            logits, *null = logits.tensor_split([count])
            if scale != 1:
                logits = null[0] + (logits - null[0]) * scale
            sequence.view(-1, count, length + 1)[:, :, i + 1] = self.draw(logits, keys, i)
        return sequence[:count, 1:].clone()

    def draw(self, logits: Tensor, keys: Tensor, step: int) -> Tensor:
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


class FewRows(nn.Module):
    """A linear layer for few rows, whose time is that of reading the weight, in the weight's own dtype.

    On a CPU the weight is the left factor, so that it is read as it lies: with F.linear the library first brings a
    bfloat16 weight into another order, at each call (half the speed).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        x = x.to(self.weight.dtype)
        if x.device.type != "cpu" or (x.dtype == torch.float32 and x.shape[0] <= 4):
            return F.linear(x, self.weight, self.bias)
        y = torch.mm(self.weight, x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def light_copy(network: AutoregressiveTransformer, dtype: torch.dtype) -> AutoregressiveTransformer:
    """Return a copy in eval mode with linear layers of a dtype, which shares all else: the residual stays as it is."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    light = copy.deepcopy(network, shared).eval()
    for module in list(light.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, FewRows(child, dtype))
    return light


def new_caches(network: AutoregressiveTransformer, num_rows: int, dtype: torch.dtype) -> list[KeyValueCache]:
    """Return empty caches for so many sequences, one for each block."""
    heads, head_dim = network.num_heads, network.width // network.num_heads
    shape = (2, num_rows, heads, network.sequence_length, head_dim)
    return [KeyValueCache(*torch.zeros(shape, dtype=dtype, device=network.rotary.device)) for _ in network.blocks]


def rows(caches: list[KeyValueCache], part: slice) -> list[KeyValueCache]:
    """Return views of some sequences."""
    return [KeyValueCache(cache.keys[part], cache.values[part]) for cache in caches]
