import pytest
import torch

from aligntok.errors import UserError
from aligntok.metrics import EncoderFeatures


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
