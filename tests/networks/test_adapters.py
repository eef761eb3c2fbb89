import pytest
import torch
from torch.distributions import Normal, kl_divergence

from aligntok.networks import GaussianAdapter, LinearAdapter, MLPAdapter


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
@pytest.mark.parametrize("make", [LinearAdapter, GaussianAdapter, lambda width, latent: MLPAdapter(width, latent, 7)])
def test_shapes_and_that_cells_do_not_mix(make, size):
    adapter = make(6, 3)
    assert (adapter.width, adapter.latent_dim) == (6, 3)
    features = torch.randn(2, 6, *size)
    changed = features.clone()
    changed[:, :, 1, 2] += 1
    latent, other = adapter(features), adapter(changed)
    assert latent.shape == (2, 3, *size)
    assert (latent - other).abs().sum((0, 1)).nonzero().tolist() == [[1, 2]]


def gaussian(log_variance):
    torch.manual_seed(0)
    adapter = GaussianAdapter(6, 3)
    torch.nn.init.zeros_(adapter.project_log_variance.weight)
    adapter.project_log_variance.bias.data = torch.tensor(log_variance)
    return adapter


def test_samples_have_the_mean_and_the_spread():
    adapter = gaussian([-2.0, 0.0, 1.0])
    features = torch.randn(1, 6, 1, 1).expand(40_000, 6, 1, 1)
    latent, _ = adapter.sample(features)
    mean = adapter(features[:1]).flatten()
    std = torch.tensor([-2.0, 0.0, 1.0]).mul(0.5).exp()
    torch.testing.assert_close(latent.mean((0, 2, 3)), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(latent.std((0, 2, 3)), std, rtol=0.03, atol=0)


def test_the_divergence_is_torchs_summed_over_the_latent():
    torch.manual_seed(0)
    adapter = GaussianAdapter(6, 3)
    features = torch.randn(4, 6, 2, 5)
    _, divergence = adapter.sample(features)
    posterior = Normal(adapter(features), (0.5 * adapter.project_log_variance(features)).exp())
    wanted = kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence, wanted, rtol=1e-5, atol=1e-5)


def test_a_huge_log_variance_stays_finite():
    latent, divergence = gaussian([1e4, -1e4, 0.0]).sample(torch.randn(2, 6, 2, 2))
    assert latent.isfinite().all()
    assert divergence.isfinite().all()
