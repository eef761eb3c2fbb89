"""Random numbers that belong to an image: each is a function of (seed, step or epoch, image id) and nothing else.

So batch size, order, number of ranks and device change nothing, and a resumed run draws what an uninterrupted one
would. They come from Philox, a counter-based generator: a few rounds of multiplication and exclusive or turn a counter
and a key into random words, without any state to carry along.

References:
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014: the mixing of ``choices``.
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002: ``permuted``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of Philox-2x32 and -4x32, by the words of their keys, and what is added to the key after a round; SC 2011, section 3.3
MULTIPLIERS, WEYL = {1: (0xD256D193,), 2: (0xD2511F53, 0xCD9E8D57)}, (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7  # the fewest that pass all tests of randomness, SC 2011, table 2
LOW_32_BITS = 2**32 - 1
FEISTEL_ROUNDS = 6  # four make it a strong pseudorandom permutation: Luby and Rackoff, 1988


def uniform(ids: Tensor, seed: int, step: int, stream: str, shape: Sequence[int] = ()) -> Tensor:
    """Return uniform random numbers, drawn on the device of ``ids``; the host waits for nothing.

    Args:
        ids: Of the images, (B,) int64.
        seed: Of the run, any whole number.
        step: Or epoch, below 2^32.
        stream: What the numbers are for ("noise", "time", ...): other names give independent numbers.
        shape: Of the numbers of one image.

    Returns:
        (B, *shape) float32 in [0, 1).

    Examples:
        >>> t = uniform(torch.tensor([7, 8, 9]), seed=0, step=20, stream="time")
        >>> bool(t[1] == uniform(torch.tensor([8]), seed=0, step=20, stream="time")[0])
        True
    """
    words = _words(ids, seed, step, stream, math.ceil(math.prod(shape) / 4))
    values = torch.cat([(word >> 8).float() for word in words], dim=1) * 2**-24
    return values[:, : math.prod(shape)].reshape(len(ids), *shape)


def normal(ids: Tensor, seed: int, step: int, stream: str, shape: Sequence[int] = ()) -> Tensor:
    """Return standard normal random numbers, (B, *shape) float32; see ``uniform``.

    Reference:
        Box and Muller, A note on the generation of random normal deviates, 1958.
    """
    a, b, c, d = (word.float() for word in _words(ids, seed, step, stream, math.ceil(math.prod(shape) / 4)))
    radius = torch.cat([a, b], dim=1).add_(1).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = torch.cat([c, d], dim=1).mul_(2 * math.pi * 2**-32)
    values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return values[:, : math.prod(shape)].reshape(len(ids), *shape)


def choices(count: int, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a fair choice among 0 .. ``count`` - 1, below 2^31, for each (seed, epoch, id), (B,).

    One is made for each row of a cache that is read: SplitMix64's mixing needs fewer than half of Philox' operations.
    """
    if count == 1:
        return np.zeros_like(ids)
    words = np.zeros(1, np.uint64)
    for values in (np.array([seed]), epochs, ids):
        words = _mixed_64(words ^ values.astype(np.uint64))
    chosen: NDArray[np.int64] = ((words >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
    return chosen


def weighted_choice(weights: Sequence[float], seed: int, epoch: int, id: int, stream: str) -> int:
    """Return a choice among ``weights``, each as likely as its share, for (seed, epoch, id); see ``choices``.

    >>> weighted_choice([0.0, 2.0], seed=0, epoch=0, id=7, stream="caption")
    1
    """
    (number,) = choices(2**30, seed ^ zlib.crc32(stream.encode()) << 16, np.array([epoch]), np.array([id]))
    limits = np.cumsum(weights)
    return int(np.searchsorted(limits, (number + 0.5) * 2**-30 * limits[-1], "right"))


def permuted(places: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return what stands at some places (B,) of a permutation of 0 .. ``count`` - 1, a function of (seed, epoch).

    Nothing is stored: a Feistel network permutes the next power of two, again where the result is not below ``count``.
    """
    bits = max(count - 1, 1).bit_length()
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << bits - bits // 2) - 1), np.uint64((1 << bits // 2) - 1)
    key = np.zeros(1, np.uint64)
    for value in (seed, epoch):
        key = _mixed_64(key ^ np.array([value]).astype(np.uint64))
    keys = [key := _mixed_64(key) for _ in range(FEISTEL_ROUNDS)]
    words, left = places.astype(np.uint64), np.ones(len(places), bool)
    while left.any():
        halves = [words[left] >> low, words[left] & masks[1]]
        for i, round_key in enumerate(keys):
            halves[i % 2] ^= _mixed_64(halves[1 - i % 2] ^ round_key) & masks[i % 2]
        words[left] = halves[0] << low | halves[1]
        left[left] = words[left] >= count
    return words.astype(np.int64)


def hashed(ids: Tensor) -> Tensor:
    """Return a random number in 0 .. 2^63 - 1 for each id, (B,) int64: the smallest k are a uniform choice of k ids."""
    high, low, *_ = philox((0, 0, *_halves(ids)), _key(0, "choice"))
    number: Tensor = high << 31 | low >> 1
    return number


def image_generator(seed: int, epoch: int, id: int) -> np.random.Generator:
    """Return a NumPy generator for the augmentation of one image in one epoch."""
    counter = (epoch % 2**64 << 64) + id % 2**64 << 128  # its own numbers count in the lower 128 bits
    key = (zlib.crc32(b"augmentation") << 64) + seed % 2**64
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


# Sampling from generators


def noise_like_ids(ids: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Return the standard normal noise (B, *shape) float32 that samples are drawn from, on the device of ``ids`` (B,).

    So sample 4711 is the same image at any batch size and on any device: each row is drawn on the CPU from its own
    stream of NumPy's Philox, whose 128-bit key is ``seed * 2^64 + id``, both modulo 2^64.
    """
    noise = np.empty((len(ids), *shape), dtype=np.float32)
    for row, stream in zip(noise, _streams(ids, seed), strict=True):
        np.random.Generator(stream).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise).to(ids.device)


def keys_like_ids(ids: Tensor, seed: int) -> Tensor:
    """Return two random words (B, 2) for each id (B,), a function of ``(seed, id)`` alone, for ``gumbel_noise``."""
    bits = [stream.random_raw() for stream in _streams(ids, seed)]
    pairs = [(word >> 32, word & LOW_32_BITS) for word in bits]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(ids.device)


def gumbel_noise(keys: Tensor, step: int | Tensor, count: int) -> Tensor:
    """Return Gumbel noise (B, count) float32, a function of key, step and index alone, drawn where the keys are.

    The index of the largest ``logits + gumbel_noise`` is a draw from the softmax of the logits, and one that hardly
    depends on how they were rounded: a uniform number compared with the cumulative distribution is tipped more often.

    Args:
        keys: From ``keys_like_ids``, (B, 2).
        step: Position in the sequence, a number or (1,) int64; ``(step + 1) * count`` is at most 2^33.
        count: Numbers of one row.

    Reference:
        Maddison et al., A* Sampling, arXiv:1411.0030.
    """
    half = (count + 1) // 2  # each counter gives two words
    counters = (torch.arange(half, device=keys.device) + step * half).expand(len(keys), -1)
    words = torch.cat(philox((counters, keys[:, :1]), (keys[:, 1:],)), dim=1)[:, :count]
    values = ((words >> 9).float() + 0.5) * 2**-23  # 23 bits: exact, and neither 0 nor 1
    return -(-(-values).log1p()).log()


# The generator itself. Words are int64 in 0 .. 2^32 - 1: torch multiplies no unsigned numbers.


def philox(counter: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    """Return as many random words as the counter has, two or four; the key has half as many.

    Words are tensors, arrays or whole numbers, and are broadcast: the key may be one for all, or one for each row.
    """
    left, right = counter[::2], counter[1::2]
    multipliers = MULTIPLIERS[len(key)]
    for _ in range(ROUNDS):
        products = [word * multipliers[i] for i, word in enumerate(left)][::-1]  # 64 bits, whatever their sign
        left = [_mixed(*words) for words in zip(products, right, key, strict=True)]
        right = products  # of which the lower halves are meant
        key = [word + WEYL[i] & LOW_32_BITS for i, word in enumerate(key)]
    return [word for pair in zip(left, right, strict=True) for word in (pair[0], pair[1] & LOW_32_BITS)]


def _mixed(product: Any, word: Any, key: Any) -> Any:
    """Return the upper half of a product, exclusive or a word, exclusive or a key; tensors in place, for speed."""
    mixed = (product >> 32) ^ word
    mixed ^= key
    mixed &= LOW_32_BITS
    return mixed


def _mixed_64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return words (B,) of which each bit depends on each bit of the given ones, by SplitMix64's constants."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _words(ids: Tensor, seed: int, step: int, stream: str, count: int) -> list[Tensor]:
    """Return four tensors (B, count) of words; the counter is (index, step, id)."""
    index = torch.arange(count, device=ids.device)
    low, high = _halves(ids[:, None])
    return philox((index, step % 2**32, low, high), _key(seed, stream))


def _halves(ids: Any) -> tuple[Any, Any]:
    """Return the lower and upper 32 bits."""
    return ids & LOW_32_BITS, ids >> 32 & LOW_32_BITS


def _key(seed: int, stream: str) -> tuple[int, int]:
    """Return the key of a seed and the name of a stream."""
    return _halves(seed + (zlib.crc32(stream.encode()) << 32))


def _streams(ids: Tensor, seed: int) -> list[np.random.Philox]:
    return [np.random.Philox(key=(seed % 2**64) * 2**64 + id % 2**64) for id in ids.tolist()]
