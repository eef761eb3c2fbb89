import math

import pytest
import torch
from torch.testing import assert_close

from aligntok.errors import UserError
from aligntok.flow import TimeSampling, dimension_shift, sample_path, shift_time, velocity_terms

SHAPE = (4, 32, 16, 16)
EXACT = {"atol": 1e-5, "rtol": 0}


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_path_and_terms_are_those_of_lightningdit(golden):
    point, velocity = sample_path(randn(SHAPE, 52), randn(SHAPE, 51), golden["loss_t"])
    assert_close(point, golden["loss_xt"], **EXACT)
    assert_close(velocity, golden["loss_target"], **EXACT)
    terms = velocity_terms(randn(SHAPE, 53), velocity)
    assert_close(terms["mse"], golden["loss_mse_per_sample"], **EXACT)
    assert_close(terms["cosine"], golden["loss_cos_per_sample"], **EXACT)
    assert_close(terms["mse"].mean() + terms["cosine"].mean(), golden["loss_total"].squeeze(), **EXACT)


def test_the_path_begins_in_the_noise_and_ends_in_the_data():
    noise, latent = randn((2, 3, 2, 2), 1), randn((2, 3, 2, 2), 2)
    point, velocity = sample_path(noise, latent, torch.tensor([0.0, 1.0]))
    assert torch.equal(point, torch.stack([noise[0], latent[1]]))
    assert_close(sample_path(noise, latent, torch.full((2,), 0.5))[0] + velocity / 2, latent)


def test_cosine_is_along_channels():
    velocity = torch.zeros(1, 2, 1, 2)
    velocity[:, 0] = 1
    prediction = torch.zeros(1, 2, 1, 2)
    prediction[0, :, 0, 0] = torch.tensor([7.0, 0.0])  # parallel: 0
    prediction[0, :, 0, 1] = torch.tensor([0.0, 5.0])  # at a right angle: 1
    assert_close(velocity_terms(prediction, velocity)["cosine"], torch.tensor([0.5]))


def test_terms_are_float32_under_autocast():
    prediction, velocity = randn((2, 8, 4, 4), 1).bfloat16(), randn((2, 8, 4, 4), 2)
    expected = velocity_terms(prediction.float(), velocity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = velocity_terms(prediction, velocity)
        narrow = velocity_terms(prediction, velocity.bfloat16())
    for name, term in terms.items():
        assert term.dtype == narrow[name].dtype == torch.float32
        assert torch.equal(term, expected[name])


def test_cosine_has_a_bounded_gradient_where_a_network_starts():
    prediction = torch.zeros(2, 8, 4, 4, requires_grad=True)
    velocity_terms(prediction, randn((2, 8, 4, 4), 1))["cosine"].sum().backward()
    assert 0 < prediction.grad.norm(dim=1).max() * 16 < 10.01


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_shift_is_increasing_and_keeps_the_ends(shift):
    t = torch.linspace(0, 1, 101)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert (shifted[1:-1] < t[1:-1]).all() == (shift < 1)
    assert_close(shift_time(shifted, 1 / shift), t)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_shift_is_an_error(shift):
    with pytest.raises(UserError, match=r"^shift="):
        shift_time(torch.rand(3), shift)
    with pytest.raises(UserError, match=r"^shift="):
        TimeSampling(shift=shift)


def test_dimension_shift_is_that_of_rae_in_reversed_time():
    shape = (768, 16, 16)
    rae = math.sqrt(768 * 16 * 16 / 4096)
    u = torch.linspace(0, 1, 33)  # RAE's time, 1 is noise
    assert_close(1 - shift_time(1 - u, dimension_shift(shape)), rae * u / (1 + (rae - 1) * u))
    assert shift_time(torch.tensor(0.5), dimension_shift(shape)) < 0.2  # a larger latent is trained nearer the noise
    assert dimension_shift((16, 16, 16)) == 1
    assert dimension_shift((8, 16, 16), base=512) == 0.5


def test_logit_normal_times_are_those_of_lightningdit(golden):
    assert_close(TimeSampling()(golden["lognorm_normals"]), golden["lognorm_t"], **EXACT)


def test_quantiles_of_logit_normal_times(golden):
    t = TimeSampling("logit_normal")(randn(200_000, 0))
    quantiles = torch.quantile(t, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    assert_close(quantiles, golden["lognorm_quantiles"], atol=0.005, rtol=0)


def test_uniform_times_are_those_of_lightningdit(golden):
    times = golden["sample_t_uniform_torch_seed7"]
    assert_close(TimeSampling("uniform")(torch.special.ndtri(times)), times, **EXACT)


def test_training_times_are_shifted():
    normal = randn(100, 3)
    plain, shifted = (TimeSampling(shift=shift)(normal) for shift in (1.0, 0.144))
    assert_close(shifted, shift_time(plain, 0.144))
    assert plain.shape == (100,)
    assert (shifted < plain).all()


def test_an_unknown_distribution_is_an_error():
    with pytest.raises(UserError, match=r"'lognormal'.*'logit_normal'"):
        TimeSampling("lognormal")
