"""Sampling; that greedy tokens are the official ones is in tests/weights/test_alitok_generator.py."""

import math
import shutil

import pytest
import torch

from aligntok.decoding import TokenSampler, native
from aligntok.decoding.cached import CachedTransformer
from aligntok.decoding.native import NativeStep
from aligntok.errors import UserError
from aligntok.networks import AutoregressiveTransformer
from aligntok.randomness import gumbel_noise, keys_like_ids

pytestmark = pytest.mark.kernels

SMALL = {"codebook_size": 20, "grid": (3, 4), "num_prefix": 2, "num_classes": 5}
SMALL |= {"width": 32, "depth": 2, "num_heads": 2, "hidden": 48}
LENGTH = 14
VARIANTS = [{}, {"num_prefix": 0, "grid": (2, 2)}, {"num_classes": None}, {"null_class": False, "num_heads": 1}]
DTYPES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
NATIVE = ["float32", "bfloat16"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def small(seed=0, std=0.3, **changes):
    torch.manual_seed(seed)
    network = AutoregressiveTransformer(**{**SMALL, **changes})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return network.eval()


def labels(ids):
    return ids % 5


def same(one, other, bound, norm=torch.linalg.vector_norm):
    return norm(one - other) < bound * norm(other)


# Cached and uncached


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 6])
@torch.no_grad()
def test_cached_logits_are_those_of_the_network(changes, dtype, rows):
    """One token at a time; 2 and 6 rows are computed by other kernels."""
    network = small(**changes)
    tokens = torch.randint(0, 20, (rows, network.sequence_length))
    label = None if network.num_classes is None else labels(torch.arange(rows))
    expected = network(tokens, label)
    ids = torch.cat((network.start_ids(label, rows)[:, None], tokens), dim=1)
    cached = CachedTransformer(network, rows, getattr(torch, dtype))
    for i in range(network.sequence_length):
        logits = cached(ids[:, i : i + 1], i)
        assert logits.dtype == torch.float32
        assert same(logits, expected[:, i], DTYPES[dtype])


@torch.no_grad()
def test_one_pass_fills_the_cache_as_single_steps_do():
    """For some of the rows; the others' part of the cache is untouched."""
    network = small()
    ids = torch.cat((network.start_ids(torch.arange(4), 4)[:, None], torch.randint(0, 20, (4, 5))), dim=1)
    at_once, one_by_one = (CachedTransformer(network, 4, torch.float32) for _ in range(2))
    logits = at_once(ids[2:], 0, slice(2, 4))
    for i in range(6):
        expected = one_by_one(ids[:, i : i + 1], i)
    torch.testing.assert_close(logits, expected[2:])
    for left, right in zip(at_once.caches, one_by_one.caches, strict=True):
        for filled, expected in zip(left, right, strict=True):
            torch.testing.assert_close(filled[2:, :, :6], expected[2:, :, :6])
            assert not filled[:2].any()
            assert not filled[:, :, 6:].any()


# Draws


class Watched(TokenSampler):
    """Keeps the guided logits."""

    def draw(self, logits, keys, step):
        self.seen.append(logits)
        return super().draw(logits, keys, step)


