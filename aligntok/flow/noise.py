"""Noise that belongs to the id of a sample."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
    for row, key in zip(noise, ids.tolist(), strict=True):
        stream = np.random.Philox(key=(seed % 2**64) * 2**64 + key % 2**64)
        np.random.Generator(stream).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise).to(ids.device)
