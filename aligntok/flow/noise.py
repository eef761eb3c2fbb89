"""Noise that belongs to the id of a sample."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PHILOX_MULTIPLIER, PHILOX_WEYL = 0xD256D193, 0x9E3779B9  # SC 2011, section 3.3
PHILOX_ROUNDS = 7  # the fewest that pass all tests of randomness, SC 2011, table 2
LOW_32_BITS = 2**32 - 1


def noise_like_ids(ids: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Return standard normal noise, each row a function of ``(seed, id)`` alone, drawn on the CPU.

    So sample 4711 is the same image at any batch size, order, number of ranks and device. Each row has its own stream
    of the counter-based generator Philox, whose 128-bit key is ``seed * 2^64 + id``, both modulo 2^64: no two ids share
    a stream. (A torch CPU generator uses 32 bits of its seed; among 50 000 hashed ids two would likely meet.)

    Args:
        ids: (B,) int64.
        shape: Of one sample, (C, h, w).
        seed: Any whole number.

    Returns:
        (B, *shape) float32, on the device of `ids`.

    Reference:
        Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    noise = np.empty((len(ids), *shape), dtype=np.float32)
    for row, stream in zip(noise, _streams(ids, seed), strict=True):
        np.random.Generator(stream).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise).to(ids.device)


def keys_like_ids(ids: Tensor, seed: int) -> Tensor:
    """Return 64 bits for each id, a function of ``(seed, id)`` alone, for ``gumbel_noise``.

    Args:
        ids: (B,) int64.
        seed: Any whole number.

    Returns:
        (B, 2) int64 in 0 .. 2^32 - 1, on the device of `ids`.
    """
    bits = [stream.random_raw() for stream in _streams(ids, seed)]
    pairs = [(word >> 32, word & LOW_32_BITS) for word in bits]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(ids.device)


def gumbel_noise(keys: Tensor, step: int, count: int) -> Tensor:
    """Return Gumbel noise, a function of key, step and index alone, drawn where the keys are.

    The index of the largest ``logits + gumbel_noise`` is a draw from the softmax of the logits, and one that hardly
    depends on how they were rounded: a uniform number on the distribution function's scale is tipped much more often.

    Args:
        keys: From ``keys_like_ids``, (B, 2).
        step: Of the sequence; ``(step + 1) * count`` is at most 2^33.
        count: Numbers.

    Returns:
        (B, count) float32.

    Reference:
        Maddison et al., A* Sampling, arXiv:1411.0030.
    """
    half = (count + 1) // 2  # each counter gives two words
    counters = torch.arange(step * half, (step + 1) * half, device=keys.device)
    words = torch.cat(philox(counters.expand(len(keys), -1), keys[:, :1], keys[:, 1:]), dim=1)[:, :count]
    uniform = ((words >> 9).float() + 0.5) * 2**-23  # 23 bits: exact, and neither 0 nor 1
    return -(-(-uniform).log1p()).log()


def philox(left: Tensor, right: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two words of Philox-2x32-7 for a counter of two words and a key, all int64 in 0 .. 2^32 - 1.

    Reference:
        Salmon et al., SC 2011, section 3.3 and table 2.
    """
    for _ in range(PHILOX_ROUNDS):
        product = left * PHILOX_MULTIPLIER  # 64 bits, whatever their sign
        left, right = (product >> 32 & LOW_32_BITS) ^ key ^ right, product & LOW_32_BITS
        key = key + PHILOX_WEYL & LOW_32_BITS
    return left, right


def _streams(ids: Tensor, seed: int) -> list[np.random.Philox]:
    return [np.random.Philox(key=(seed % 2**64) * 2**64 + key % 2**64) for key in ids.tolist()]
