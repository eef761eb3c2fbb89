"""The contract of the tokenizer: latents in units of their own spread, and a hash of what shapes them."""

import pytest
import torch
from torch import nn

from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, LinearAdapter, QueryEncoder, TokenDecoder, Tokenizer, TokenizerSpec
from aligntok.stages import DecoderRefinement


@pytest.fixture
def tokenizer(tiny):
    return tiny.tokenizer().eval()


def test_spec(tiny):
    assert tiny.tokenizer().spec == TokenizerSpec("continuous", (4, 4, 4), (16, 16), 4)
    assert tiny.tokenizer(image_size=(24, 16)).spec == TokenizerSpec("continuous", (4, 6, 4), (24, 16), 4)


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_shapes_and_range(tiny, size):
    tokenizer = tiny.tokenizer(image_size=size).eval()
    image = torch.rand(2, 3, *size)
    assert tokenizer.encode(image).shape == (2, *tokenizer.spec.latent_shape)
    output = tokenizer(image)
    assert output.shape == image.shape
    wild = tokenizer.decode(100 * tokenizer.encode(image), clamp=False)
    assert wild.min() < 0 or wild.max() > 1
    assert torch.equal(tokenizer.decode(100 * tokenizer.encode(image)), wild.clamp(0, 1))


def test_statistics_do_not_change_the_reconstruction(tokenizer, tiny):
    image = tiny.images()
    latent, before = tokenizer.encode(image), tokenizer(image)
    tokenizer.set_latent_statistics(torch.randn(4), torch.rand(4) * 5 + 0.1)
    assert not torch.allclose(tokenizer.encode(image), latent)
    torch.testing.assert_close(tokenizer(image), before, rtol=1e-4, atol=1e-5)


def test_measured_latents_have_mean_0_and_std_1(tokenizer, tiny):
    image = tiny.images(16)
    raw = tokenizer.encode(image)
    tokenizer.set_latent_statistics(raw.mean((0, 2, 3)), raw.transpose(0, 1).flatten(1).std(1))
    latent = tokenizer.encode(image).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latent.mean(1), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(latent.std(1), torch.ones(4), rtol=1e-5, atol=0)


def test_a_dead_channel_is_named(tokenizer):
    with pytest.raises(UserError, match=r"latent channels \[2\] are constant"):
        tokenizer.set_latent_statistics(torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_not_a_number_is_no_statistic(tokenizer):
    with pytest.raises(UserError, match=r"channels \[1\] are .*not finite"):
        tokenizer.set_latent_statistics(torch.zeros(4), torch.tensor([1.0, float("nan"), 1.0, 1.0]))


def nudge(tensor):
    with torch.no_grad():
        tensor[(0,) * tensor.ndim] += 1e-3


def test_the_fingerprint_is_of_what_shapes_the_latent(tokenizer, tiny):
    first = tokenizer.fingerprint()
    assert first == tokenizer.fingerprint() == tiny.tokenizer().fingerprint()
    nudge(tokenizer.decoder.conv_out.weight)
    assert tokenizer.fingerprint() == first
    seen = {first}
    for tensor in (
        tokenizer.encoder.backbone.blocks[0].mlp.fc1.weight,
        tokenizer.adapter.project.bias,
        tokenizer.latent_mean,
        tokenizer.latent_std,
        tokenizer.encoder.pixel_mean,
        tokenizer.encoder.pixel_std,
    ):
        nudge(tensor)
        assert tokenizer.fingerprint() not in seen
        seen.add(tokenizer.fingerprint())


def test_the_fingerprint_survives_a_file(tokenizer, tiny, tmp_path):
    tokenizer.set_latent_statistics(torch.randn(4), torch.rand(4) + 0.1)
    torch.save(tokenizer.state_dict(), tmp_path / "t.pt")
    other = tiny.tokenizer(seed=5)
    assert other.fingerprint() != tokenizer.fingerprint()
    other.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    assert other.fingerprint() == tokenizer.fingerprint()
    image = tiny.images()
    assert torch.equal(other.eval().encode(image), tokenizer.encode(image))
    assert other.to(memory_format=torch.channels_last).fingerprint() == tokenizer.fingerprint()


def test_parts_that_do_not_fit(tiny):
    encoder = tiny.encoder()
    decoder = ConvDecoder(latent_dim=4, width=8, multipliers=[1, 1, 2], num_blocks=1, num_groups=4)
    with pytest.raises(UserError, match=r"adapter\.latent_dim 6 differs from decoder\.latent_dim 4"):
        Tokenizer(encoder, LinearAdapter(16, 6), decoder)
    shallow = ConvDecoder(latent_dim=4, width=8, multipliers=[1, 2], num_blocks=1, num_groups=4)
    with pytest.raises(UserError, match=r"encoder\.downsampling 4 differs from .*decoder.* 2"):
        Tokenizer(encoder, LinearAdapter(16, 4), shallow)


def test_a_decoder_of_another_sequence_is_refused():
    encoder = QueryEncoder(16, 4, width=16, depth=1, num_heads=2, num_prefix=3)
    decoder = TokenDecoder(4, 16, 4, width=16, depth=1, num_heads=2, num_prefix=0)
    with pytest.raises(UserError, match=r"encoder gives 19 vectors, the decoder takes 16: .* num_prefix"):
        Tokenizer(encoder, LinearAdapter(16, 4), decoder)


def test_an_adapter_of_another_width_is_refused(tiny):
    """A wrong adapter.width must be an error of the user, not a failed convolution at the first batch."""
    decoder = ConvDecoder(latent_dim=4, width=8, multipliers=[1, 1, 2], num_blocks=1, num_groups=4)
    with pytest.raises(UserError, match=r"adapter\.width 32 differs from encoder\.width 16"):
        Tokenizer(tiny.encoder(), LinearAdapter(32, 4), decoder)


def test_measured_statistics_are_numpys(tiny):
    stage = tiny.stage(DecoderRefinement)
    nn.init.constant_(stage.tokenizer.adapter.project.bias, 50.0)  # a mean far from 0: no cancellation
    images = tiny.images(13)
    stage.train()
    stage.measure_latents(images.split(5))
    latent = stage.tokenizer.adapter(stage.tokenizer.encoder(images)).detach().double().numpy()
    mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3), ddof=1)
    torch.testing.assert_close(
        stage.tokenizer.latent_mean.flatten().double(), torch.from_numpy(mean), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(stage.tokenizer.latent_std.flatten().double(), torch.from_numpy(std), rtol=1e-5, atol=0)
    assert stage.training
    assert not stage.tokenizer.encoder.training


def test_no_images_no_statistics(tiny):
    with pytest.raises(UserError, match="no images"):
        tiny.stage(DecoderRefinement).measure_latents([])
