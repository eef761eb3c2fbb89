"""Sampling as one CUDA graph: its logic without a compiler and through one on the CPU, itself on a GPU."""

import copy
import gc
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from aligntok.decoding import TokenSampler, graph, release, sampler
from aligntok.decoding.attention import attend
from aligntok.networks import AutoregressiveTransformer
from aligntok.randomness import gumbel_noise, keys_like_ids

LENGTH = 14
OPTIONS = [
    {"guidance_scale": 4.0},
    {"guidance_scale": 4.0, "guidance_power": 0.0},
    {"guidance_scale": 4.0, "guidance_power": 20.0},  # the null class joins later
    {"guidance_scale": 4.0, "top_k": 7, "top_p": 0.9, "temperature": 1.3},
    {"temperature": 0.0},
    {},
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def small(device="cpu", **changes):
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "num_heads": 2, "hidden": 48, **changes}
    network = AutoregressiveTransformer(20, (3, 4), 2, 5, **sizes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().to(device)


def tokens(network, count, compile, **options):
    ids = torch.arange(count)
    return TokenSampler(compile=compile, **options)(network, ids % 5, ids, seed=0)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ("cpu",))


@pytest.fixture
def uncompiled(on_cpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture(autouse=True)
def no_compiled_leftovers():
    torch.compiler.reset()


# The logic, on any machine


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_same_tokens_and_weights_read_anew(options, count, uncompiled):
    """Also with weights that were changed in place, or exchanged for others."""
    network = small()
    first = tokens(network, count, True, **options)
    assert torch.equal(first, tokens(network, count, False, **options))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-1)
            parameter.data = parameter.data.flip(0)
    again = tokens(network, count, True, **options)
    assert torch.equal(again, tokens(network, count, False, **options))
    assert not torch.equal(first, again)


def test_what_is_kept(uncompiled, monkeypatch):
    """One for each network, used by calls with the same settings and number of sequences, until one of both goes."""
    made = []
    init = graph.GraphSampler.__init__
    monkeypatch.setattr(graph.GraphSampler, "__init__", lambda self, *args: (made.append(1), init(self, *args))[1])
    network, other = small(), small()
    for _ in range(2):
        tokens(network, 3, True)
        tokens(other, 3, True)
    assert len(made) == 2
    tokens(network, 2, True)
    tokens(network, 2, True, temperature=0.5)
    tokens(network, 2, True, guidance_scale=2.0)
    assert len(made) == 5
    assert len(graph._kept) >= 2
    release(network)
    assert network not in graph._kept
    before = len(graph._kept)
    del other
    gc.collect()
    assert len(graph._kept) == before - 1


def test_attend_sees_keys_up_to_the_position():
    q, keys, values = torch.randn(2, 3, 1, 8), *torch.randn(2, 2, 3, 9, 8)
    for position in (0, 4, 8):
        seen = keys[:, :, : position + 1], values[:, :, : position + 1]
        expected = F.scaled_dot_product_attention(q, *seen)
        torch.testing.assert_close(attend(q, keys, values, torch.tensor([position])), expected)


def test_noise_of_a_step_on_the_device():
    keys = keys_like_ids(torch.arange(3), 0)
    assert torch.equal(gumbel_noise(keys, torch.tensor([271]), 4096), gumbel_noise(keys, 271, 4096))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "count", "sizes"), [(OPTIONS[2] | OPTIONS[3], 3, 2), (OPTIONS[0], 1, 1)], ids=str)
def test_through_the_compiler_on_a_cpu(options, count, sizes, on_cpu):
    """Block and rest are compiled once for each number of rows, for all blocks, positions and calls."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    network = small()
    for _ in range(2):
        assert torch.equal(tokens(network, count, True, **options), tokens(network, count, False, **options))
    assert counters["stats"]["unique_graphs"] == 2 * sizes


INTERPRETED = """
import torch
from aligntok.decoding import attention_triton
q, keys, values = torch.randn(2, 2, 1, 12), *torch.randn(2, 2, 2, 70, 12)
for tile in attention_triton.TILES.values():
    attention_triton.TILES = {True: tile, False: tile}
    for position in (0, 63, 64, 69):
        seen = attention_triton.attend(q, keys, values, torch.tensor([position]))
        known = keys[:, :, : position + 1], values[:, :, : position + 1]
        torch.testing.assert_close(seen, torch.nn.functional.scaled_dot_product_attention(q, *known))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_kernel_in_tritons_interpreter():
    """With the tiles for few programs and for many."""
    subprocess.run([sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


# On a GPU


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("options", "count"), [(OPTIONS[2], 3), (OPTIONS[3], 1)], ids=str)
def test_the_graph_draws_the_same_tokens(options, count):
    network = small("cuda")
    first = tokens(network, count, True, **options)
    assert torch.equal(first, tokens(network, count, False, **options))
    kept = graph._kept[network][1]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-1)
    assert torch.equal(tokens(network, count, True, **options), tokens(network, count, False, **options))
    assert graph._kept[network][1] is kept


@needs_gpu
@pytest.mark.gpu
def test_tokens_are_those_of_the_cpu():
    network = small()
    expected = tokens(network, 3, False, guidance_scale=4.0)
    assert torch.equal(tokens(copy.deepcopy(network).cuda(), 3, True, guidance_scale=4.0).cpu(), expected)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "num_heads", "head_dim"), [(2, 2, 48), (64, 16, 48), (3, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_attends(rows, num_heads, head_dim, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = rows, num_heads, 273, head_dim
    keys, values = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
    q = torch.randn(rows, num_heads, 1, head_dim, generator=generator, device="cuda").to(dtype)
    for position in (0, 1, 63, 64, 272):
        end = position + 1
        expected = F.scaled_dot_product_attention(q.double(), keys[:, :, :end].double(), values[:, :, :end].double())
        seen = attend(q, keys, values, torch.tensor([position], device="cuda"))
        assert seen.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(seen.double(), expected, atol=bound, rtol=bound)
