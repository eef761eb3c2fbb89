"""Parity with the official LightningDiT, and its checkpoints: golden/README.md, case d."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.networks import DiT, WideHead
from aligntok.weights.lightningdit import (
    OFFICIAL_NAMES,
    TABLES,
    from_lightningdit,
    is_lightningdit,
    load_lightningdit,
    to_lightningdit,
)
from aligntok.weights.official import official_names

# Outputs of the official code at commit 2725fed, of the weights that `draw` gives. Of guided and sampled batches only
# the first half, the guided one (of the sampled one the first); of the rotary tables the tokens 1, 16 and 255.
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "lightningdit_b1.npz")
SCALES = {"adaLN": 0.08, "x_embedder": 0.3, "t_embedder": 0.06, "y_embedder": 0.2, "attn.qkv": 0.05}  # else 0.02
SMALL = {"latent_shape": (4, 4, 6), "num_classes": 10, "width": 32, "depth": 2, "num_heads": 2}


def draw(network):
    """Return an official state dict by the rule of the golden vectors: sorted key number i has seed 1000 + i."""
    state = to_lightningdit(network)
    for i, key in enumerate(sorted(state)):
        if key in TABLES:
            continue
        shape = state[key].shape
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + i))
        scale = next((scale for name, scale in SCALES.items() if name in key and len(shape) > 1), 0.02)
        state[key] = value * scale + (len(shape) == 1 and key.endswith("weight"))
    return state


@pytest.fixture(scope="module")
def b1():
    network = DiT((32, 16, 16), 1000, width=768, depth=12, num_heads=12)
    from_lightningdit(draw(network), network)
    return network.eval()


def randn(seed):
    return torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(seed))


def check(ours, name, atol):
    torch.testing.assert_close(ours, torch.from_numpy(GOLDEN[name]), atol=atol, rtol=0)


@torch.no_grad()
def test_forward(b1):
    check(b1(randn(41), torch.tensor([0.1, 0.75]), torch.tensor([207, 1000])), "forward_out", 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("t", "name"), [(0.4, "cfg_t0.4"), (0.05, "cfg_t0.05_below_interval")])
def test_guided_forward(b1, t, name):
    velocity = Guidance(10, start=0.11, channels=3).velocity(b1, torch.tensor([207, 980]))
    check(velocity(randn(42), torch.full((2,), t)), name, 5e-4)


def test_euler(b1):
    velocity = Guidance(10, start=0.11, channels=3).velocity(b1, torch.tensor([207]))
    check(Euler(5, shift=0.3)(velocity, randn(42)[:1]), "euler6_final", 5e-4)


def test_constants(b1):
    check(b1.embed_time.features(torch.tensor([0.1])), "t_embedding_sinusoid", 1e-5)
    state = to_lightningdit(b1)
    for axis in ("cos", "sin"):
        check(state[f"feat_rope.freqs_{axis}"][[1, 16, 255]], f"const_rope_{axis}", 1e-5)


def test_names_and_shapes_of_xl():
    """As published (facts of LightningDiT, section 1.3), 351 entries."""
    d, block = 1152, {"norm1.weight": [1152], "norm2.weight": [1152]}
    linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.w12": (2 * 3072, d), "mlp.w3": (d, 3072)}
    for name, shape in {**linear, "adaLN_modulation.1": (6 * d, d)}.items():
        block |= {f"{name}.weight": [*shape], f"{name}.bias": [shape[0]]}
    expected = {f"blocks.{i}.{name}": shape for i in range(28) for name, shape in block.items()}
    expected |= {"pos_embed": [1, 256, d], "feat_rope.freqs_cos": [256, 72], "feat_rope.freqs_sin": [256, 72]}
    expected |= {"x_embedder.proj.weight": [d, 32, 1, 1], "x_embedder.proj.bias": [d]}
    expected |= {"t_embedder.mlp.0.weight": [d, 256], "t_embedder.mlp.0.bias": [d]}
    expected |= {"t_embedder.mlp.2.weight": [d, d], "t_embedder.mlp.2.bias": [d]}
    expected |= {"y_embedder.embedding_table.weight": [1001, d], "final_layer.norm_final.weight": [d]}
    expected |= {"final_layer.adaLN_modulation.1.weight": [2 * d, d], "final_layer.adaLN_modulation.1.bias": [2 * d]}
    expected |= {"final_layer.linear.weight": [32, d], "final_layer.linear.bias": [32]}
    with torch.device("meta"):
        network = DiT((32, 16, 16), 1000, width=1152, depth=28, num_heads=16)
    assert {key: list(value.shape) for key, value in to_lightningdit(network).items()} == expected
    assert len(expected) == 351


def small(seed=0, **changes):
    torch.manual_seed(seed)
    network = DiT(**{**SMALL, **changes})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2, "qk_norm": True}])
@pytest.mark.parametrize("form", ["plain", "ema", "model", "ddp"])
def test_round_trip_through_a_file(form, changes, tmp_path):
    theirs, ours, path = small(0, **changes), small(1, **changes), tmp_path / "their.pt"
    state = to_lightningdit(theirs)
    other = {key: value + 1 for key, value in state.items()}
    content = {
        "plain": state,
        "ema": {"model": other, "ema": state, "opt": {"state": {}}, "config": {"lr": 2e-4}},
        "model": {"model": state},
        "ddp": {"ema": {f"module.{key}": value for key, value in state.items()}},
    }[form]
    torch.save(content, path)
    assert is_lightningdit(path)
    load_lightningdit(path, ours)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
        assert key == "embed_latent.weight" or state[official_names(key, OFFICIAL_NAMES)[0]].shape == value.shape


def test_patch_order_is_that_of_a_convolution():
    """The weight that we hold as a matrix gives what their strided convolution gives."""
    network = small(patch_size=2)
    state = to_lightningdit(network)
    latent = torch.randn(2, 4, 4, 6)
    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    tokens = torch.nn.functional.conv2d(latent, weight, bias, stride=2).flatten(2).transpose(1, 2)
    seen = []
    network.embed_latent.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(latent, torch.rand(2), torch.tensor([0, 1]))
    torch.testing.assert_close(seen[0], tokens)


def damaged(**changes):
    state = to_lightningdit(small())
    for key, change in changes.items():
        if change is None:
            del state[key]
        else:
            state[key] = change(state[key]) if key in state else change(torch.zeros(1))
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.attn.qkv.bias": None}, r"blocks\.1\.attn\.qkv\.bias is missing there"),
        ({"feat_rope.freqs_sin": None}, r"feat_rope\.freqs_sin is missing there"),
        ({"blocks.0.attn.q_norm.weight": lambda x: x}, r"q_norm\.weight is unknown here.*qk_norm"),
        ({"pos_embed": lambda x: x[:, :12]}, r"pos_embed is \(1, 12, 32\) there and \(1, 24, 32\) here"),
        ({"pos_embed": lambda x: x.flip(1)}, "another pos_embed"),
        ({"feat_rope.freqs_cos": lambda x: x + 0.01}, "another feat_rope.freqs_cos"),
        ({"feat_rope.freqs_sin": lambda x: x * float("nan")}, "another feat_rope.freqs_sin"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        from_lightningdit(damaged(**changes), small())


def test_refuses_code(tmp_path):
    path = tmp_path / "their.pt"
    torch.save({"ema": to_lightningdit(small()), "config": Namespace(lr=1)}, path)
    with pytest.raises(UserError, match=r"refused.*weights_only=False elsewhere and torch\.save its tensors alone"):
        load_lightningdit(path, small())


def test_tells_its_files_from_others(tmp_path):
    for content in ({"state_dict": small().state_dict()}, [1, 2]):
        torch.save(content, tmp_path / "other.ckpt")
        assert not is_lightningdit(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="is missing there"):
        load_lightningdit(tmp_path / "other.ckpt", small())


def test_wide_head_is_not_lightningdit():
    with pytest.raises(UserError, match="wide_head"):
        to_lightningdit(small(wide_head=WideHead(32, 1, 2)))
