import pytest
import torch
from torch.testing import assert_close

from aligntok.errors import UserError
from aligntok.flow import Adaptive, Euler, Guidance


class Network:
    """Velocity = strength * label + x + t in every channel; notes the labels of each call."""

    latent_shape = (5, 2, 2)

    def __init__(self, null_label=10, strength=1.0):
        self.has_null, self.null_label = null_label is not None, null_label
        self.strength, self.calls = strength, []

    def null(self, label):
        return torch.full_like(label, self.null_label)

    def prepare(self, label):
        return label

    def __call__(self, latent, t, label):
        assert len(latent) == len(t) == len(label)
        self.calls.append(label.tolist())
        return (self.strength * label + t).view(-1, 1, 1, 1) + latent


LABEL = torch.tensor([1, 2, 3])
X = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0))


def at(*times):
    return torch.tensor(times if len(times) > 1 else times * 3)


def conditional(t, x=X):
    return (LABEL + t).view(-1, 1, 1, 1) + x


def test_formula_and_one_call_of_two_batches():
    network, t = Network(), at(0.5)
    velocity = Guidance(scale=4.0).velocity(network, LABEL)(X, t)
    guide = (10 + t).view(-1, 1, 1, 1) + X
    assert_close(velocity, guide + 4 * (conditional(t) - guide))
    assert network.calls == [[1, 2, 3, 10, 10, 10]]


@pytest.mark.parametrize(("t", "rows"), [(0.0, 3), (0.29, 3), (0.3, 6), (0.5, 6), (0.79, 6), (0.8, 3), (1.0, 3)])
def test_outside_the_interval_only_the_conditional_is_computed(t, rows):
    network, t = Network(), at(t)
    velocity = Guidance(scale=4.0, start=0.3, end=0.8).velocity(network, LABEL)(X, t)
    assert [len(labels) for labels in network.calls] == [rows]
    assert torch.equal(velocity, conditional(t)) == (rows == 3)


def test_by_default_both_ends_are_guided():
    network = Network()
    velocity = Guidance(scale=4.0).velocity(network, LABEL)
    velocity(X, at(0.0))
    velocity(X, at(1.0))
    assert [len(labels) for labels in network.calls] == [6, 6]


def test_rows_of_a_sampler_run():
    network = Network()
    Euler(10)(Guidance(scale=4.0, start=0.25, end=0.75).velocity(network, LABEL), X)
    assert [len(labels) for labels in network.calls] == [3, 3, 3, 6, 6, 6, 6, 6, 3, 3]


@pytest.mark.parametrize("autoguided", [False, True])
def test_samples_at_their_own_times(autoguided):
    network, guide = Network(), Network(strength=0.5)
    guidance, t = Guidance(scale=4.0, start=0.3, guide=guide if autoguided else None), at(0.2, 0.6, 0.9)
    velocity = guidance.velocity(network, LABEL)(X, t)
    calls = network.calls.copy(), guide.calls.copy()
    for row in range(3):
        alone = guidance.velocity(Network(), LABEL[row : row + 1])
        assert_close(velocity[row : row + 1], alone(X[row : row + 1], t[row : row + 1]))
    assert calls == (([[1, 2, 3]], [[2, 3]]) if autoguided else ([[1, 2, 3, 10, 10]], []))


def test_scale_1_computes_only_the_conditional():
    for network, guide in ((Network(), None), (Network(null_label=None), None), (Network(), Network())):
        assert torch.equal(Guidance(guide=guide).velocity(network, LABEL)(X, at(0.5)), conditional(at(0.5)))
        assert network.calls == [[1, 2, 3]]
        assert guide is None or guide.calls == []


def test_channels_beyond_the_first_keep_the_conditional():
    t = at(0.5)
    velocity = Guidance(scale=10.0, channels=3).velocity(Network(), LABEL)(X, t)
    everywhere = Guidance(scale=10.0).velocity(Network(), LABEL)(X, t)
    assert torch.equal(velocity[:, :3], everywhere[:, :3])
    assert torch.equal(velocity[:, 3:], conditional(t)[:, 3:])
    assert not torch.allclose(velocity[:, :3], conditional(t)[:, :3])


def test_channels_outside_the_interval_take_the_conditional():
    velocity = Guidance(scale=10.0, start=0.11, channels=3).velocity(Network(), LABEL)
    assert torch.equal(velocity(X, at(0.1)), conditional(at(0.1)))
    assert not torch.equal(velocity(X, at(0.11)), conditional(at(0.11)))  # the start itself is guided, in float32 too


def test_autoguidance_guides_with_the_same_label():
    network, guide, t = Network(null_label=None), Network(null_label=None, strength=0.5), at(0.5)
    velocity = Guidance(scale=1.42, guide=guide).velocity(network, LABEL)(X, t)
    worse = (0.5 * LABEL + t).view(-1, 1, 1, 1) + X
    assert_close(velocity, worse + 1.42 * (conditional(t) - worse))
    assert network.calls == guide.calls == [[1, 2, 3]]


def test_guidance_is_computed_in_the_precision_of_the_state():
    """In bfloat16 the difference of two close velocities, times the scale, would be mostly rounding."""

    class Narrow(Network):
        def __call__(self, latent, t, label):
            return super().__call__(latent, t, label).bfloat16()

    network = Narrow()
    velocity = Guidance(scale=7.3).velocity(network, LABEL)(X, at(0.5))
    both = Narrow()(torch.cat([X, X]), at(0.5).repeat(2), torch.cat([LABEL, torch.full((3,), 10)])).float()
    assert velocity.dtype == torch.float32
    assert_close(velocity, both[3:] + 7.3 * (both[:3] - both[3:]))


def test_a_batch_gives_the_samples_of_its_rows():
    for sampler in (Euler(6, 0.3), Adaptive()):
        guidance = Guidance(scale=3.0, start=0.2, end=0.9)
        whole = sampler(guidance.velocity(Network(), LABEL), X)
        alone = [sampler(guidance.velocity(Network(), LABEL[i : i + 1]), X[i : i + 1]) for i in range(3)]
        assert_close(torch.cat(alone), whole, atol=1e-6, rtol=1e-6)


def test_no_null_class_is_an_error():
    with pytest.raises(UserError, match=r"scale=2.0: the network has no null class"):
        Guidance(scale=2.0).velocity(Network(null_label=None), LABEL)


def test_more_channels_than_the_latent_has_is_an_error():
    Guidance(scale=2.0, channels=5).velocity(Network(), LABEL)
    with pytest.raises(UserError, match="channels=6: the latent has 5"):
        Guidance(scale=2.0, channels=6).velocity(Network(), LABEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale=-1.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"start": 0.5, "end": 0.5}, "start=0.5, end=0.5"),
        ({"start": -0.1}, "start=-0.1"),
        ({"end": 1.1}, "end=1.1"),
        ({"channels": 0}, "channels=0"),
    ],
)
def test_bad_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        Guidance(**arguments)
