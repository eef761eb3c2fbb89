"""The network itself; that it equals the official one is in tests/weights/test_alitok_generator.py."""

import pytest
import torch
import torch.nn.functional as F

from aligntok.errors import UserError
from aligntok.networks import AutoregressiveTransformer
from aligntok.networks.positions import grid_coordinates, rotary_table

pytestmark = pytest.mark.kernels

SMALL = {"codebook_size": 20, "grid": (3, 4), "num_prefix": 2, "num_classes": 5}
SMALL |= {"width": 32, "depth": 2, "num_heads": 2, "hidden": 48}
VARIANTS = [{}, {"num_prefix": 0, "grid": (2, 2)}, {"num_classes": None}, {"null_class": False, "num_heads": 1}]


def small(seed=0, alive=True, **changes):
    """Return a small network; what starts at zero or one is drawn too, else nothing but zeros comes out."""
    torch.manual_seed(seed)
    network = AutoregressiveTransformer(**{**SMALL, **changes})
    for parameter in network.parameters():
        if alive:
            torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


def inputs(network, batch=3):
    torch.manual_seed(1)
    tokens = torch.randint(0, network.codebook_size, (batch, network.sequence_length))
    return tokens, None if network.num_classes is None else torch.arange(batch)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [((768, 24, 16), 177_048_064), ((1024, 24, 16), 317_851_648), ((1280, 32, 16), 662_141_696)],
)
def test_published_sizes(size, parameters):
    with torch.device("meta"):
        network = AutoregressiveTransformer(4096, (16, 16), 17, 1000, *size)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_number_of_tokens(changes):
    network = small(**changes)
    tokens, label = inputs(network)
    all_logits = network(tokens, label)
    assert all_logits.shape == (3, network.sequence_length + 1, 20)
    for n in range(network.sequence_length):
        torch.testing.assert_close(network(tokens[:, :n], label), all_logits[:, : n + 1])


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_token_never_changes_an_earlier_logit(changes):
    """Position p predicts token p, so token j may change the logits from j + 1 on, and does."""
    network = small(**changes)
    tokens, label = inputs(network)
    logits = network(tokens, label)
    for j in range(network.sequence_length):
        moved = tokens.clone()
        moved[:, j] = (moved[:, j] + 1) % 20
        changed = (network(moved, label) != logits).any(2)
        assert not changed[:, : j + 1].any()
        assert changed[:, j + 1 :].all()


def test_label_changes_every_logit():
    network = small()
    tokens, label = inputs(network)
    logits = network(tokens, label)
    for other in (label + 1, torch.full_like(label, network.null_label)):
        assert (network(tokens, other) != logits).any(2).all()


def test_samples_do_not_see_each_other():
    network, order = small(), torch.tensor([2, 0, 1])
    tokens, label = inputs(network)
    torch.testing.assert_close(network(tokens[order], label[order]), network(tokens, label)[order])


def test_rotations():
    """Class token zero, prefix 0 .. K - 1 over the whole head, rows and columns of the grid from K on."""
    rotary = small(grid=(3, 4), num_prefix=2).rotary
    assert rotary.shape == (1 + 2 + 12, 8, 2)
    assert not rotary[0].any()
    torch.testing.assert_close(rotary[1:3], rotary_table(torch.arange(2)[:, None], 16))
    torch.testing.assert_close(rotary[3:], rotary_table(grid_coordinates(3, 4) + 2, 16))
    assert not torch.allclose(rotary[1], rotary[3])


def written_out(network, tokens, label):
    """The network by the formulas of SwiGLU, RMSNorm and attention, head by head, with an explicit mask."""

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    def turn(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotary).flatten(-2)

    x = network.embed.weight[torch.cat((label[:, None] + 21, tokens), dim=1)]
    rotary = torch.view_as_complex(network.rotary[: x.shape[1]])
    for block in network.blocks:
        q, k, v = block.attention.qkv(norm(x, block.norm_attention)).split(32, dim=-1)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            scores = turn(norm(q[..., head], block.attention.q_norm).contiguous())
            scores = scores @ turn(norm(k[..., head], block.attention.k_norm).contiguous()).mT / 4
            heads.append(
                scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ v[..., head]
            )
        x = x + block.attention.proj(torch.cat(heads, dim=-1))
        gate, value = F.linear(norm(x, block.norm_mlp), block.mlp.proj_in.weight).split(48, dim=-1)
        x = x + F.linear(gate * gate.sigmoid() * value, block.mlp.proj_out.weight)
    return network.head(norm(x, network.norm))


