"""Latent diffusion's encoder: sizes, geometry, what it gives to the rest of a tokenizer."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, ConvEncoder, Tokenizer
from aligntok.networks.adapters import GaussianAdapter


def small(**options):
    torch.manual_seed(0)
    sizes = {"latent_dim": 4, "width": 8, "multipliers": (1, 2, 2), "num_blocks": 1, "num_groups": 4}
    return ConvEncoder(**{**sizes, **options}).eval()


def test_vavae_has_the_published_number_of_parameters():
    with torch.device("meta"):
        encoder = ConvEncoder(32, 128, (1, 1, 2, 2, 4), num_blocks=2)
    assert sum(p.numel() for p in encoder.parameters()) == 28_413_248
    assert (encoder.width, encoder.downsampling, encoder.image_size) == (64, 16, (256, 256))


def test_output_is_a_grid_of_mean_and_log_variance_also_where_it_is_not_square():
    assert small()(torch.rand(2, 3, 16, 24)).shape == (2, 8, 4, 6)


def test_padding_is_below_and_right_only():
    """The first output of a strided convolution begins at the first pixel; with symmetric padding it would not."""
    encoder = small(multipliers=(1, 1))
    conv = encoder.down[0].downsample
    x = torch.randn(1, 8, 6, 6)
    expected = torch.einsum("ochw,chw->o", conv.conv.weight, x[0, :, :3, :3]) + conv.conv.bias
    torch.testing.assert_close(conv(x)[0, :, 0, 0], expected)
    assert conv(x).shape[-2:] == (3, 3)


def test_the_layers_see_images_between_minus_one_and_one():
    encoder = small()
    seen = []
    encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    assert seen[0].amax((0, 2, 3)).tolist() == [-1.0, 0.0, 1.0]


def test_it_makes_a_tokenizer_with_the_other_parts():
    decoder = ConvDecoder(4, width=8, multipliers=(1, 2, 2), num_blocks=2, num_groups=4)
    tokenizer = Tokenizer(small(image_size=(16, 24)), GaussianAdapter(8, 4), decoder)
    assert tokenizer.spec.latent_shape == (4, 4, 6)
    assert tokenizer(torch.rand(1, 3, 16, 24)).shape == (1, 3, 16, 24)


def test_groups_that_do_not_divide_a_width_are_named():
    with pytest.raises(UserError, match="num_groups=5 does not divide the width 8"):
        small(num_groups=5)
