import math

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.testing import assert_close

from aligntok.errors import UserError
from aligntok.flow import Adaptive, Euler, Guidance, Heun, Sampler, TimeSampling, shift_time

ALL = [Euler(7), Euler(7, shift=0.3), Heun(5, shift=3.0), Adaptive()]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


class Recorder:
    """A velocity that notes the times and dtypes it was asked for."""

    def __init__(self, velocity):
        self.velocity, self.times, self.dtypes = velocity, [], set()

    def __call__(self, x, t):
        self.times.append(t.clone())
        self.dtypes |= {x.dtype, t.dtype}
        return self.velocity(x, t)


def golden_field(golden):
    constant = golden["euler_field_constant"]

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        return 0.5 * (1 + t) * (constant - x) + torch.sin(3 * t)

    return Recorder(velocity)


@pytest.mark.parametrize("points", [2, 6, 50, 250])
@pytest.mark.parametrize(("name", "shift"), [("0", 1.0), ("0.3", 0.3), ("1", 1.0), ("3", 3.0)])
@pytest.mark.parametrize("sampler", [Euler, Heun])
def test_grids_are_those_of_lightningdit(golden, sampler, points, name, shift):
    times = torch.tensor(sampler(points - 1, shift).times)
    assert_close(times, golden[f"grid_n{points}_shift{name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "shift"), [("0", 1.0), ("0.3", 0.3)])
def test_euler_follows_lightningdit(golden, name, shift):
    field, x, sampler = golden_field(golden), golden["euler_init"], Euler(10, shift)
    trajectory = golden[f"euler_n11_shift{name}_trajectory"]
    assert_close(sampler(field, x), trajectory[-1], atol=1e-5, rtol=0)
    assert_close(torch.stack(field.times)[:, 0], golden[f"euler_n11_shift{name}_call_times"], atol=1e-5, rtol=0)
    for now, later, expected in zip(sampler.times, sampler.times[1:], trajectory[1:], strict=False):
        x = sampler.step(lambda x, t: field(x, torch.full((2,), t)), x, now, later)
        assert_close(x, expected, atol=1e-5, rtol=0)


def test_heun_follows_lightningdit(golden):
    field, x, sampler = golden_field(golden), golden["euler_init"], Heun(10, 0.3)
    trajectory = golden["heun2_n11_shift0.3_trajectory"]
    assert_close(sampler(field, x), trajectory[-1], atol=1e-5, rtol=0)
    assert len(field.times) == 20
    for now, later, expected in zip(sampler.times, sampler.times[1:], trajectory[1:], strict=False):
        x = sampler.step(lambda x, t: field(x, torch.full((2,), t)), x, now, later)
        assert_close(x, expected, atol=1e-5, rtol=0)


def test_adaptive_follows_dopri5(golden):
    field = golden_field(golden)
    x = Adaptive(atol=1e-6, rtol=1e-3)(field, golden["euler_init"])
    assert_close(x, golden["dopri5_n5_shift0.3_trajectory"][-1], atol=1e-3, rtol=0)
    assert len(field.times) < 30


@pytest.mark.parametrize("sampler", [Euler(1), Heun(1), *ALL])
def test_the_exact_velocity_leads_to_the_data(sampler):
    noise, latent = randn(3, 2, 4, 2, dtype=torch.float64), randn(3, 2, 4, 2).flip(0).double()
    assert_close(sampler(lambda x, t: latent - noise, noise), latent)


def test_heun_is_exact_where_the_velocity_is_linear_in_time():
    noise = randn(2, 1, 2, 2, dtype=torch.float64)

    def velocity(x, t):
        return (1 + 4 * t).view(-1, 1, 1, 1).expand_as(x)

    for sampler in (Heun(1), Heun(3, shift=0.3)):
        assert_close(sampler(velocity, noise), noise + 3)
    assert_close(Euler(1)(velocity, noise), noise + 1)


def growth(x, t):
    """dx/dt = (1 + t) x, which takes x(0) to x(0) exp(3 / 2)."""
    return (1 + t).view(-1, 1, 1, 1) * x


GROWN = math.exp(1.5)


@pytest.mark.parametrize(("kind", "shift"), [(Euler, 1.0), (Euler, 0.3), (Heun, 1.0), (Heun, 0.3)])
def test_order_of_convergence(kind, shift):
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [abs(kind(num_steps, shift)(growth, noise).item() - GROWN) for num_steps in (80, 160)]
    assert errors[0] / errors[1] == pytest.approx({Euler: 2, Heun: 4}[kind], rel=0.05)


def test_adaptive_keeps_its_tolerance():
    noise, calls = torch.ones(1, 1, 1, 1, dtype=torch.float64), []
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        field = Recorder(growth)
        assert abs(Adaptive(rtol / 1000, rtol)(field, noise).item() - GROWN) < rtol * GROWN
        calls.append(len(field.times))
    assert calls == sorted(calls)
    assert calls[0] < calls[-1] < 100


def test_adaptive_takes_back_a_step_that_was_too_long():
    """A bump at t = 0.5, with nothing before it that would announce it, of integral 1."""
    field = Recorder(lambda x, t: (((t - 0.5) / 0.04).cosh() ** -2 / 0.08).view(-1, 1, 1, 1).expand_as(x))
    result = Adaptive()(field, torch.zeros(1, 1, 1, 1, dtype=torch.float64)).item()
    assert result == pytest.approx(1, abs=2e-3)
    times = torch.cat(field.times)
    assert (times[1:] < times[:-1] - 0.1).any()


def test_adaptive_gives_each_sample_its_own_steps(mixture):
    field = Recorder(mixture)
    Adaptive()(field, randn(16, 2, 3, 2))
    assert any(len(t.unique()) > 1 for t in field.times)
    times = torch.stack(field.times)
    assert times.min() == 0
    assert times.max() == 1


@pytest.mark.parametrize("sampler", ALL, ids=lambda sampler: type(sampler).__name__)
def test_a_sample_does_not_depend_on_its_batch(mixture, sampler):
    noise = randn(64, 2, 3, 2)
    whole = sampler(mixture, noise)
    parts = torch.cat([sampler(mixture, rows) for rows in noise.split(7)])
    assert_close(parts, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sampler", ALL, ids=lambda sampler: type(sampler).__name__)
def test_the_state_stays_float32_under_autocast(sampler):
    layer = torch.nn.Conv2d(2, 2, 1)
    field = Recorder(lambda x, t: layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = sampler(field, randn(2, 2, 4, 4).bfloat16())
        assert layer(result).dtype == torch.bfloat16
    assert field.dtypes == {torch.float32}
    assert result.dtype == torch.float32
    assert not result.requires_grad


@pytest.mark.parametrize("sampler", [Euler(7), Heun(7), Adaptive()], ids=lambda sampler: type(sampler).__name__)
def test_a_bfloat16_velocity_is_added_up_in_float32(sampler):
    result = sampler(lambda x, t: torch.ones_like(x, dtype=torch.bfloat16), torch.zeros(2, 1, 2, 2))
    assert_close(result, torch.ones(2, 1, 2, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, None])
@pytest.mark.parametrize("kind", [Euler, Heun])
def test_a_bad_number_of_steps_is_an_error(kind, num_steps):
    with pytest.raises(UserError, match=r"^num_steps="):
        kind(num_steps)


def test_other_bad_arguments_are_errors():
    with pytest.raises(UserError, match=r"^shift=0"):
        Euler(4, shift=0)
    with pytest.raises(UserError, match=r"^atol=0"):
        Adaptive(atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adaptive_refuses_a_velocity_that_is_not_finite(value):
    with pytest.raises(UserError, match="not finite"):
        Adaptive()(lambda x, t: torch.where(t.view(-1, 1, 1, 1) > 0.5, value, x), randn(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("base", "value", "expected"),
    [
        (Sampler, {"class_path": "aligntok.flow.Euler", "init_args": {"num_steps": 49, "shift": 0.3}}, Euler),
        (Sampler, {"class_path": "aligntok.flow.Heun", "init_args": {"num_steps": 25}}, Heun),
        (Sampler, {"class_path": "aligntok.flow.Adaptive", "init_args": {"rtol": 1e-4}}, Adaptive),
        (Guidance, {"class_path": "aligntok.flow.Guidance", "init_args": {"scale": 2, "channels": 3}}, Guidance),
        (TimeSampling, {"class_path": "aligntok.flow.TimeSampling", "init_args": {"shift": 0.5}}, TimeSampling),
    ],
)
def test_yaml_builds_them(base, value, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=base)
    built = parser.instantiate(parser.parse_object({"part": value})).part
    assert type(built) is expected
    for name, given in value["init_args"].items():
        assert getattr(built, name) == given


def test_times_run_through_the_shift():
    assert Euler(4, 0.3).times == shift_time(torch.linspace(0, 1, 5, dtype=torch.float64), 0.3).tolist()
    assert len(Euler(249).times) == 250
