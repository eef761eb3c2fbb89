import math

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks.transformer_decoder import TransformerDecoder, sincos_positions

SMALL = {"latent_dim": 4, "image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 2}


def small_decoder(seed=0, **changes):
    torch.manual_seed(seed)
    return TransformerDecoder(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("width", "depth", "num_heads", "mlp_ratio", "millions"),
    [(768, 12, 12, 4.0, 86.4), (1024, 24, 16, 4.0, 304), (1152, 28, 16, 3.5556, 415.4)],
)
def test_rae_sizes(width, depth, num_heads, mlp_ratio, millions):
    with torch.device("meta"):
        decoder = TransformerDecoder(768, 256, 16, width, depth, num_heads, mlp_ratio)
    count = sum(p.numel() for p in decoder.parameters())
    hidden = round(width * mlp_ratio)
    block = 4 * width * (width + 1) + 2 * width * hidden + hidden + width + 4 * width
    assert count == 769 * width + depth * block + 2 * width + (width + 1) * 768
    published = count + 258 * width  # RAE counts a class token and the fixed table of 257 positions too
    assert published / 1e6 == pytest.approx(millions, abs=0.4)


@pytest.mark.parametrize("image_size", [16, (16, 16), (8, 20)])
def test_two_sizes_one_not_square(image_size):
    decoder = small_decoder(image_size=image_size)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    image = decoder(torch.randn(2, 4, height // 4, width // 4))
    assert image.shape == (2, 3, height, width)
    assert decoder.downsampling == 4
    assert decoder.latent_dim == 4


def test_patch_lies_where_its_latent_is():
    """Without blocks a latent position reaches only its own patch."""
    decoder = small_decoder(image_size=(8, 20))
    decoder.blocks = torch.nn.ModuleList()
    latent = torch.randn(1, 4, 2, 5)
    changed = latent.clone()
    changed[:, :, 1, 3] += 1
    touched = (decoder(latent) != decoder(changed))[0].any(dim=0)
    expected = torch.zeros(8, 20, dtype=torch.bool)
    expected[4:8, 12:16] = True
    assert torch.equal(touched, expected)


def test_pixels_within_a_patch():
    """A head that gives each output its own index writes them row by row, colour last."""
    decoder = small_decoder(image_size=4)
    torch.nn.init.zeros_(decoder.head.weight)
    decoder.head.bias.data = torch.arange(48.0)
    image = decoder(torch.randn(1, 4, 1, 1)) * 2 - 1
    torch.testing.assert_close(image[0], torch.arange(48.0).reshape(4, 4, 3).permute(2, 0, 1))


def test_positions():
    table = sincos_positions(3, 5, 8)
    assert table.shape == (15, 8)
    row, column = 2, 4
    frequencies = (1.0, 1 / 100)  # 10000^(-k/2)
    expected = [wave(x * f) for x in (column, row) for wave in (math.sin, math.cos) for f in frequencies]
    torch.testing.assert_close(table[row * 5 + column], torch.tensor(expected))
    assert len(torch.unique(table, dim=0)) == 15  # every position differs
    decoder = small_decoder()
    assert "positions" not in decoder.state_dict()
    assert dict(decoder.named_buffers())["positions"].shape == (16, 24)


def test_last_layer_is_last():
    decoder = small_decoder()
    latent = torch.randn(2, 4, 4, 4)
    (gradient,) = torch.autograd.grad(decoder(latent).square().sum(), decoder.last_layer)
    assert gradient.abs().min() > 0
    step = torch.randn_like(decoder.last_layer)
    with torch.no_grad():
        images = [decoder(latent)]
        for _ in range(2):
            decoder.last_layer.add_(step)
            images.append(decoder(latent))
    assert not torch.allclose(images[0], images[1])
    torch.testing.assert_close(images[2] - images[1], images[1] - images[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, r"image_size \(18, 18\) is not divisible by the downsampling 4"),
        ({"image_size": (16, 18)}, r"image_size \(16, 18\)"),
        ({"image_size": 0}, "image_size=0"),
        ({"width": 26}, "width=26"),
        ({"width": 20, "num_heads": 3}, "num_heads=3"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": 0}, "downsampling=0"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        small_decoder(**changes)


@pytest.mark.parametrize("shape", [(1, 4, 5, 4), (1, 5, 4, 4), (4, 4, 4)])
def test_wrong_latent(shape):
    with pytest.raises(UserError, match=r"the decoder needs \(B, 4, 4, 4\), for images of 16x16 pixels"):
        small_decoder()(torch.randn(shape))
