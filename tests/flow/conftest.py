from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def golden():
    """Numbers of LightningDiT's own code (commit 2725fed): path, loss, times, grids, trajectories."""
    arrays = np.load(Path(__file__).parents[1] / "golden" / "g_transport.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def mixture():
    """The exact velocity of a path to 20 points, stiff near the data; a row's value depends on that row alone."""
    points = torch.randn(20, 2, 3, 2, generator=torch.Generator().manual_seed(0))

    def velocity(x, t):
        t = t.view(-1, 1)
        width = (1 - t).clamp_min(0.02)
        distance = (x.flatten(1)[:, None] - t[:, None] * points.flatten(1).to(x.dtype)).square().sum(2)
        weights = (-distance / (2 * width**2)).softmax(1)
        nearest = (weights[:, :, None] * points.flatten(1).to(x.dtype)).sum(1)
        return ((nearest - x.flatten(1)) / width).view_as(x)

    return velocity
