import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.transforms.v2 import functional

from aligntok.errors import UserError
from aligntok.losses import LPIPS, FeatureDistance, LogitDistance, perceptual
from aligntok.losses.perceptual import CONVNEXT_URL, VGG16_URL
from aligntok.networks.frozen import load_frozen

VGG16_FILE, CONVNEXT_FILE = Path(VGG16_URL).name, Path(CONVNEXT_URL).name


def offline(*_, **__):
    raise urllib.error.URLError("no network")


@pytest.fixture
def judge(tiny):
    return FeatureDistance(tiny.encoder(depth=2), layers=[0, 1])


def test_zero_for_the_same_image_and_more_for_another(judge, tiny):
    image, noise = tiny.images(4), torch.randn(4, 3, 16, 16)
    assert float(judge(image, image)) == 0
    near, far = (float(judge(image + amount * noise, image)) for amount in (0.01, 0.3))
    assert 0 < near < far <= 4


def test_it_is_the_mean_over_layers_and_cells_of_unit_vectors(judge, tiny):
    image, other = tiny.images(2), tiny.images(2, seed=1)
    distances = []
    for a, b in zip(*(judge.judge.network.intermediates(x, [0, 1]) for x in (image, other)), strict=True):
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
        distances.append((2 - 2 * (a * b).sum(1)).mean())  # |a - b|^2 of unit vectors
    torch.testing.assert_close(judge(image, other), torch.stack(distances).mean(), rtol=1e-4, atol=1e-6)


def test_the_gradient_goes_to_the_image_only(judge, tiny):
    image, reference = tiny.images(2).requires_grad_(), tiny.images(2, seed=1).requires_grad_()
    judge(image, reference).backward()
    assert image.grad.abs().sum() > 0
    assert reference.grad is None
    assert all(p.grad is None for p in judge.parameters())
    assert judge.state_dict() == {}


@pytest.mark.parametrize("layers", [[2], [-1]])
def test_layers_that_are_not_there(tiny, layers):
    with pytest.raises(UserError, match=r"^layers .* has layers 0 to 1"):
        FeatureDistance(tiny.encoder(depth=2), layers=layers)


def test_images_of_another_size_are_resized_to_the_encoders(judge, tiny):
    image, other = tiny.images(2, size=24), tiny.images(2, seed=1, size=24)
    small = [torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True) for x in (image, other)]
    torch.testing.assert_close(judge(image, other), judge(*small))
    assert float(judge(image, other)) > 0


def test_the_references_features_serve_several_comparisons(judge, tiny):
    reference, one, two = (tiny.images(2, seed=seed) for seed in range(3))
    expected = [judge(one, reference), judge(two, reference)]
    theirs = judge.features(reference)
    assert torch.equal(judge.compare(judge.features(one), theirs), expected[0])
    assert torch.equal(judge.compare(judge.features(two), theirs), expected[1])


def test_lpips_without_its_weights_says_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ALIGNTOK_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=rf"{VGG16_FILE} and cannot download it .*: put the file into .*ALIGNTOK_HOME"):
        load_frozen(LPIPS())


def test_lpips_with_a_local_file(monkeypatch, tmp_path, tiny):
    """Random features are enough to see that all of them are loaded, and where the gradient goes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in torchvision.models.vgg16().state_dict().items() if k.startswith("features")}
    state = {
        k: torch.randn(s) * (2 / s[1:].numel()) ** 0.5 if len(s) > 1 else torch.zeros(s) for k, s in shapes.items()
    }
    torch.save(state, tmp_path / VGG16_FILE)
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    lpips = LPIPS()
    image = tiny.images(2, size=32)
    other = (image + 0.1 * torch.randn_like(image)).requires_grad_()
    assert float(lpips(image, image)) == 0
    lpips(other, image).backward()
    assert float(lpips(other, image).detach()) > 0
    assert other.grad.abs().sum() > 0
    assert lpips.state_dict() == {}
    assert list(lpips.parameters()) == []
    network = lpips.network.network
    assert not network.training
    weights = {tuple(p.shape): p for p in network[0].parameters()}
    assert torch.equal(weights[(64, 3, 3, 3)], state["features.0.weight"])
    assert len(list(network[0].parameters())) == len(state) == 26


def test_lpips_is_torchmetrics_lpips(judge_weights, tiny):
    from torchmetrics.functional.image.lpips import _LPIPS  # what the public function calls, which wants a download

    lpips, image, other = LPIPS(), tiny.images(2, size=40), tiny.images(2, seed=1, size=40)
    theirs = _LPIPS(net="vgg", pnet_rand=True)
    load_frozen(lpips)
    for parameter, value in zip(theirs.net.parameters(), lpips.network.network[0].parameters(), strict=True):
        parameter.data = value.data
    expected = theirs(image, other, normalize=True).mean()
    torch.testing.assert_close(lpips(image, other), expected, rtol=1e-5, atol=1e-7)
    assert float(expected) > 1e-3


@pytest.fixture
def small_convnext(monkeypatch, tmp_path):
    """A ConvNeXt of 40,000 weights where torchvision's would be: its builder and its file."""
    torch.manual_seed(0)
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    network = ConvNeXt(blocks, num_classes=10).eval()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    monkeypatch.setattr(perceptual, "convnext_small", lambda weights=None: ConvNeXt(blocks, num_classes=10))
    torch.save(network.state_dict(), tmp_path / CONVNEXT_FILE)
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    return network


def test_logit_distance_is_the_mean_square_between_torchvisions_logits(small_convnext, tiny):
    distance = LogitDistance(image_size=24)
    image, other = tiny.images(2, size=40).requires_grad_(), tiny.images(2, seed=1, size=40).requires_grad_()

    def logits(x):
        resized = functional.resize(x, [24, 24], functional.InterpolationMode.BILINEAR, antialias=True)
        return small_convnext(functional.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    value = distance(image, other)
    torch.testing.assert_close(value, (logits(image) - logits(other)).square().mean(), rtol=1e-4, atol=1e-6)
    assert value.item() > 1e-3
    value.backward()
    assert image.grad.abs().sum() > 0
    assert other.grad is None
    assert distance.state_dict() == {}
    assert list(distance.parameters()) == []
    assert not distance.network.network.training


def test_logit_distance_is_of_torchvisions_convnext_small(monkeypatch, tmp_path):
    """Its weights' names and shapes, with numbers that cost nothing."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.convnext_small().state_dict().items()}
    torch.save({name: torch.ones(()).expand(shape) for name, shape in shapes.items()}, tmp_path / CONVNEXT_FILE)
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    distance = LogitDistance()
    assert distance.image_size == 224
    load_frozen(distance)
    assert sum(p.numel() for p in distance.network.network.parameters()) == 50_223_688
    assert all(bool((p == 1).all()) for p in distance.network.network.parameters())


def test_logit_distance_without_its_weights_says_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ALIGNTOK_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=rf"LogitDistance needs {CONVNEXT_FILE}.*ALIGNTOK_HOME"):
        load_frozen(LogitDistance())
