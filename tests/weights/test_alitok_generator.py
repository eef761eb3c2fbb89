"""Parity with AliTok's official generator, and its checkpoints: golden/README.md, case c."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aligntok.decoding import TokenSampler
from aligntok.errors import UserError
from aligntok.networks import AutoregressiveTransformer
from aligntok.weights.alitok import GENERATOR_NAMES, from_alitok, load_alitok, to_alitok
from aligntok.weights.official import official_names

# Outputs of the official code at commit 093e957, of the weights that `draw` gives. Of each logits array every 791st
# number, of the guided ones of the first sample; of `logits_rows` every 64th.
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "c_alitok_ar_b.npz")
STRIDE = 791
POSITIONS = [0, 1, 17, 18, 34, 273]
SCALES = {"embeddings.weight": 1.0, "output.weight": 0.1}  # else 0.02
LABEL, NULL = torch.tensor([207, 980]), torch.tensor([1000, 1000])
CACHED_STEPS = 32


def draw(network):
    """Return an official state dict by the rule of the golden vectors: sorted key number i has seed 1000 + i."""
    state = {}
    for i, (key, value) in enumerate(sorted(to_alitok(network).items())):
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(1000 + i))
        state[key] = drawn.mul_(SCALES.get(key, 0.02)).add_(value.ndim == 1 and key.endswith("weight"))
    return state


@pytest.fixture(scope="module")
def b():
    with torch.device("meta"):
        network = AutoregressiveTransformer(4096, (16, 16), 17, 1000, width=768, depth=24, num_heads=16)
    return from_alitok(draw(network))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 4096, (2, 273), generator=torch.Generator().manual_seed(31))


def check(ours, name, atol):
    torch.testing.assert_close(ours, torch.from_numpy(GOLDEN[name]), atol=atol, rtol=0)


@torch.no_grad()
def test_logits_and_loss(b, tokens):
    logits = b(tokens, LABEL)
    check(logits.flatten()[::STRIDE], "logits", 2e-4)
    check(logits[0, POSITIONS, ::64], "logits_rows", 2e-4)
    assert (logits.argmax(-1).numpy() == GOLDEN["logits_argmax"]).all()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(GOLDEN["ar_loss"].item(), rel=1e-5)
    assert (logits[:, :-1].argmax(-1) == tokens).float().mean().item() == GOLDEN["ar_accuracy"].item()


@torch.no_grad()
def test_logits_of_the_null_class(b, tokens):
    check(b(tokens, NULL).flatten()[::STRIDE], "logits_unconditional", 2e-4)


def test_rotations_and_guidance_schedule(b):
    check(b.rotary[POSITIONS], "rotary_table", 1e-5)
    scales = torch.tensor(TokenSampler(16, 1.8).scales(273), dtype=torch.float32)
    check(scales, "guidance_schedule", 1e-5)


class Enough(Exception):
    """Stops a sampler that has shown what it does."""


class Watched(TokenSampler):
    """Keeps the guided logits and tokens of the first steps, then stops."""

    def draw(self, logits, keys, step):
        tokens = super().draw(logits, keys, step)
        self.seen.append((logits, tokens))
        if step == CACHED_STEPS - 1:
            raise Enough
        return tokens


def test_greedy_sampling_with_the_cache(b):
    """The guided tokens, as long as the two best are further apart than the tolerance."""
    sampler = Watched(16, 1.8, temperature=0)
    sampler.seen = []
    with pytest.raises(Enough):
        sampler(b, LABEL, torch.arange(2), seed=0)
    tokens = torch.stack([drawn for _, drawn in sampler.seen], dim=1)
    best = torch.stack([logits for logits, _ in sampler.seen], dim=1).topk(2).values
    gap = torch.from_numpy(GOLDEN["greedy_gap"])[:, :CACHED_STEPS]
    assert gap.min() > 2e-3
    assert (tokens.numpy() == GOLDEN["greedy_tokens"][:, :CACHED_STEPS]).all()
    torch.testing.assert_close(best[..., 0] - best[..., 1], gap, atol=4e-3, rtol=0)


@torch.no_grad()
def test_guided_logits_of_the_whole_sequence(b):
    """Teacher forcing with the first sample's stored tokens: one pass gives the guided logits of all steps."""
    tokens = torch.from_numpy(GOLDEN["greedy_tokens"][:1, :-1]).long().expand(2, -1)
    conditional, null = b(tokens, torch.stack([LABEL[0], NULL[0]]))
    scales = torch.tensor(TokenSampler(16, 1.8).scales(273))
    guided = null + (conditional - null) * scales[:, None]
    check(guided.flatten()[::STRIDE], "greedy_guided_logits", 2e-3)


