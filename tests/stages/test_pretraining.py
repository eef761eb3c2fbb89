"""The classifier that judges samples is the one that was trained, and needs no other file."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aligntok.__main__ import main
from aligntok.errors import UserError
from aligntok.stages import EncoderPretraining, load_classifier, load_features

LAYER = {
    "layers": ["quickstart/encoder.yaml"],
    "model": {"init_args": {"encoder": {"init_args": {"weights": "backbone.safetensors"}}}},
}


def test_a_checkpoint_rebuilds_its_classifier(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    debug = ["--config", "run/debug.yaml"]
    assert main(["fit", "--config", "quickstart/encoder.yaml", *debug, "--output", "first"]) == 0
    (tmp_path / "first/encoder.safetensors").rename("backbone.safetensors")
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(LAYER))
    assert main(["fit", "--config", "more.yaml", *debug, "--output", "second"]) == 0
    (tmp_path / "backbone.safetensors").unlink()
    path = tmp_path / "second/checkpoints/last.ckpt"
    classifier = load_classifier(path)
    assert not classifier.training
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(classifier.state_dict(), state, rtol=0, atol=0)
    backbone = load_file(tmp_path / "second/encoder.safetensors")
    torch.testing.assert_close(dict(classifier.encoder.backbone.state_dict()), backbone, rtol=0, atol=0)
    assert classifier(tiny.images(3, size=32)).shape == (3, 10)
    features, image = load_features(path, "digits"), tiny.images(3, size=32)
    assert (features.name, features.training) == ("digits", False)
    assert torch.equal(features(image), classifier.encoder(image).mean((-2, -1)))
    torch.save({"state_dict": {}, "hyper_parameters": {}, "aligntok_stage": "DecoderRefinement"}, "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt holds no recipe of the encoder \(stage DecoderRefinement\)"):
        load_classifier("other.ckpt")


def test_logits_are_those_of_the_mean_feature(tiny):
    stage = EncoderPretraining(tiny.encoder(), 7)
    image = tiny.images(3)
    expected = stage.encoder(image).flatten(2).mean(2) @ stage.head.weight.T + stage.head.bias
    torch.testing.assert_close(stage(image), expected)


def test_more_classes_than_the_head_has_are_refused_before_the_first_step(tiny, tmp_path):
    with pytest.raises(UserError, match=r"train has 12 classes, but model\.num_classes is 3: change one"):
        tiny.trainer(tmp_path, 1).fit(EncoderPretraining(tiny.encoder(), 3), datamodule=tiny.data())
