"""The query encoder: sizes, what sees what in its causal form, a backbone in front."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import QueryEncoder
from aligntok.networks.query_encoder import causal_mask

SIZES = {"image_size": (16, 24), "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2, "num_prefix": 3}


def encoder(**changes):
    torch.manual_seed(0)
    net = QueryEncoder(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in net.parameters():  # at the small initial weights tokens hardly see each other
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize(("size", "num_prefix", "length"), [(16, 3, 7), ((16, 24), 0, 6), ((24, 8), 1, 4)])
def test_shapes(size, num_prefix, length):
    net = encoder(image_size=size, num_prefix=num_prefix)
    assert net.grid == (1, length)
    assert net(torch.rand(2, 3, *net.image_size)).shape == (2, 16, 1, length)
    assert (net.width, net.downsampling, net.num_prefix) == (16, 8, num_prefix)


def dependencies(net):
    """Return which patch (columns) each output (rows) depends on, and which query."""
    image = torch.rand(1, 3, 16, 24, requires_grad=True)
    features = net(image)[0, :, 0]
    patches, queries = [], []
    for output in features.T:
        by_image, by_query = torch.autograd.grad((output**2).sum(), (image, net.queries), retain_graph=True)
        patches.append(by_image.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((0, 1, 4, 5)).flatten() > 0)
        queries.append(by_query.abs().amax(1) > 0)
    return torch.stack(patches), torch.stack(queries)


def test_bidirectional_sees_everything():
    patches, queries = dependencies(encoder())
    assert patches.all()
    assert queries.all()


def test_causal_sees_patches_up_to_its_own_and_earlier_tokens():
    patches, queries = dependencies(encoder(causal=True, num_prefix=0))
    assert torch.equal(patches, torch.ones(6, 6).tril().bool())
    assert torch.equal(queries, torch.ones(6, 6).tril().bool())


def test_the_causal_prefix_stands_for_the_first_row():
    """One more than the row has patches: the first patch, then the row, as in AliTok's 17 and 16."""
    patches, queries = dependencies(encoder(causal=True, num_prefix=4))
    assert patches[:4].sum(1).tolist() == [1, 1, 2, 3]
    assert patches[4:].sum(1).tolist() == [3, 3, 3, 4, 5, 6]  # the first row comes through the prefix
    assert torch.equal(queries, torch.ones(10, 10).tril().bool())
    assert causal_mask(2, 3, 2)[6:8, :6].sum(1).tolist() == [1, 2]


def test_a_backbone_takes_the_place_of_the_patches(tiny):
    backbone = tiny.encoder(image_size=(16, 24), downsampling=4)
    net = encoder(patch_size=4, backbone=backbone)
    weights = tiny.copies(backbone)
    features, image = [], torch.rand(2, 3, 16, 24)
    backbone.register_forward_hook(lambda module, inputs, output: features.append(output))
    output = net(image)
    assert output.shape == (2, 16, 1, 27)
    output.sum().backward()
    assert backbone.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    backbone.forward = lambda image: features[0].roll(1, 0)
    assert not torch.allclose(net(image), output)
    fresh = tiny.encoder(image_size=(16, 24), downsampling=4)
    torch.manual_seed(1)
    QueryEncoder(**{**SIZES, "patch_size": 4, "backbone": fresh})
    assert all(value.shape == weights[name].shape for name, value in tiny.copies(fresh).items())
    for name, value in tiny.copies(tiny.encoder(image_size=(16, 24), downsampling=4)).items():
        assert torch.equal(value, tiny.copies(fresh)[name]), name  # its weights are not drawn again


def test_initial_weights():
    net = QueryEncoder(**{**SIZES, "width": 128})
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            assert 0.015 < parameter.std() < 0.025, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in name and name.endswith("weight"))), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (16, 20)}, r"image_size \(16, 20\) is not divisible by the downsampling 8"),
        ({"num_prefix": -1}, "num_prefix=-1: give at least 0"),
        ({"depth": 0}, "depth=0"),
        ({"num_heads": 3}, "width=16: give a multiple of num_heads=3"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        encoder(**changes)


def test_a_backbone_that_does_not_fit(tiny):
    with pytest.raises(UserError, match=r"backbone takes images of \(16, 16\)"):
        encoder(backbone=tiny.encoder(), patch_size=4)
    with pytest.raises(UserError, match=r"grid of \(4, 6\)"):
        encoder(backbone=tiny.encoder(image_size=(16, 24)))
    with pytest.raises(UserError, match="backbone null"):
        encoder(backbone=tiny.encoder(image_size=(16, 24)), patch_size=4, causal=True)


def test_another_image_size_is_refused():
    with pytest.raises(UserError, match=r"built for images of \(16, 24\) pixels but got \(24, 16\)"):
        encoder()(torch.rand(1, 3, 24, 16))


def test_queries_from_patches_know_their_patch_without_attention():
    for from_patches in (False, True):
        net = encoder(from_patches=from_patches)
        with torch.no_grad():
            for block in net.transformer.blocks:
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.zero_()
        patches, _ = dependencies(net)
        own = torch.cat((torch.zeros(3, 6), from_patches * torch.eye(6)))  # the prefix has none
        assert torch.equal(patches, own.bool())


def test_causal_stays_causal_with_queries_from_patches():
    patches, _ = dependencies(encoder(causal=True, num_prefix=0, from_patches=True))
    assert torch.equal(patches, torch.ones(6, 6).tril().bool())
