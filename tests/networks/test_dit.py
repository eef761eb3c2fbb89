"""The network itself; that it equals the official one is in tests/weights/test_lightningdit.py."""

from pathlib import Path

import pytest
import torch
import yaml

from aligntok.errors import UserError
from aligntok.networks import DiT, WideHead
from aligntok.networks.dit import NUM_TIME_FEATURES
from aligntok.networks.positions import grid_coordinates, rotary_table, sincos_positions

CONFIGS = Path(__file__).parents[2] / "configs" / "size"
SMALL = {"latent_shape": (4, 4, 6), "num_classes": 10, "width": 32, "depth": 3, "num_heads": 2}
VARIANTS = [
    {},
    {"latent_shape": (3, 4, 4), "num_heads": 1},
    {"patch_size": 2, "qk_norm": True},
    {"wide_head": WideHead(48, 2, 3)},
]


def small(seed=0, alive=True, **changes):
    """Return a small network; what starts at zero or one is drawn too, else nothing but zeros comes out."""
    torch.manual_seed(seed)
    network = DiT(**{**SMALL, **changes})
    for parameter in network.parameters():
        if alive and (parameter.ndim == 1 or not parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def inputs(network, batch=3):
    torch.manual_seed(1)
    return torch.randn(batch, *network.latent_shape), torch.rand(batch), torch.arange(batch)


def count(network):
    """Return parameters as published, with the fixed position table."""
    return sum(parameter.numel() for parameter in network.parameters()) + network.positions.numel()


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("s", 32_985_248),
        ("b", 130_556_192),
        ("l", 458_152_960),
        ("xl", 675_256_736),
        ("1p0b", 1_029_401_120),
        ("1p6b", 1_631_767_120),
    ],
)
def test_published_sizes(size, parameters):
    """B and XL to the parameter, S 32.99, L 458.15, 1p0B 1029.4 and 1p6B 1631.8 million."""
    path = CONFIGS / f"dit_{size}.yaml"
    sizes = yaml.safe_load(path.read_text())["model"]["init_args"]["network"]["init_args"]
    with torch.device("meta"):
        assert count(DiT((32, 16, 16), 1000, **sizes)) == parameters
    assert f" {parameters:,} " in path.read_text().splitlines()[0]


@pytest.mark.parametrize(("size", "millions"), [((384, 12, 6), 196.5), ((1152, 28, 16), 838.7)])
def test_published_sizes_of_the_wide_head(size, millions):
    with torch.device("meta"):
        network = DiT((768, 16, 16), 1000, *size, wide_head=WideHead(2048, 2, 16))
    fourier = NUM_TIME_FEATURES * (size[0] + 1)  # RAE's time embedding has twice the features, and draws frequencies
    assert round((count(network) + fourier) / 1e6, 1) == millions


@pytest.mark.parametrize("changes", VARIANTS)
def test_shape_and_zero_at_the_start(changes):
    network = small(alive=False, **changes)
    velocity = network(*inputs(network))
    assert velocity.shape == (3, *network.latent_shape)
    assert not velocity.any()
    assert small(**changes)(*inputs(network)).any()


