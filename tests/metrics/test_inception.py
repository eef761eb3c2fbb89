import pytest
import torch

from aligntok.metrics import GenerationMetrics, InceptionFeatures, inception


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Return the real architecture and all of the loading code, with random weights."""

    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, **kwargs):
            return super().load_state_dict(self.state_dict() | state_dict)

    monkeypatch.setattr(inception, "FeatureExtractorInceptionV3", Untrained)
    torch.manual_seed(0)
    torch.save({"fc.bias": torch.randn(1008)}, tmp_path / "weights.pth")
    return InceptionFeatures(str(tmp_path / "weights.pth"))


def test_all_outputs_of_one_pass(network):
    image = (torch.rand(2, 3, 32, 32) * 255).round() / 255
    features, spatial = network.with_spatial(image)
    assert torch.equal(features, network(image))
    extractor = network.network.network
    extractor.features_list = ["2048", "logits_unbiased", "logits"]
    blocks = []
    extractor.Mixed_6d.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    pool, unbiased, logits = extractor((image * 255).byte())
    assert torch.equal(features, pool)
    torch.testing.assert_close(network.logits(features).float(), unbiased)
    assert not torch.allclose(unbiased, logits)
    # rows of a TensorFlow map (B, 17, 17, C): its first seven channels, which are those of the whole block too
    expected = blocks[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert spatial.shape == (2, 2023) == (2, network.num_spatial)
    assert torch.equal(spatial, expected)
    assert spatial.min() == 0 < spatial.max()  # after the ReLU


def test_fid_alone_makes_nothing_else(network):
    passes = []
    network.with_spatial(torch.rand(1, 3, 16, 16))
    branch = network.network.network.Mixed_6d.branch1x1
    assert not branch._forward_hooks
    network.network.network.fc.register_forward_hook(lambda *args: passes.append("fc"))
    GenerationMetrics(network).update(torch.rand(1, 3, 16, 16), real=True)
    assert not passes


def test_fid_and_sfid_of_one_pass(network):
    metrics = GenerationMetrics(network, sfid=True)
    for real in (True, False):
        metrics.update(torch.rand(2, 3, 16, 16), real=real)
    assert metrics.names == ["fid", "sfid"]
    assert [len(sums.products) for sums in metrics.sums] == [2049, 2024]
