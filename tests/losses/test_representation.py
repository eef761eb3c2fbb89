"""REPA's term: the cosine of tokens and features, cell by cell."""

import pytest
import torch
from torch import nn

from aligntok.errors import UserError
from aligntok.losses import RepresentationAlignment


def tokens_of(encoder, image):
    return encoder(image).flatten(2).transpose(1, 2)


def test_identical_features_give_minus_one(tiny):
    image = tiny.images()
    alignment = RepresentationAlignment(tiny.encoder(), 16, block=1)
    alignment.project = nn.Identity()
    tokens = tokens_of(tiny.encoder(), image)
    torch.testing.assert_close(alignment(tokens, image), torch.tensor(-1.0))
    torch.testing.assert_close(alignment(-3 * tokens, image), torch.tensor(1.0))
    by_column = tokens.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert alignment(by_column, image) > -0.999
    assert alignment(tokens.flip(0), image) > -0.999


def test_the_projector_learns_and_the_encoder_does_not(tiny):
    image = tiny.images()
    torch.manual_seed(0)
    alignment = RepresentationAlignment(tiny.encoder(), 16, hidden_width=32, block=1).train()
    encoder = alignment.encoder.network
    before = tiny.copies(encoder)
    tokens = torch.randn(8, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam(alignment.parameters(), 1e-2)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = alignment(tokens, image)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.3
    assert tokens.grad.abs().max() > 0
    assert all(torch.equal(value, before[name]) for name, value in tiny.copies(encoder).items())
    assert not encoder.training
    assert {key.split(".")[0] for key in alignment.state_dict()} == {"project"}


def test_the_projector_is_that_of_the_paper(tiny):
    alignment = RepresentationAlignment(tiny.encoder(), 24)
    assert (alignment.block, alignment.weight) == (8, 0.5)
    shapes = [tuple(layer.weight.shape) for layer in alignment.project if isinstance(layer, nn.Linear)]
    assert shapes == [(2048, 24), (2048, 2048), (16, 2048)]


def test_another_grid_is_named(tiny):
    alignment = RepresentationAlignment(tiny.encoder(), 16, block=1)
    with pytest.raises(UserError, match=r"gives 16 cells \(4x4\), the generator has 4 tokens.*image_size or"):
        alignment(torch.zeros(2, 4, 16), tiny.images(2))


def test_a_grid_of_as_many_cells_but_another_aspect_is_named(tiny):
    size = tiny.images().shape[-1]
    alignment = RepresentationAlignment(tiny.encoder(), 16, block=1)
    with pytest.raises(UserError, match=rf"\(4x4\), the generator has 16 tokens of images of {size // 2}x{2 * size}"):
        alignment(torch.zeros(2, 16, 16), torch.rand(2, 3, size // 2, 2 * size))


def test_images_of_another_size_are_resized_to_the_encoders(tiny):
    image = torch.nn.functional.interpolate(tiny.images(2), scale_factor=2.0, mode="nearest")
    encoder = tiny.encoder()
    alignment = RepresentationAlignment(encoder, 16, block=1)
    alignment.project = nn.Identity()
    torch.testing.assert_close(alignment(tokens_of(encoder, encoder.resized(image)), image), torch.tensor(-1.0))


def test_the_term_is_computed_in_fp32_under_autocast(tiny):
    alignment = RepresentationAlignment(tiny.encoder(), 16, hidden_width=8, block=1)
    tokens, image = torch.randn(2, 16, 16), tiny.images(2)
    with torch.autocast("cpu", torch.bfloat16):
        value = alignment(tokens, image)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, alignment(tokens, image), rtol=0.05, atol=0.02)