@torch.no_grad()
def test_written_out():
    network = small()
    tokens, label = inputs(network)
    torch.testing.assert_close(network(tokens, label), written_out(network, tokens, label), atol=1e-4, rtol=1e-4)


def test_initial_weights():
    network = small(alive=False, width=128, hidden=None, codebook_size=200)
    tokens, label = inputs(network)
    assert not network(tokens, label).any()
    assert network.blocks[0].mlp.proj_out.in_features == 512  # 8/3 of 128, rounded up to a multiple of 256
    for name, parameter in network.named_parameters():
        if name == "head.weight" or name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_one_table_embeds_all():
    assert small().embed.num_embeddings == 20 + 1 + 5 + 1
    assert small(null_class=False).embed.num_embeddings == 20 + 1 + 5
    assert small(num_classes=None).embed.num_embeddings == 20 + 1 + 1
    assert [small(**changes).null_label for changes in VARIANTS] == [5, 5, None, None]
    network = small()
    tokens, label = inputs(network)
    network(tokens, label).square().sum().backward()
    used = network.embed.weight.grad.any(1)
    assert used[21:24].all()  # the labels 0, 1, 2
    assert not used[20]
    assert not used[24:].any()


def test_every_other_parameter_learns():
    for changes in VARIANTS:
        network = small(**changes)
        network(*inputs(network)).square().sum().backward()
        assert all(parameter.grad.any() for parameter in network.parameters())


def test_dropout_in_training_alone():
    network = small(dropout=0.5)
    batch = inputs(network)
    assert torch.equal(network(*batch), network(*batch))
    assert torch.equal(network(*batch), small(dropout=0.0)(*batch))
    network.train()
    assert (network(*batch) != network(*batch)).any()
    assert torch.equal(small(dropout=0.0).train()(*batch), network.eval()(*batch))


@pytest.mark.parametrize("place", ["embedded", "attention", "outputs"])
def test_where_dropout_acts(place):
    """With the other places switched off, each place alone makes two passes differ."""
    network = small(dropout=0.5).train()
    keep = {"embedded": [network.dropout], "outputs": [block.dropout for block in network.blocks], "attention": []}
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout) and module not in keep[place]:
            module.p = 0.0
    for block in network.blocks:
        block.attention.dropout = 0.5 if place == "attention" else 0.0
    batch = inputs(network)
    assert (network(*batch) != network(*batch)).any()


def test_low_precision():
    network = small()
    logits = network(*inputs(network))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(*inputs(network))
    low = network.bfloat16()(*inputs(network))
    for other in (mixed, low):
        assert other.dtype == torch.bfloat16
        assert (other - logits).norm() < 0.05 * logits.norm()


def test_table_is_rebuilt_not_saved():
    network = small()
    assert {name for name, _ in network.named_buffers()} == {"rotary"}
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 36}, r"^width=36: give a multiple of 4 \* num_heads=8"),
        ({"num_heads": 0}, "num_heads=0: give at least 1"),
        ({"depth": 0}, "depth=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"num_prefix": -1}, "num_prefix=-1: give at least 0"),
        ({"grid": (0, 4)}, r"grid=\[0, 4\]"),
        ({"grid": (4,)}, r"grid=\[4\]"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "tokens", "label", "message"),
    [
        ({}, [[0, 20]], [0], r"token 20 is none of the network's codes 0\.\.19: set codebook_size"),
        ({}, [[-1, 0]], [0], "token -1"),
        ({}, [[0] * 15], [0], r"tokens have shape \(1, 15\), .* = 14: set num_prefix=2 and grid=\[3, 4\]"),
        ({}, [0], [0], r"tokens have shape \(1,\)"),
        ({}, [[0]], [6], r"label 6 is none of the network's classes 0\.\.4 \(null class 5\)"),
        ({}, [[0]], [-1], "label -1"),
        ({"null_class": False}, [[0]], [5], r"label 5 .*\(no null class\)"),
        ({}, [[0]], None, "conditional, on num_classes=5, and labels were not given"),
        ({"num_classes": None}, [[0]], [0], "unconditional and labels were given"),
    ],
)
def test_bad_inputs(changes, tokens, label, message):
    network, labels = small(**changes), None if label is None else torch.tensor(label)

    def run():
        network.check_condition(labels)  # as whoever samples does
        network(torch.tensor(tokens), labels)

    with pytest.raises(UserError, match=message):
        run()
