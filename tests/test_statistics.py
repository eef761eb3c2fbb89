import numpy as np
import pytest
import torch

from aligntok.cache import channel_statistics
from aligntok.errors import UserError


def test_statistics_stream_and_are_those_of_all_values():
    latents = torch.from_numpy(np.random.default_rng(0).normal(1000.0, 0.01, (7, 3, 4, 4)).astype(np.float32))
    values = latents.double().transpose(0, 1).flatten(1)
    for size in (1, 3, 7):  # far from zero, where float32 sums would leave nothing of the deviation
        mean, std = channel_statistics(latents.split(size), 3)
        torch.testing.assert_close(mean, values.mean(1).float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(std, values.std(1).float(), rtol=1e-4, atol=0)


def test_no_latents_are_refused():
    with pytest.raises(UserError, match="no images"):
        channel_statistics([], 3)
