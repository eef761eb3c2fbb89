"""A DiT that reads: what text changes and what it must not."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.networks import DiT, WideHead
from aligntok.networks.text import Text, concatenate
from aligntok.networks.text_dit import KeptText, TextDiT

SMALL = {"latent_shape": (4, 4, 6), "width": 32, "depth": 3, "num_heads": 2}
VARIANTS = [{}, {"adapter_depth": 0}, {"patch_size": 2, "qk_norm": False}, {"wide_head": WideHead(48, 2, 3)}]


def small(seed=0, alive=True, **changes):
    """Return a small network; what starts at zero or one is drawn too, else nothing but zeros comes out."""
    torch.manual_seed(seed)
    network = TextDiT(**{**SMALL, "text_width": 12, **changes})
    return awake(network) if alive else network


def awake(network):
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or name.startswith("adapter.") or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def texts(lengths=(5, 2, 0), seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return Text(torch.randn(len(lengths), 5, 12, generator=generator), mask)


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 4, 6, generator=generator), torch.rand(3, generator=generator)


@pytest.mark.parametrize("changes", VARIANTS)
def test_it_starts_as_a_class_conditional_network_bit_for_bit(changes):
    network, (latent, t) = small(alive=False, **changes), inputs()
    before = awake(DiT(**SMALL, num_classes=7, **{"qk_norm": True} | without(changes)))
    network.start_from(before)
    assert network(latent, t, texts()).any()
    assert torch.equal(network(latent, t, texts()), before(latent, t, torch.full((3,), 7)))
    same = {key: value.shape for key, value in before.state_dict().items()}
    assert {key: value.shape for key, value in network.without_text(7).state_dict().items()} == same


def test_without_a_null_class_it_starts_as_the_mean_class():
    before = awake(DiT(**SMALL, num_classes=7, null_class=False, qk_norm=True))
    before.embed_label.weight.data[:] = before.embed_label.weight[:1]
    network, (latent, t) = small(alive=False), inputs()
    network.start_from(before)
    torch.testing.assert_close(network(latent, t, texts()), before(latent, t, torch.full((3,), 3)))


def without(changes):
    return {key: value for key, value in changes.items() if key != "adapter_depth"}


@pytest.mark.parametrize("changes", VARIANTS)
def test_kept_keys_and_values_equal_fresh_ones(changes):
    network, (latent, t) = small(**changes), inputs()
    kept = network.prepare(texts())
    assert isinstance(kept, KeptText)
    assert kept.features.shape == (3, 3, 2, 2, 5, 16)
    assert torch.equal(network(latent, t, kept), network(latent, t, texts()))
    for rows in (slice(1, 3), torch.tensor([2, 0])):
        torch.testing.assert_close(network(latent[rows], t[rows], kept[rows]), network(latent, t, texts())[rows])


@pytest.mark.parametrize("filling", [0.0, 1e4, torch.nan])
def test_what_padding_holds_changes_nothing(filling):
    network, (latent, t) = small(), inputs()
    text = texts()
    filled = Text(text.features.masked_fill(~text.mask[..., None], filling), text.mask)
    assert torch.equal(network(latent, t, filled), network(latent, t, text))


def test_padding_to_another_length_changes_rounding_alone():
    network, (latent, t), text = small(), inputs(), texts()
    longer = Text(
        torch.cat([text.features, torch.ones(3, 4, 12)], 1), torch.cat([text.mask, text.mask.new_zeros(3, 4)], 1)
    )
    torch.testing.assert_close(network(latent, t, longer), network(latent, t, text))


@pytest.mark.parametrize("changes", VARIANTS)
def test_each_token_matters_and_so_does_its_place(changes):
    network, (latent, t), text = small(**changes), inputs(), texts((5, 5, 5))
    velocity = network(latent, t, text)
    for token in range(5):
        changed = text.features.clone()
        changed[:, token] = texts(seed=7).features[:, token]
        assert (network(latent, t, Text(changed, text.mask)) != velocity).flatten(2).any(2).all()
    turned = network(latent, t, Text(text.features.flip(1), text.mask))
    moves = (turned - velocity).abs().max()
    assert moves > 1e-3 if network.adapter.blocks else moves < 1e-4  # the adapter's blocks know the order
    scaled = network(latent, t, Text(100 * text.features, text.mask))
    torch.testing.assert_close(scaled, velocity, rtol=1e-3, atol=1e-4)


def test_null_is_a_text_without_tokens_and_dropping_makes_it():
    network, (latent, t), text = small(), inputs(), texts((5, 5, 5))
    null = network.null(text)
    assert not null.mask.any()
    dropped = network.drop(text, torch.tensor([True, False, True]))
    expected = torch.where(
        torch.tensor([1, 0, 1]).bool().view(3, 1, 1, 1), network(latent, t, null), network(latent, t, text)
    )
    torch.testing.assert_close(network(latent, t, dropped), expected)
    before = network(latent, t, null)
    network.adapter.null_text.data += 1
    assert (network(latent, t, null) != before).flatten(1).any(1).all()
    assert torch.equal(network(latent, t, text), network(latent, t, texts((5, 5, 5))))


def test_every_parameter_learns_from_texts_of_which_some_are_null():
    for changes in VARIANTS:
        network = small(**changes)
        network(*inputs(), texts()).square().sum().backward()
        assert all(parameter.grad.any() for parameter in network.parameters())
    network.zero_grad()
    network(*inputs(), texts((5, 5, 5))).square().sum().backward()
    assert network.adapter.null_text.grad is not None  # else DistributedDataParallel would wait for it


def test_tokens_of_a_block():
    network, (latent, t) = small(), inputs()
    seen = []
    network.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    velocity, tokens = network.forward_with_tokens(latent, t, texts(), block=2)
    assert torch.equal(tokens, seen[0])
    assert torch.equal(velocity, network(latent, t, texts()))


# --- guidance


def test_guidance_of_one_is_conditional_and_others_are_the_formula():
    network, (latent, t) = small(), inputs()
    text, guide = texts((5, 2, 4)), small(seed=5)
    conditional, null = network(latent, t, text), network(latent, t, Text(text.features, text.mask & False))
    assert torch.equal(Guidance().velocity(network, text)(latent, t), conditional)
    for scale in (0.0, 3.5):
        velocity = Guidance(scale).velocity(network, text)(latent, t)
        torch.testing.assert_close(velocity, null + scale * (conditional - null))
    t = torch.tensor([0.1, 0.5, 0.9])  # of which one is guided
    conditional, null = network(latent, t, text), network(latent, t, network.null(text))
    velocity = Guidance(3.0, start=0.3, end=0.8).velocity(network, text)(latent, t)
    torch.testing.assert_close(velocity[1], null[1] + 3 * (conditional[1] - null[1]))
    torch.testing.assert_close(velocity[::2], conditional[::2])
    worse = guide(latent, t, text)
    velocity = Guidance(2.0, guide=guide).velocity(network, text)(latent, t)
    torch.testing.assert_close(velocity, worse + 2 * (conditional - worse))


def test_the_text_is_read_once_for_all_steps():
    network, calls = small(), []
    network.adapter.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    Euler(6)(Guidance(3.0, start=0.4).velocity(network, texts()), torch.randn(3, 4, 4, 6))
    assert calls == [6]


# --- what does not fit


def test_other_conditions_are_refused():
    network = small()
    network.check_condition(texts())
    with pytest.raises(UserError, match="the network reads text and labels were given"):
        network.check_condition(torch.arange(3))
    with pytest.raises(UserError, match=r"the text has 9 channels, network.text_width is 12"):
        network.check_condition(Text(torch.zeros(1, 5, 9), torch.ones(1, 5) > 0))


def test_texts_are_indexed_joined_and_moved():
    text = texts()
    both = concatenate(text, text[1:])
    assert len(both) == 5
    assert torch.equal(both.features[3:], text.features[1:])
    assert both.mask.sum(1).tolist() == [5, 2, 0, 2, 0]
    assert text.to("meta").mask.device.type == "meta"


@pytest.mark.parametrize("changes", VARIANTS)
def test_low_precision(changes):
    network, (latent, t) = small(**changes), inputs()
    velocity = network(latent, t, texts())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, kept = network(latent, t, texts()), network(latent, t, network.prepare(texts()))
    network.bfloat16()
    low = network(latent.bfloat16(), t.bfloat16(), Text(texts().features.bfloat16(), texts().mask))
    assert torch.equal(mixed, kept)
    for other in (mixed, low):
        assert other.dtype == torch.bfloat16
        assert (other - velocity).norm() < 0.05 * velocity.norm()
