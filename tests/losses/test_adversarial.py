import pytest
import torch
from torch import nn

from aligntok.losses import AdversarialLoss, hinge


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge(real, fake) == 0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2)


def test_health_tells_who_wins():
    loss = AdversarialLoss(nn.Identity())
    logs = loss(torch.tensor([3.0, -1.0]), torch.tensor([-2.0, -4.0]), step=0).logs
    assert {key.removeprefix("gan_"): float(value) for key, value in logs.items()} == {
        "logit_real": 1.0,
        "logit_fake": -3.0,
        "accuracy": 0.75,
        "discriminator": 0.5,
        "generator": 3.0,
    }


def test_the_adaptive_weight_is_bounded():
    layer = nn.Linear(2, 2)
    output = layer(torch.ones(1, 2))
    loss = AdversarialLoss(nn.Identity(), max_adaptive_weight=50.0)
    ones = torch.ones_like(output)
    assert float(loss.adaptive_weight(output, ones, ones * 1e-9, layer.weight)) == 50.0
    ratio = float(loss.adaptive_weight(output, 3 * ones, ones, layer.weight))
    assert ratio == pytest.approx(3.0 * 2 / (2 + 1e-4))  # the norm of each gradient at the 2x2 weight is 2, and 6
    assert (
        float(AdversarialLoss(nn.Identity(), adaptive=False).adaptive_weight(output, 3 * ones, ones, layer.weight))
        == 1.0
    )


def test_idle_touches_every_weight_with_zero(tiny):
    loss = tiny.gan()
    zero = loss.idle()
    assert zero == 0
    zero.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in loss.parameters())
