"""A network that is held still."""

from copy import deepcopy

import torch
from torch import nn

from aligntok.networks import Frozen


class Owner(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.mine = nn.Linear(3, 3)
        self.judge = Frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)))


def test_eval_mode_and_no_gradient_whatever_the_owner_does():
    owner = Owner().train()
    assert owner.training
    assert not any(module.training for module in owner.judge.modules())
    owner.judge.requires_grad_(True)
    assert not any(p.requires_grad for p in owner.judge.parameters())
    x = torch.randn(4, 3, requires_grad=True)
    before = deepcopy(nn.Module.state_dict(owner.judge))
    owner.judge(owner.mine(x)).sum().backward()
    assert x.grad is not None  # the gradient passes through
    assert owner.mine.weight.grad is not None
    assert all(torch.equal(value, before[key]) for key, value in nn.Module.state_dict(owner.judge).items())


def test_absent_from_the_state_and_no_obstacle_to_a_strict_load():
    first, second = Owner(0), Owner(1)
    state = first.state_dict()
    assert state.keys() == {"mine.weight", "mine.bias"}
    kept = second.judge.network[0].weight.clone()
    second.load_state_dict(state, strict=True)
    assert torch.equal(second.mine.weight, first.mine.weight)
    assert torch.equal(second.judge.network[0].weight, kept)
    assert state.keys() == {"mine.weight", "mine.bias"}  # the load does not write into what it reads
    assert first.judge.state_dict() == {}


def test_a_strict_load_still_finds_what_is_missing():
    state = Owner().state_dict()
    del state["mine.bias"]
    missing = Owner().load_state_dict(state, strict=False).missing_keys
    assert missing == ["mine.bias"]


def test_copies_share_it():
    owner = Owner()
    copy = deepcopy(owner)
    assert copy.judge is owner.judge
    assert copy.mine is not owner.mine


def test_it_moves_with_its_owner():
    owner = Owner().double()
    assert owner.judge.network[0].weight.dtype == torch.float64


def test_one_that_is_built_later_is_no_part_of_its_owner():
    built = []

    def build():
        built.append(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
        return built[-1]

    owner = nn.Module()
    owner.judge = Frozen(build)
    assert not built
    x = torch.randn(2, 3, requires_grad=True)
    owner.judge(x).sum().backward()
    assert x.grad is not None
    owner.judge.load()
    owner.train()
    assert len(built) == 1
    assert owner.judge.on(torch.device("cpu")) is owner.judge.network is built[0]
    assert not any(module.training for module in built[0].modules())
    assert not any(p.requires_grad for p in built[0].parameters())
    assert not list(owner.parameters())
    assert owner.state_dict() == {}
    assert deepcopy(owner).judge is owner.judge
    assert owner.judge.on(torch.device("meta"))[0].weight.is_meta
