"""Which parts are compiled or recomputed as one, and that they stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aligntok.errors import UserError
from aligntok.networks import (
    AutoregressiveTransformer,
    ConvDecoder,
    ConvEncoder,
    DiT,
    Frozen,
    QueryEncoder,
    TokenDecoder,
    TransformerDecoder,
    VisionEncoder,
    WideHead,
    checkpoint_blocks,
    compile_blocks,
)


class Mine(nn.Linear):
    compiled_as_one = True


def compiled(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part._compiled_call_impl is not None]


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (lambda: DiT((4, 2, 2), 3, 16, 2, 2), ["blocks.0", "blocks.1"]),
        (lambda: DiT((4, 2, 2), 3, 16, 1, 2, wide_head=WideHead(16, 1, 2)), ["blocks.0", "wide_blocks.0"]),
        (lambda: QueryEncoder(16, 8, 8, 1, 2, num_prefix=2), ["transformer.blocks.0"]),
        (
            lambda: VisionEncoder(
                "vit_small_patch16_dinov3", 32, 16, None, model_args={"embed_dim": 32, "depth": 1, "num_heads": 2}
            ),
            ["backbone.blocks.0"],
        ),
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


def label(count=2):
    return torch.arange(count) % 3


NETWORKS = {  # how to build each, and its inputs
    "dit": (lambda: DiT((4, 4, 4), 3, 16, 3, 2), lambda: (torch.randn(2, 4, 4, 4), torch.rand(2), label())),
    "wide": (
        lambda: DiT((4, 4, 4), 3, 16, 2, 2, wide_head=WideHead(16, 2, 2)),
        lambda: (torch.randn(2, 4, 4, 4), torch.rand(2), label()),
    ),
    "ar": (
        lambda: AutoregressiveTransformer(8, (4, 4), 1, 3, 16, 3, 2, hidden=32, dropout=0.3),
        lambda: (torch.randint(8, (2, 16)), label()),
    ),
    "vit": (
        lambda: VisionEncoder("vit_tiny_patch16_224", 16, 4, None, model_args={"patch_size": 4, "depth": 3}),
        lambda: (torch.rand(2, 3, 16, 16),),
    ),
    "query": (
        lambda: QueryEncoder(16, 4, 16, 3, 2, num_prefix=2, causal=True),
        lambda: (torch.rand(2, 3, 16, 16),),
    ),
    "conv encoder": (lambda: ConvEncoder(4, 8, (1, 2), 2, 16, num_groups=4), lambda: (torch.rand(2, 3, 16, 16),)),
    "conv": (lambda: ConvDecoder(4, 8, (1, 2), 2, num_groups=4), lambda: (torch.randn(2, 4, 4, 4),)),
    "token": (lambda: TokenDecoder(4, 16, 4, 16, 3, 2, 2, causal=True), lambda: (torch.randn(2, 4, 1, 18),)),
    "transformer": (lambda: TransformerDecoder(4, 16, 4, 16, 3, 2), lambda: (torch.randn(2, 4, 4, 4),)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputing_changes_no_gradient_and_keeps_less(name):
    build, inputs = NETWORKS[name]
    plain = build().train()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # a fresh DiT gives zero, and so does AR
    network = copy.deepcopy(plain)
    keys = list(network.state_dict())
    assert checkpoint_blocks(network) > 1
    assert list(network.state_dict()) == keys
    batch, results, kept = inputs(), [], []
    for each in (plain, network, copy.deepcopy(network)):
        tensors = {}
        torch.manual_seed(1)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, tensors=tensors: (
                tensors.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
            ),
            lambda x: x,
        ):
            output = each(*batch)
        output.square().sum().backward()
        weights = {p.untyped_storage().data_ptr() for p in each.parameters()}
        kept.append(sum(size for pointer, size in tensors.items() if pointer not in weights))
        results.append((output, {key: p.grad for key, p in each.named_parameters()}))
    for output, gradients in results[1:]:
        assert torch.equal(output, results[0][0])
        for key, gradient in gradients.items():
            assert torch.equal(gradient, results[0][1][key]), key
    assert kept[1] < kept[0] / 2
    with torch.no_grad():
        assert torch.equal(network.eval()(*batch), plain.eval()(*batch))


def test_what_is_frozen_is_not_recomputed():
    network = nn.Sequential(Mine(2, 2).requires_grad_(False), Mine(2, 2), Frozen(Mine(2, 2)))
    assert checkpoint_blocks(network) == 1
    assert [name for name, part in network.named_modules() if "forward" in part.__dict__] == ["1"]


@pytest.mark.slow  # a minute of compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and hides the warning
@pytest.mark.parametrize("name", ["dit", "ar"])
def test_compiled_and_recomputed_blocks(name):
    build, inputs = NETWORKS[name]
    plain = build().eval()  # no dropout: a compiled one draws other numbers
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    network = copy.deepcopy(plain)
    checkpoint_blocks(network)
    compile_blocks(network)
    batch = inputs()
    for each in (plain, network):
        each(*batch).square().sum().backward()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # a minute of compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at its inputs
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