@pytest.mark.parametrize(
    ("scale", "power"), [(1.0, 1.0), (5.0, 1.5), (5.0, 0.0), (0.0, 1.0), (50.0, 20.0)], ids=lambda x: str(x)
)
def test_sampler_follows_the_network(scale, power):
    """Every token is the best of the plain network's guided logits plus the noise of its id and step."""
    network, ids = small(), torch.tensor([3, 11, 4])
    sampler = Watched(scale, power, temperature=1.3)
    sampler.seen = []
    tokens = sampler(network, labels(ids), ids, seed=7)
    with torch.no_grad():
        conditional, null = (network(tokens, label) for label in (labels(ids), torch.full((3,), 5)))
    keys = keys_like_ids(ids, 7)
    for i in range(LENGTH):
        s = 1 + (scale - 1) * (1 - math.cos(math.pi * (i / LENGTH) ** power)) / 2
        guided = null[:, i] + s * (conditional[:, i] - null[:, i])
        torch.testing.assert_close(sampler.seen[i], guided, atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens[:, i], (guided / 1.3 + gumbel_noise(keys, i, 20)).argmax(-1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_belong_to_the_id_at_any_batch_size_and_order(dtype):
    network, ids = small(), torch.arange(64)
    sampler = TokenSampler(4.0, 1.5, dtype=dtype)
    tokens = sampler(network, labels(ids), ids, seed=3)
    assert tokens.shape == (64, LENGTH)
    assert tokens.dtype == torch.int64
    assert not tokens.is_inference()
    parts = [sampler(network, labels(part), part, seed=3) for part in ids.split(7)]
    assert torch.equal(torch.cat(parts), tokens)
    order = torch.randperm(64)
    assert torch.equal(sampler(network, labels(ids[order]), ids[order], seed=3), tokens[order])
    assert len(tokens.unique(dim=0)) == 64
    assert (sampler(network, labels(ids), ids, seed=4) != tokens).any(1).all()
    assert sampler(network, labels(ids[:0]), ids[:0], seed=3).shape == (0, LENGTH)


@pytest.mark.parametrize("changes", VARIANTS[1:])
def test_other_networks(changes):
    network, ids = small(**changes), torch.arange(4)
    label = None if network.num_classes is None else labels(ids)
    tokens = TokenSampler()(network, label, ids, seed=0)
    assert tokens.shape == (4, network.sequence_length)


def test_the_network_and_the_random_state_stay_as_they_are():
    network, ids = small().train(), torch.arange(3)  # its dropout must not act
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    for dtype in DTYPES:
        tokens = TokenSampler(4.0, dtype=dtype)(network, labels(ids), ids, seed=0)
        assert torch.equal(tokens, TokenSampler(4.0, dtype=dtype)(small(), labels(ids), ids, seed=0))
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(TokenSampler(4.0, dtype="float16")(network, labels(ids), ids, seed=0), tokens)


@pytest.mark.parametrize(
    ("scale", "power", "expected"),
    [
        (1.0, 1.0, [3] * LENGTH),
        (4.0, 1.0, [6] * LENGTH),  # at step 0 the null class gets its own first key and value
        (4.0, 0.0, [6] * LENGTH),
        (4.0, 20.0, [3] * 5 + [15] + [6] * 9),  # 5 tokens of the null class in one pass, then both together
    ],
)
def test_the_null_class_is_computed_where_it_matters(scale, power, expected, monkeypatch):
    rows = []
    step = CachedTransformer.__call__

    def counted(self, ids, start, part=slice(None)):
        rows.append(ids.numel())
        return step(self, ids, start, part)

    monkeypatch.setattr(CachedTransformer, "__call__", counted)
    TokenSampler(scale, power)(small(), labels(torch.arange(3)), torch.arange(3), seed=0)
    assert rows == expected


def test_guidance_schedule():
    assert TokenSampler(5.0, 2.0).scales(4) == pytest.approx(
        [1, *(3 - 2 * math.cos(math.pi * x) for x in (1 / 16, 1 / 4, 9 / 16))]
    )
    assert TokenSampler(5.0, 0.0).scales(3) == [5, 5, 5]
    assert TokenSampler(1.0, 2.0).scales(3) == [1, 1, 1]


# From logits to tokens


def frequencies(sampler, logits, draws=40_000):
    keys = torch.randint(2**32, (draws, 2))
    tokens = sampler.draw(logits.expand(draws, -1), keys, step=5)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


LOGITS = torch.tensor([[0.5, -1.0, 2.0, 1.0, -3.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"temperature": 2.5}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_k": 1}, [2]),
        ({"top_k": 4}, [0, 2, 3, 6]),
        ({"top_k": 2}, [2, 3, 6]),  # 3 and 6 are equally likely
        ({"top_k": 7}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_p": 0.4}, [2]),  # 2 has 0.47 of the probability
        ({"top_p": 0.6}, [2, 3, 6]),
        ({"top_p": 0.95}, [0, 2, 3, 5, 6]),
        ({"top_p": 0.6, "temperature": 4.0}, [0, 2, 3, 6]),  # after the temperature
        ({"top_k": 4, "top_p": 0.5}, [2]),  # of the four, 2 has 0.51
    ],
)
def test_draws_have_the_probabilities(options, allowed):
    logits = LOGITS / options.get("temperature", 1.0)
    left_out = [i for i in range(7) if i not in allowed]
    expected = logits[0].index_fill(0, torch.tensor(left_out, dtype=torch.int64), -math.inf).softmax(-1)
    share = frequencies(TokenSampler(**options), LOGITS)
    assert not share[left_out].any()
    assert (share - expected).abs().max() < 4 * 0.5 / 40_000**0.5


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.randn(50, 20)
    tokens = TokenSampler(temperature=0).draw(logits, keys_like_ids(torch.arange(50), 0), 0)
    assert torch.equal(tokens, logits.argmax(-1))


# Settings


def test_the_plain_attributes_are_the_settings():
    """The line that tells how samples were drawn is made of them."""
    sampler = TokenSampler(4.0, 1.5, 0.9, 7, 0.8, "bfloat16")
    sampler(small(), labels(torch.arange(2)), torch.arange(2), seed=0)
    assert vars(sampler) == {
        "guidance_scale": 4.0,
        "guidance_power": 1.5,
        "temperature": 0.9,
        "top_k": 7,
        "top_p": 0.8,
        "dtype": "bfloat16",
        "compile": False,
    }


def test_keys_and_values_of_a_layer_share_memory_with_no_other():
    """torch.compile writes into a tensor of its own; of a view it copies the whole base at each write."""
    cached = CachedTransformer(small(), 2, torch.float32)
    caches = [tensor for pair in cached.caches for tensor in pair]
    assert len({tensor.untyped_storage().data_ptr() for tensor in caches}) == len(caches) > 2


@needs_compiler
@pytest.mark.parametrize("changes", [*VARIANTS, {"hidden": 16, "width": 64, "depth": 3, "codebook_size": 23}])
@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@torch.no_grad()
def test_native_step_is_the_network(changes, dtype, rows):
    """With the gains, biases and every weight drawn at random; keys and values in the cache's memory."""
    network = small(**changes)
    label = None if network.num_classes is None else labels(torch.arange(rows))
    tokens = torch.randint(0, 20, (rows, network.sequence_length))
    ids = torch.cat((network.start_ids(label, rows)[:, None], tokens), dim=1)
    expected = network(tokens, label)
    cached = CachedTransformer(network, rows, getattr(torch, dtype), pack=False)
    step, eager = NativeStep(cached), CachedTransformer(network, rows, getattr(torch, dtype))
    for i in range(network.sequence_length):
        assert same(step(ids[:, i : i + 1], i, slice(rows)), expected[:, i], DTYPES[dtype])
        eager(ids[:, i : i + 1], i)
    for own, other in zip(cached.caches, eager.caches, strict=True):
        assert same(own[0], other[0], DTYPES[dtype])
        assert same(own[1], other[1], DTYPES[dtype])


@needs_compiler
@torch.no_grad()
def test_native_values_are_rounded_to_the_nearest():
    network, ids = small(), torch.arange(8)[:, None]
    cached = CachedTransformer(network, 8, torch.bfloat16, pack=False)
    NativeStep(cached)(ids, 0, slice(8))
    block, kept = network.blocks[0], cached.caches[0][1][:, :, 0].flatten(1)
    weight, bias = (part.bfloat16().float() for part in (block.attention.qkv.weight, block.attention.qkv.bias))
    exact = (block.norm_attention(network.embed(ids[:, 0])) @ weight.T + bias)[:, -32:]
    assert (kept == exact.bfloat16()).float().mean() > 0.95  # half, if they were cut off


@needs_compiler
@torch.no_grad()
def test_native_step_on_any_number_of_threads(monkeypatch):
    """More threads than groups of channels too."""
    network, found = small(), []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        step = NativeStep(CachedTransformer(network, 2, torch.float32, pack=False))
        found.append([step(torch.arange(i, i + 2)[:, None], i, slice(2)) for i in range(3)][-1])
    for logits in found[1:]:
        assert torch.equal(logits, found[0])


@needs_compiler
@torch.no_grad()
def test_native_norms_where_their_eps_counts():
    network = small()
    for block in network.blocks:
        block.attention.qkv.weight.mul_(1e-3)
        block.attention.qkv.bias.mul_(1e-3)
    network.embed.weight.mul_(1e-3)
    cached, expected = (CachedTransformer(network, 2, torch.float32, pack=False) for _ in range(2))
    step = NativeStep(cached)
    for i, ids in enumerate(torch.randint(0, 20, (4, 2, 1))):
        assert same(step(ids, i, slice(2)), expected(ids, i), 2e-6)
    for own, other in zip(cached.caches, expected.caches, strict=True):
        assert same(own[0], other[0], 2e-6)


@needs_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_native_step_under_another_default_dtype(default):
    """As Lightning sets it for precision 64-true and bf16-true."""
    network, ids = small(), torch.arange(2)
    expected = TokenSampler(4.0)(network, labels(ids), ids, seed=0)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(TokenSampler(4.0, compile=True)(network, labels(ids), ids, seed=0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
@pytest.mark.parametrize(("scale", "power"), [(1.0, 1.0), (4.0, 1.0), (4.0, 20.0)])
def test_compiled_on_a_cpu(scale, power, monkeypatch):
    """Also where the null class joins later; the same tokens, from the native step."""
    rows = []
    step = NativeStep.__call__

    def counted(self, ids, start, part):
        rows.append(ids.numel())
        return step(self, ids, start, part)

    monkeypatch.setattr(NativeStep, "__call__", counted)
    network, ids = small(), torch.arange(3)
    tokens = TokenSampler(scale, power, compile=True)(network, labels(ids), ids, seed=0)
    assert torch.equal(tokens, TokenSampler(scale, power)(network, labels(ids), ids, seed=0))
    assert rows == {(1.0, 1.0): [3] * LENGTH, (4.0, 1.0): [6] * LENGTH, (4.0, 20.0): [3] * 5 + [6] * 9}[scale, power]


@pytest.mark.parametrize(
    ("count", "changes", "options"),
    [(5, {}, {}), (3, {"hidden": 40}, {}), (3, {"width": 40}, {}), (3, {}, {"dtype": "float16"})],
)
def test_compiled_without_a_native_step(count, changes, options, monkeypatch):
    """More rows, other sizes, another dtype: as without the option."""
    monkeypatch.delattr(NativeStep, "__call__")
    network, ids = small(**changes), torch.arange(count)
    tokens = TokenSampler(4.0, compile=True, **options)(network, labels(ids), ids, seed=0)
    assert torch.equal(tokens, TokenSampler(4.0, **options)(network, labels(ids), ids, seed=0))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "No such file"),
        ("false", "non-zero exit"),
        ("true", "cannot open"),
        pytest.param("g++ -lnosuch", "nosuch", marks=needs_compiler),
        ("g++ '", "quotation"),
    ],
)
def test_no_compiler(compiler, reason, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    native.build.cache_clear()
    with pytest.raises(UserError, match=rf"compile=true on a CPU: .* made no library in .*{reason}.*Install g\+\+ 9"):
        TokenSampler(compile=True)(small(), labels(torch.arange(1)), torch.arange(1), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0: give a number of at least 0"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"guidance_power": -0.5}, "guidance_power=-0.5"),
        ({"temperature": -0.1}, "temperature=-0.1: give a number of at least 0; 0 takes the most likely token"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: give at least 1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"dtype": "int8"}, "dtype=int8: give float32, bfloat16 or float16"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        TokenSampler(**options)


@pytest.mark.parametrize(
    ("changes", "options", "label", "message"),
    [
        ({}, {"top_k": 21}, [0], "top_k=21: the network has codebook_size=20 tokens"),
        ({"null_class": False}, {"guidance_scale": 2.0}, [0], "guidance_scale=2.0: .*null_class=true"),
        ({"num_classes": None}, {"guidance_scale": 2.0}, None, "guidance_scale=2.0: the network has no null class"),
        ({}, {}, [6], "label 6"),
        ({}, {}, None, "labels were not given"),
    ],
)
def test_settings_that_do_not_fit_the_network(changes, options, label, message):
    label = None if label is None else torch.tensor(label)
    with pytest.raises(UserError, match=message):
        TokenSampler(**options)(small(**changes), label, torch.arange(1), seed=0)
