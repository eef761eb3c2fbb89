"""VA-VAE's checkpoint becomes a tokenizer: every key is used, nothing else is accepted."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, ConvEncoder, Tokenizer
from aligntok.networks.adapters import GaussianAdapter
from aligntok.weights import load_vavae, vavae
from aligntok.weights.vavae import vavae_state


@pytest.fixture
def small(monkeypatch):
    """The same architecture with narrow levels: the file is small."""
    monkeypatch.setattr(vavae, "WIDTH", 32)


@pytest.fixture
def official(small):
    """A state dict under the official names, with what only training needs."""
    torch.manual_seed(0)
    encoder = ConvEncoder(32, 32, (1, 1, 2, 2, 4), num_blocks=2)
    decoder = ConvDecoder(32, 32, (1, 1, 2, 2, 4), num_blocks=3)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    for key, value in decoder.state_dict().items():
        state[key if key.startswith("post_quant_conv") else f"decoder.{key}"] = value
    quant = torch.nn.Conv2d(64, 64, 1)
    state |= {f"quant_conv.{key}": value for key, value in quant.state_dict().items()}
    return state, encoder, decoder, quant


def test_encode_is_the_normalised_mean_and_decode_its_inverse_scale(official, tmp_path):
    state, encoder, decoder, quant = official
    mean, std = torch.randn(1, 32, 1, 1), torch.rand(1, 32, 1, 1) + 0.5
    training = {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.zeros(8, 32, 1, 1)}
    torch.save({"state_dict": state | training}, tmp_path / "vavae.ckpt")
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    tokenizer = load_vavae(tmp_path / "vavae.ckpt", tmp_path / "latents_stats.pt", image_size=32)
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        moments = quant(encoder(image))
        latent = tokenizer.encode(image)
        torch.testing.assert_close(latent, (moments[:, :32] - mean) / std)
        torch.testing.assert_close(tokenizer.decode(latent, clamp=False), decoder(moments[:, :32]))
    assert tokenizer.spec.latent_shape == (32, 2, 2)


def test_the_published_sizes_are_those_of_the_facts():
    with torch.device("meta"):
        encoder = ConvEncoder(32, vavae.WIDTH, vavae.MULTIPLIERS, num_blocks=2)
        decoder = ConvDecoder(32, vavae.WIDTH, vavae.MULTIPLIERS, num_blocks=3)
        tokenizer = Tokenizer(encoder, GaussianAdapter(64, 32), decoder)
    assert sum(p.numel() for p in tokenizer.parameters()) == 69_836_067


def test_quant_conv_becomes_mean_and_log_variance():
    state = vavae_state({"quant_conv.bias": torch.arange(64.0)})
    assert state["adapter.project.bias"].tolist() == list(range(32))
    assert state["adapter.project_log_variance.bias"].tolist() == list(range(32, 64))


@pytest.mark.parametrize("wrong", ["missing", "unknown", "no_statistics"])
def test_another_file_is_refused(wrong, official, tmp_path):
    state = dict(official[0])
    if wrong == "missing":
        del state["decoder.conv_out.bias"]
    elif wrong == "unknown":
        state["decoder.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "vavae.pt")
    torch.save({"mean": torch.zeros(32)}, tmp_path / "stats.pt")
    with pytest.raises(
        UserError, match={"missing": "conv_out.bias", "unknown": "extra", "no_statistics": "std"}[wrong]
    ):
        load_vavae(tmp_path / "vavae.pt", tmp_path / "stats.pt")
