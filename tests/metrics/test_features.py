import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from aligntok.errors import UserError
from aligntok.metrics import EncoderFeatures, TimmFeatures
from aligntok.networks.frozen import load_frozen


def test_mean_of_the_grid_or_class_token(tiny):
    encoder, image = tiny.encoder().eval(), tiny.images(2)
    mean, token = EncoderFeatures(encoder), EncoderFeatures(encoder, pool="class")
    assert (mean.name, token.name) == ("vit_tiny_patch16_224", "vit_tiny_patch16_224_class")  # two that differ
    torch.testing.assert_close(mean(image), encoder(image).flatten(2).mean(2))
    torch.testing.assert_close(token(image), encoder.class_token(image))
    assert token(image).shape == (2, token.num_features)


def test_class_token_of_an_encoder_without_one(tiny):
    encoder = tiny.encoder(class_token=False, global_pool="avg")
    with pytest.raises(UserError, match="no class token"):
        EncoderFeatures(encoder, pool="class")(tiny.images(2))


def test_images_of_another_size_are_resized_to_the_encoders(tiny):
    encoder = tiny.encoder(2)
    image = torch.nn.functional.interpolate(tiny.images(2), scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(EncoderFeatures(encoder)(image), encoder(encoder.resized(image)).mean((-2, -1)))


# One vector of any timm model

SIGLIP = {"embed_dim": 32, "depth": 1, "num_heads": 2}
MODELS = {"test_vit": {}, "test_convnext": {}, "vit_base_patch16_siglip_224": SIGLIP}


def as_fd_loss(network, image, size):
    """The features of arXiv:2604.28190, written from the description of its code."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    x = network.forward_features((image - mean) / std)
    if x.ndim == 4:
        return x.mean((2, 3))
    return x[:, 0] if network.num_prefix_tokens else network.attn_pool(x)


@pytest.mark.parametrize("model", MODELS)
def test_one_vector_of_a_model_is_fd_losss(model, tmp_path, monkeypatch):
    torch.manual_seed(0)
    dynamic = {} if model == "test_convnext" else {"dynamic_img_size": True, "dynamic_img_pad": True}
    network = timm.create_model(model, num_classes=0, **MODELS[model], **dynamic).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / f"{model}.safetensors"
    )
    features = TimmFeatures(model, image_size=40, model_args=MODELS[model])  # 40 is no multiple of 16: 48 with zeros
    image = torch.rand(2, 3, 70, 60)
    with torch.no_grad():
        expected = as_fd_loss(network, image, (40, 40))
        found = features(image)
    assert expected.std(0).min() > 0
    assert found.shape == (2, features.num_features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not features.state_dict()
    assert not list(features.parameters())


def test_timm_models_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match=r"no timm model.* test_vit"):
        TimmFeatures("test_vitt")
    with pytest.raises(UserError, match="image_size=0"):
        TimmFeatures("test_vit", 0)
    assert TimmFeatures("test_vit.r160_in1k", weights=None).image_size == 160
    features = TimmFeatures("test_vit", 32, weights=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="there is no file"):
        load_frozen(features)
    torch.save({"norm.weight": torch.ones(64)}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"none.pth does not fit test_vit: .*Missing key"):
        load_frozen(features)
