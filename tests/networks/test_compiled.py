"""Which parts ``compile_blocks`` compiles, and that they stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, DiT, Frozen, QueryEncoder, VisionEncoder, compile_blocks


class Mine(nn.Linear):
    compiled_as_one = True


def compiled(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part._compiled_call_impl is not None]


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (lambda: DiT((4, 2, 2), 3, 16, 2, 2), ["blocks.0", "blocks.1"]),
        (lambda: QueryEncoder(16, 8, 8, 1, 2, num_prefix=2), ["transformer.blocks.0"]),
        (lambda: VisionEncoder("test_vit", 160, 16, weights=None), [f"backbone.blocks.{i}" for i in range(6)]),
        (
            lambda: ConvDecoder(4, 8, (1, 2), 1, num_groups=4),
            ["mid.block_1", "mid.block_2", "up.0", "up.1", "norm_out"],
        ),
        (lambda: nn.Sequential(nn.Sequential(Mine(2, 2)), nn.Linear(2, 2)), ["0.0"]),
    ],
)
def test_blocks(build, blocks):
    network = build()
    keys = list(network.state_dict())
    assert compile_blocks(network) == len(blocks)
    assert compiled(network) == blocks
    assert list(network.state_dict()) == keys
    assert compiled(copy.deepcopy(network)) == []  # a copy computes with its own weights


def test_a_judge_that_is_built_late():
    judge = Frozen(lambda: nn.Sequential(Mine(2, 2)))
    assert compile_blocks(nn.ModuleList([judge])) == 0  # nothing is fetched for it
    judge.load()
    assert compile_blocks(nn.ModuleList([judge])) == 1
    assert compiled(judge.network) == ["0"]


@pytest.mark.parametrize("variables", [{"CC": "/nowhere/cc -O2"}, {"CC": "", "PATH": ""}])
def test_no_compiler_is_a_line(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="needs a C compiler: install gcc"):
        compile_blocks(nn.Linear(2, 2))


@pytest.mark.slow  # a minute of compiling
def test_a_compiled_decoder_gives_the_same_image_and_gradients():
    torch.manual_seed(0)
    decoder = ConvDecoder(4, 8, (1, 2), 1, num_groups=4)
    latent, results = torch.randn(2, 4, 3, 5), []
    for network in (decoder, copy.deepcopy(decoder)):
        compile_blocks(network) if results else None
        image = network(latent)
        image.square().sum().backward()
        results.append([image, *(p.grad for p in network.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
