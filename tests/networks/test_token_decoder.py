"""The token decoder: causality, prefix head, buffer tokens, and what passes from one stage to the next."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import TokenDecoder

SIZES = {"latent_dim": 4, "image_size": (16, 24), "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}


def decoder(seed=0, num_prefix=3, **changes):
    torch.manual_seed(seed)
    net = TokenDecoder(**{**SIZES, "num_prefix": num_prefix, **changes})
    with torch.no_grad():
        for parameter in net.parameters():  # at the small initial weights tokens hardly see each other
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net.eval()


def patches(image):
    """Return the patches (N, pixels) of an image in raster order."""
    return image[0].unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


def outputs(net, latent):
    """Return the patches of all tokens, prefix first where it has a head."""
    if net.prefix_head is None:
        return patches(net(latent))
    return torch.cat([patches(image) for image in net.with_prefix(latent)][::-1])


@pytest.mark.parametrize("num_buffer", [1, 4])
@pytest.mark.parametrize(("num_prefix", "prefix_head"), [(0, False), (3, False), (3, True), (4, True)])
@pytest.mark.parametrize("size", [(16, 24), (24, 8)])
@torch.no_grad()
def test_a_token_never_changes_an_earlier_output(size, num_prefix, prefix_head, num_buffer):
    net = decoder(image_size=size, num_prefix=num_prefix, prefix_head=prefix_head, num_buffer=num_buffer, causal=True)
    latent = torch.randn(1, 4, 1, net.sequence_length)
    before, hidden = outputs(net, latent), 0 if prefix_head else num_prefix  # tokens whose own output is not seen
    for token in range(net.sequence_length):
        changed = latent.clone()
        changed[..., token] += 1
        moved = (outputs(net, changed) != before).any(1)
        own = max(token - hidden, 0)
        assert not moved[:own].any()
        assert moved[own:].all()


@torch.no_grad()
def test_without_causal_every_token_changes_every_output():
    net = decoder(prefix_head=True, num_buffer=2)
    latent = torch.randn(1, 4, 1, 9)
    for token in range(9):
        changed = latent.clone()
        changed[..., token] += 1
        assert (outputs(net, changed) != outputs(net, latent)).any(1).all()


@pytest.mark.parametrize("num_buffer", [0, 1, 5])
@pytest.mark.parametrize(("num_prefix", "size"), [(0, (16, 24)), (2, 8)])
def test_shapes_and_range(num_prefix, size, num_buffer):
    net = decoder(num_prefix=num_prefix, image_size=size, num_buffer=num_buffer)
    h, w = net.grid
    image = net(20 * torch.randn(2, 4, 1, num_prefix + h * w))
    assert image.shape == (2, 3, 8 * h, 8 * w)
    assert image.min() >= 0
    assert image.max() <= 1
    assert (net.buffer_tokens is None) == (num_buffer == 0)


def test_a_latent_is_read_in_raster_order():
    net, latent = decoder(num_prefix=0), torch.randn(2, 4, 2, 3)
    assert torch.equal(net(latent), net(latent.flatten(2).unsqueeze(2)))


def test_buffer_tokens_take_part():
    net, latent = decoder(num_buffer=3), torch.randn(2, 4, 1, 9)
    before = net(latent)
    net.buffer_tokens.data[1] += torch.randn(16)
    assert not torch.allclose(net(latent), before)


def test_the_prefix_gives_a_row_of_patches_through_its_own_head():
    net, latent = decoder(prefix_head=True), torch.randn(2, 4, 1, 9)
    image, prefix = net.with_prefix(latent)
    assert prefix.shape == (2, 3, 8, 24)
    assert torch.equal(image, net(latent))
    net.prefix_head.proj.bias.data += 1
    changed_image, changed_prefix = net.with_prefix(latent)
    assert torch.equal(changed_image, image)
    assert not torch.allclose(changed_prefix, prefix)
    with pytest.raises(UserError, match=r"set prefix_head=True"):
        decoder().with_prefix(latent)


def test_every_parameter_and_the_last_layer_learn():
    net = decoder(prefix_head=True)
    sum(image.square().sum() for image in net.with_prefix(torch.randn(2, 4, 1, 9))).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert net.last_layer is net.head.proj.weight


@pytest.mark.parametrize("num_buffer", [0, 1, 4])
def test_stage_1_carries_over_to_stage_2(num_buffer):
    first = decoder(causal=True, prefix_head=True)
    second = decoder(seed=1, num_buffer=num_buffer)
    own = {name: value.clone() for name, value in second.state_dict().items()}
    second.load_state_dict(second.carried_over(first.state_dict()))
    kept = {"buffer_tokens", "positions"} if num_buffer != 1 else set()
    for name, value in second.state_dict().items():
        assert torch.equal(value, own[name] if name in kept else first.state_dict()[name]), name


def test_a_missing_prefix_head_keeps_its_own_values():
    first, second = decoder(), decoder(seed=1, prefix_head=True)
    own = second.prefix_head.proj.weight.clone()
    second.load_state_dict(second.carried_over(first.state_dict()))
    assert torch.equal(second.prefix_head.proj.weight, own)
    assert torch.equal(second.head.proj.weight, first.head.proj.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 32}, "size mismatch"), ({"depth": 1}, "Unexpected key"), ({"depth": 3}, "Missing key")],
)
def test_what_cannot_carry_over_fails_to_load(changes, message):
    second = decoder(**changes)
    with pytest.raises(RuntimeError, match=message):
        second.load_state_dict(second.carried_over(decoder(causal=True).state_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "not divisible"),
        ({"num_prefix": -1}, "num_prefix=-1: give at least 0"),
        ({"num_prefix": 0, "prefix_head": True}, "num_prefix=0: give at least 0, or 1 with prefix_head"),
        ({"num_buffer": -1}, "num_buffer=-1: give at least 0"),
        ({"num_buffer": 0, "causal": True}, "num_buffer=0: give at least 0, or 1 if causal"),
        ({"num_heads": 5}, "multiple of num_heads=5"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        decoder(**changes)


@pytest.mark.parametrize("shape", [(1, 4, 1, 8), (1, 4, 2, 3), (1, 5, 1, 9), (4, 1, 9)])
def test_another_latent_is_refused(shape):
    with pytest.raises(UserError, match=r"needs 4 channels and 3 \+ 2x3 = 9 vectors for images of 16x24 pixels"):
        decoder()(torch.randn(shape))
