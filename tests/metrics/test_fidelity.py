"""torch-fidelity's CLIP and DINOv2 at random weights: our features are those of its own extractors."""

import pytest
import timm
import torch
import torch_fidelity.feature_extractor_clip as theirs_clip
from torch import nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.metrics import FidelityFeatures, fidelity
from aligntok.networks.frozen import load_frozen

IMAGE = (torch.rand(2, 3, 40, 28, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


class Whole(nn.Module):
    """CLIP's visual network and the entry of the text's that tells the width."""

    def __init__(self, layers):
        super().__init__()
        self.visual = theirs_clip.CLIPVisual(24, 32, layers, 64, 16).visual
        self.text_projection = nn.Parameter(torch.randn(64, 24))

    def forward(self, image):
        return self.visual(image) + 0 * self.text_projection[0]


@pytest.fixture(params=[2, pytest.param((1, 1, 1, 1), marks=pytest.mark.slow)], ids=["vit", "resnet"])
def clip(request, tmp_path):
    """A small CLIP as OpenAI publishes it, TorchScript."""
    torch.manual_seed(0)
    whole = Whole(request.param).eval()
    path = tmp_path / "clip.pt"
    torch.jit.trace(whole, torch.rand(1, 3, 32, 32)).save(path)
    return path, whole


def test_clip_is_torch_fidelitys(clip, tmp_path, monkeypatch):
    path, whole = clip
    theirs = theirs_clip.FeatureExtractorCLIP("clip-vit-b-16", ["clip"], str(path))
    expected = theirs((IMAGE * 255).round().byte())[0]
    assert expected.std() > 0.01
    with pytest.raises(UserError, match=r"clip.pt holds no plain weights"):  # a stranger's TorchScript
        FidelityFeatures("clip-vit-b-16", str(path))(IMAGE)
    torch.save(whole.state_dict(), tmp_path / "plain.pth")
    assert torch.equal(FidelityFeatures("clip-vit-b-16", str(tmp_path / "plain.pth"))(IMAGE), expected)
    monkeypatch.setitem(fidelity.MODEL_METADATA["clip-vit-b-16"], "hash", hash_file(path))
    assert torch.equal(FidelityFeatures("clip-vit-b-16", str(path))(IMAGE), expected)


class Dino(nn.Module):
    """DINOv2's forward pass over timm's blocks: positions are resized in each pass, as its repository does."""

    def __init__(self, network, positions):
        super().__init__()
        self.network, self.positions = network, positions

    def forward(self, image):
        x = self.network.patch_embed.proj(image).flatten(2).mT
        x = torch.cat([self.network.cls_token.expand(len(x), -1, -1), x], dim=1)
        side = 37
        scale = (16 + 0.1) / side
        grid = self.positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic").permute(0, 2, 3, 1)
        x = x + torch.cat([self.positions[:, :1], grid.reshape(1, 256, -1)], dim=1)
        return self.network.norm(self.network.blocks(x))[:, 0]


def test_dinov2_is_torch_fidelitys(tmp_path, monkeypatch):
    torch.manual_seed(0)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options, depth=1))
    network = create("vit_small_patch14_dinov2", img_size=518, num_classes=0, depth=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)  # timm's scales of the layers, 1e-5, would hide all patches
    state = network.state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dino.pth")
    reference = Dino(network.eval(), state["pos_embed"])
    monkeypatch.setattr(torch.hub, "load", lambda *args: reference)  # theirs has no other way than the network
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    expected = theirs((IMAGE * 255).round().byte())[0]
    features = FidelityFeatures("dinov2-vit-s-14", str(tmp_path / "dino.pth"))
    assert expected.shape == (2, features.num_features)
    torch.testing.assert_close(features(IMAGE), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip-rn50", "clip-vit-l-14-336px", "dinov2-vit-g-14"])
def test_weights_are_looked_for_and_downloaded_by_their_published_names(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url, path, digits, progress):
        asked.append((url.rsplit("/", 1)[-1], path.rsplit("/", 1)[-1], digits))
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=rf"features {name} needs .*no route.*ALIGNTOK_HOME") as caught:
        load_frozen(FidelityFeatures(name))
    assert "\n" not in str(caught.value)
    if name[0] == "c":
        digits = fidelity.MODEL_METADATA[name]["hash"]
        assert asked[0][1:] == (f"{name}-{digits}.pt", digits)  # the name in torch-fidelity's cache
    else:
        assert asked == [("dinov2_vitg14_pretrain.pth", "dinov2_vitg14_pretrain.pth", None)]
        torch.save({"x": torch.zeros(2)}, tmp_path / "dinov2_vitg14_pretrain.pth")
        with pytest.raises(UserError, match=r"pretrain.pth does not hold the weights of dinov2-vit-g-14 \(KeyError"):
            load_frozen(FidelityFeatures(name))


def test_names_and_widths_are_torch_fidelitys():
    assert fidelity.CLIP.keys() == theirs_clip.MODEL_URLS.keys()
    with pytest.raises(UserError, match="no features 'clip': use one of clip-rn50, "):
        FidelityFeatures("clip")
