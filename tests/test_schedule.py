import pytest

from aligntok.errors import UserError
from aligntok.losses import AdversarialLoss, PerceptualTerm, ReconstructionLoss
from aligntok.networks import PatchDiscriminator
from aligntok.schedule import CosineDecay, check_schedule, first_nonzero_step, value_at
from aligntok.stages import Optimization, PerceptualAlignment


def test_a_constant():
    assert [value_at(0.3, step) for step in (0, 1, 10**9)] == [0.3] * 3
    assert value_at(1, 5) == 1.0


def test_a_ramp_is_straight_and_constant_outside():
    ramp = {10: 1.0, 20: 3.0}
    assert [value_at(ramp, step) for step in (0, 10, 11, 15, 20, 1000)] == [1.0, 1.0, 1.2, 2.0, 3.0, 3.0]


def test_points_may_come_in_any_order():
    assert value_at({20: 0.0, 0: 0.0, 10: 1.0}, 15) == 0.5


def test_a_switch():
    switch = {4999: 0.0, 5000: 0.5}
    assert [value_at(switch, step) for step in (0, 4999, 5000, 5001)] == [0.0, 0.0, 0.5, 0.5]


def test_a_single_point_is_a_constant():
    assert [value_at({7: 2.0}, step) for step in (0, 7, 8)] == [2.0] * 3


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (0.0, None),
        (0.5, 0),
        ({0: 0.0, 9: 0.0}, None),
        ({4999: 0.0, 5000: 0.5}, 5000),
        ({0: 0.0, 100: 1.0}, 1),
        ({50: 1.0}, 0),
    ],
)
def test_first_step_that_is_not_zero(schedule, first):
    assert first_nonzero_step(schedule) == first
    steps = [step for step in range(6000) if value_at(schedule, step)]
    assert (steps[0] if steps else None) == first


@pytest.mark.parametrize(
    ("schedule", "message"), [({}, "learning_rate is an empty schedule"), ({-5: 1.0}, "negative step -5")]
)
def test_errors_name_the_key(schedule, message):
    with pytest.raises(UserError, match=message):
        check_schedule("learning_rate", schedule)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("learning_rate", lambda tiny: Optimization({})),
        ("learning_rate", lambda tiny: tiny.gan(learning_rate={})),
        ("weight", lambda tiny: tiny.gan(weight={})),
        ("weight of lpips", lambda tiny: ReconstructionLoss(perceptual={"lpips": PerceptualTerm(tiny.judge(), {})})),
        ("weight of semantic", lambda tiny: tiny.stage(PerceptualAlignment, semantic_weight={})),
    ],
)
def test_the_parts_of_a_stage_check_their_schedules(tiny, name, part):
    with pytest.raises(UserError, match=rf"^{name} is an empty"):
        part(tiny)


@pytest.mark.parametrize(("weight", "start"), [(0.5, 0), ({4999: 0.0, 5000: 0.5}, 4000), ({500: 0.0, 501: 0.5}, 0)])
def test_the_discriminator_warms_up_a_thousand_steps_before_its_term(weight, start):
    loss = AdversarialLoss(PatchDiscriminator(8, 1), weight)
    assert loss.discriminator_start == start
    assert loss.active(start)
    assert not start or not loss.active(start - 1)


def test_cosine_after_a_warm_up():
    rate = CosineDecay(4e-4, 1e-5, 100, 500)
    assert [value_at(rate, step) for step in (0, 25, 100)] == pytest.approx([0.0, 1e-4, 4e-4])
    assert value_at(rate, 200) == pytest.approx(1e-5 + 3.9e-4 * (1 + 2**-0.5) / 2)
    assert [value_at(rate, step) for step in (300, 500, 10**6)] == pytest.approx([2.05e-4, 1e-5, 1e-5])
    assert check_schedule("learning_rate", rate) is rate
    assert value_at(CosineDecay(1.0, 0.0, 0, 10), 0) == 1.0
    for schedule in (rate, CosineDecay(1.0, 0.0, 0, 10)):
        assert first_nonzero_step(schedule) == next(step for step in range(9) if value_at(schedule, step))
    with pytest.raises(UserError, match="warmup_steps 500, num_steps 500"):
        CosineDecay(1.0, 0.0, 500, 500)