def small(seed=0):
    torch.manual_seed(seed)
    network = AutoregressiveTransformer(32, (16, 16), 17, 5, width=32, depth=2, num_heads=2, hidden=48)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("form", ["plain", "model", "ddp"])
def test_round_trip_through_a_file(form, tmp_path):
    network, path = small(), tmp_path / "ar.bin"
    state = to_alitok(network)
    content = {
        "plain": state,
        "model": {"model": state},
        "ddp": {f"module.{key}": value for key, value in state.items()},
    }[form]
    torch.save(content, path)
    ours = load_alitok(path)
    assert not ours.training
    for key, value in network.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    tokens, label = torch.randint(0, 32, (2, 273)), torch.tensor([0, 5])
    assert torch.equal(ours(tokens, label), network.eval()(tokens, label))


def test_names_and_shapes():
    with torch.device("meta"):
        state = to_alitok(AutoregressiveTransformer(4096, (16, 16), 17, 1000, width=1280, depth=32, num_heads=16))
    block = {"attn.qkv.weight": (3840, 1280), "attn.qkv.bias": (3840,), "attn.q_norm.weight": (80,)}
    block |= {"attn.k_norm.weight": (80,), "attn.proj.weight": (1280, 1280), "attn.proj.bias": (1280,)}
    block |= {"norm1.weight": (1280,), "norm2.weight": (1280,), "mlp.w2.weight": (1280, 3584)}
    block |= {"mlp.w1.weight": (3584, 1280), "mlp.w3.weight": (3584, 1280)}
    expected = {f"blocks.{i}.{name}": shape for i in range(32) for name, shape in block.items()}
    expected |= {"embeddings.weight": (5098, 1280), "norm.weight": (1280,)}
    expected |= {"output.weight": (4096, 1280), "output.bias": (4096,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert official_names("blocks.3.mlp.proj_in.weight", GENERATOR_NAMES) == [
        "blocks.3.mlp.w1.weight",
        "blocks.3.mlp.w3.weight",
    ]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("blocks.1.attn.qkv.bias", None, r"blocks\.1\.attn\.qkv\.bias is missing there"),
        ("embeddings.weight", None, "nor of its generators.*lacks 'embeddings.weight'"),
        ("blocks.0.mlp.w4.weight", lambda x: torch.zeros(1), r"w4\.weight is unknown here"),
        ("blocks.1.mlp.w3.weight", lambda x: x[:40], r"w3\.weight is \(40, 32\) there and \(48, 32\) here"),
    ],
)
def test_refuses_what_does_not_fit(key, change, message):
    state = to_alitok(small())
    value = state.pop(key, None)
    if change is not None:
        state[key] = change(value)
    with pytest.raises(UserError, match=message):
        from_alitok(state)


def test_refuses_code_and_tells_its_files_from_others(tmp_path):
    torch.save({"model": to_alitok(small()), "config": Namespace(lr=1)}, tmp_path / "ar.bin")
    with pytest.raises(UserError, match="refused"):
        load_alitok(tmp_path / "ar.bin")
    torch.save(small().state_dict(), tmp_path / "ours.ckpt")
    with pytest.raises(UserError, match="nor of its generators"):
        load_alitok(tmp_path / "ours.ckpt")