def test_initial_weights():
    network = small(alive=False, width=128, wide_head=WideHead(64, 1, 2))
    zero = {name for name, parameter in network.named_parameters() if name.endswith("weight") and not parameter.any()}
    modulated = [f"blocks.{i}" for i in range(3)] + ["wide_blocks.0", "head"]
    assert zero == {"head.proj.weight", *(f"{name}.modulation.weight" for name in modulated)}
    assert not any(parameter.any() for name, parameter in network.named_parameters() if name.endswith("bias"))
    for module in (network.embed_label, network.embed_time.proj_in, network.embed_time.proj_out):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (network.embed_latent.weight, network.blocks[1].attention.qkv.weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier uniform
        assert 0.98 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("changes", VARIANTS)
def test_samples_do_not_see_each_other(changes):
    network = small(**changes)
    batch, order = inputs(network), torch.tensor([2, 0, 1])
    torch.testing.assert_close(network(*(x[order] for x in batch)), network(*batch)[order])


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_input_matters_everywhere(changes):
    network = small(**changes)
    latent, t, label = inputs(network)
    velocity = network(latent, t, label)
    moved = latent.clone()
    moved[:, 0, 0, 0] += 1
    for other in (network(moved, t, label), network(latent, 1 - t, label), network(latent, t, label + 1)):
        assert (other != velocity).flatten(2).any(2).all()


def test_every_parameter_learns():
    for changes in VARIANTS:
        network = small(**changes)
        network(*inputs(network)).square().sum().backward()
        assert all(parameter.grad.any() for parameter in network.parameters())


def test_tokens_lie_where_their_patch_is():
    """Without attention a patch of the latent reaches only its own patch of the velocity, and its own token."""
    network = small(patch_size=2, width=32)
    for block in network.blocks:
        torch.nn.init.zeros_(block.attention.proj.weight)
    latent, t, label = inputs(network)
    moved = latent.clone()
    moved[:, :, 3, 2] += 1  # in patch (1, 1) of 2 x 3
    (velocity, tokens), (other, others) = (network.forward_with_tokens(x, t, label, block=2) for x in (latent, moved))
    touched = torch.zeros(4, 6, dtype=torch.bool)
    touched[2:4, 2:4] = True
    assert torch.equal((velocity != other).any(0).any(0), touched)
    assert (tokens != others).any(2).any(0).tolist() == [False] * 4 + [True] + [False]


@pytest.mark.parametrize("changes", VARIANTS)
def test_tokens_of_a_block(changes):
    network = small(**changes)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    batch = inputs(network)
    for number in (1, 2, 3):
        seen.clear()
        velocity, tokens = network.forward_with_tokens(*batch, block=number)
        assert torch.equal(tokens, seen[number - 1])
        assert torch.equal(velocity, network(*batch))
    for number in (0, 4):
        with pytest.raises(UserError, match=rf"block={number}: give a block from 1 to depth=3"):
            network.forward_with_tokens(*batch, block=number)


def test_wide_head_reads_the_latent_through_per_token_conditions():
    """Its blocks start from the latent; the narrow tokens only set shift, scale and gate, one for each token."""
    network = small(wide_head=WideHead(48, 2, 3))
    conditions = []
    network.wide_blocks[0].register_forward_hook(lambda module, args, output: conditions.append(args[1]))
    velocity = network(*inputs(network))
    assert conditions[0].shape == (3, 24, 48)
    assert (conditions[0][:, 1:] != conditions[0][:, :1]).any(2).all()
    torch.nn.init.zeros_(network.embed_wide.weight)
    assert (network(*inputs(network)) != velocity).any()


def written_out(block, x, condition, table):
    """One block, by the formulas of arXiv:2501.01423 and 2212.09748, in the order shift, scale, gate."""

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    six = block.modulation(condition).split(x.shape[-1], dim=-1)
    x = x + six[2] * block.attention(norm(x, block.norm_attention.weight) * (1 + six[1]) + six[0], table)
    return x + six[5] * block.mlp(norm(x, block.norm_mlp.weight) * (1 + six[4]) + six[3])


@torch.no_grad()
def test_wide_head_written_out():
    """The narrow blocks give s; silu(t + s), to the wide width, is the condition of the wide ones (RAE, section 5)."""
    network = small(wide_head=WideHead(48, 2, 2))  # heads of 24 channels behind heads of 16
    latent, t, label = inputs(network)
    patches = latent.flatten(2).transpose(1, 2)
    time = network.embed_time(t)[:, None]
    silu, s, grid = torch.nn.functional.silu, network.embed_latent(patches), grid_coordinates(4, 6)
    s = s + sincos_positions(4, 6, 32)
    for block in network.blocks:
        s = written_out(block, s, silu(time + network.embed_label.weight[label][:, None]), rotary_table(grid, 16))
    condition = silu(network.embed_condition(silu(time + s)))
    x = network.embed_wide(patches)
    for block in network.wide_blocks:
        x = written_out(block, x, condition, rotary_table(grid, 24))
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    shift, scale = network.head.modulation(condition).split(48, dim=-1)
    velocity = network.head.proj(x * network.head.norm.weight * (1 + scale) + shift)
    expected = velocity.transpose(1, 2).reshape(latent.shape)
    torch.testing.assert_close(network(latent, t, label), expected, atol=1e-4, rtol=1e-4)


def test_order_within_a_patch():
    """A head that gives each output its own index writes them row by row, channel last."""
    network = small(latent_shape=(3, 2, 2), patch_size=2)
    torch.nn.init.zeros_(network.head.proj.weight)
    network.head.proj.bias.data = torch.arange(12.0)
    expected = torch.arange(12.0).reshape(2, 2, 3).permute(2, 0, 1)
    torch.testing.assert_close(network(*inputs(network, 1))[0], expected)


@pytest.mark.parametrize(("null_class", "null_label"), [(True, 10), (False, None)])
def test_null_class(null_class, null_label):
    network = small(null_class=null_class)
    assert network.null_label == null_label
    assert network.embed_label.num_embeddings == 10 + null_class
    latent, t, _ = inputs(network)
    network(latent, t, torch.full((3,), 9 + null_class))
    for wrong in (10 + null_class, -1):
        with pytest.raises(UserError, match=rf"label {wrong} is none of the network's classes 0\.\.9"):
            network.check_condition(torch.tensor([0, wrong, 1]))


@pytest.mark.parametrize("changes", VARIANTS)
def test_low_precision(changes):
    network = small(**changes)
    velocity = network(*inputs(network))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(*inputs(network))
    network.bfloat16()
    latent, t, label = inputs(network)
    low = network(latent.bfloat16(), t.bfloat16(), label)
    for other in (mixed, low):
        assert other.dtype == torch.bfloat16
        assert (other - velocity).norm() < 0.05 * velocity.norm()


def test_tables_are_rebuilt_not_saved():
    network = small(wide_head=WideHead(48, 2, 3))
    assert {name for name, _ in network.named_buffers()} == {
        "positions",
        "rotary",
        "wide_rotary",
        "embed_time.frequencies",
    }
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 36}, r"^width=36: give a multiple of 4 \* num_heads=8"),
        ({"num_heads": 0}, "num_heads=0: give at least 1"),
        ({"depth": 0}, "depth=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"patch_size": 4}, r"latent_shape=\[4, 4, 6\]: .*patch_size=4"),
        ({"latent_shape": (4, 4)}, r"latent_shape=\[4, 4\]"),
        ({"latent_shape": (0, 4, 4)}, r"latent_shape=\[0, 4, 4\]"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("size", "message"),
    [((48, 2, 5), r"width=48: give a multiple of 4 \* num_heads=20"), ((48, 0, 3), "depth=0: give at least 1")],
)
def test_bad_wide_head(size, message):
    with pytest.raises(UserError, match=message):
        WideHead(*size)


@pytest.mark.parametrize("shape", [(1, 4, 6, 4), (1, 5, 4, 6), (4, 4, 6)])
def test_wrong_latent(shape):
    with pytest.raises(UserError, match=r"the network needs \(B, \*\(4, 4, 6\)\): set latent_shape"):
        small()(torch.randn(shape), torch.rand(1), torch.zeros(1, dtype=torch.long))
