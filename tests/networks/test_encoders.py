"""Any timm backbone as a feature map on the wanted grid."""

import os

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from aligntok.errors import UserError
from aligntok.networks import VisionEncoder
from aligntok.networks.encoders import grid_of, offline_weights

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def build(name="vit_tiny_patch16_224", image_size=32, downsampling=16, weights=None, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("model_args", SMALL)
    return VisionEncoder(name, image_size, downsampling, weights, **options)


def images(height, width, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


# EfficientNet-Lite0: the weights that pip brings


def test_offline_lite0_loads_every_weight():
    state = offline_weights("tf_efficientnet_lite0")
    assert sum("num_batches_tracked" not in key for key in state) == 247
    encoder = VisionEncoder("tf_efficientnet_lite0", 64, 16, weights="offline").eval()
    loaded = encoder.backbone.state_dict()
    assert len(loaded) > 150
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    features = encoder(images(64, 64))
    assert features.shape == (2, 112, 4, 4)
    assert features.isfinite().all()
    assert features.std() > 0.1
    torch.testing.assert_close(
        encoder.pixel_mean.flatten() * 255, torch.full((3,), 127.0)
    )  # (x - 127) / 128 as published
    torch.testing.assert_close(encoder.pixel_std.flatten() * 255, torch.full((3,), 128.0))


def test_offline_lite0_tells_pictures_apart():
    """Trained features see a flat image and a checkerboard far apart; noise of a bit is near."""
    encoder = VisionEncoder("tf_efficientnet_lite0", 64, 16, weights="offline").eval()
    board = (torch.arange(64)[:, None] // 8 + torch.arange(64) // 8).remainder(2).float().expand(1, 3, 64, 64)
    flat = torch.full_like(board, 0.5)
    noisy = (board * 0.98 + 0.01) + (images(64, 64, 1) - 0.5) / 128
    base, near, far = (encoder(x).flatten() for x in (board, noisy, flat))
    assert F.cosine_similarity(base, near, dim=0) > 0.9 > F.cosine_similarity(base, far, dim=0) + 0.1


@pytest.mark.parametrize(("downsampling", "width"), [(2, 16), (4, 24), (8, 40), (16, 112), (32, 320)])
def test_each_stride_of_a_convolutional_backbone(downsampling, width):
    encoder = build("tf_efficientnet_lite0", (64, 96), downsampling, model_args={})
    assert encoder.width == width
    assert encoder.eval()(images(64, 96)).shape == (2, width, 64 // downsampling, 96 // downsampling)


def test_offline_is_for_lite0_only():
    with pytest.raises(UserError, match="offline' exists for tf_efficientnet_lite0 only, not for resnet18"):
        build("resnet18", 64, 16, "offline", model_args={})


# Vision transformers


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_256",
    ],
)
def test_transformers_give_the_grid(name, size):
    """Class and register tokens are no cells, and patch 14 sees the image at 7/8 of its size."""
    encoder = build(name, size)
    grid = (size[0] // 16, size[1] // 16)
    patch = 14 if "14" in name else 16
    assert encoder.input_size == (grid[0] * patch, grid[1] * patch)
    assert encoder.eval()(images(*size)).shape == (2, 16, *grid)
    seen = encoder.preprocess(images(*size))
    assert seen.shape[-2:] == encoder.input_size


def test_dinov2_large_sees_256_pixels_as_224():
    with torch.device("meta"):
        encoder = VisionEncoder("vit_large_patch14_dinov2.lvd142m", 256, 16)
        features = encoder(torch.rand(1, 3, 256, 256))
    assert (encoder.grid, encoder.input_size, encoder.width) == ((16, 16), (224, 224), 1024)
    assert features.shape == (1, 1024, 16, 16)


def test_cells_are_in_reading_order():
    encoder = build(image_size=(48, 32)).eval()
    plain = images(48, 32, 1)
    changed = plain.clone()
    changed[:, :, 16:32, 16:32] += 0.3  # cell (1, 1)
    embedded = [encoder.backbone.patch_embed(encoder.preprocess(x)).flatten(1, -2) for x in (plain, changed)]
    moved = (embedded[0] - embedded[1]).abs().sum(-1).view(3, 2)
    assert moved.nonzero().tolist() == [[1, 1]]


def test_features_are_the_normalised_patch_tokens_of_timm():
    encoder = build("vit_small_patch14_reg4_dinov2").eval()
    image = images(32, 32)
    tokens = encoder.backbone.forward_features(encoder.preprocess(image))
    torch.testing.assert_close(encoder(image).flatten(2).mT, tokens[:, encoder.backbone.num_prefix_tokens :])
    torch.testing.assert_close(encoder.class_token(image), tokens[:, 0])


def test_an_earlier_layer_is_that_layer_of_the_whole_backbone():
    whole, cut = build(model_args={**SMALL, "depth": 3}), build(model_args={**SMALL, "depth": 3}, layer=1)
    assert len(cut.backbone.blocks) == 2
    cut.backbone.load_state_dict(whole.backbone.state_dict(), strict=False)
    image = images(32, 32)
    torch.testing.assert_close(cut.eval()(image), whole.eval().intermediates(image, [1])[0])
    assert build(model_args={**SMALL, "depth": 3}, layer=-2).layer == 1


@pytest.mark.parametrize(
    ("name", "downsampling", "arguments"),
    [
        ("vit_small_patch14_reg4_dinov2", 16, SMALL),
        ("vit_base_patch16_siglip_256", 16, SMALL),
        ("vit_small_patch16_dinov3", 16, {**SMALL, "embed_dim": 32}),
        ("tf_efficientnet_lite0", 16, {}),
        ("convnext_atto", 16, {}),
    ],
)
def test_every_weight_that_stays_is_used(name, downsampling, arguments):
    """Distributed training refuses parameters that no loss reaches."""
    encoder = build(name, 64, downsampling, model_args=arguments).train()
    encoder(images(64, 64)).square().mean().backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None] == []


# Weights


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"layer": 0}),
        ("vit_base_patch16_siglip_256", {}),
        ("tf_efficientnet_lite0", {"model_args": {}}),
    ],
)
def test_a_file_that_an_encoder_wrote_loads_again(tmp_path, name, options, suffix):
    """Also where layers, the pooling or the last norm were cut off before it was written."""
    path = tmp_path / f"encoder.{suffix}"
    ours = build(name, **options).eval()
    state = {key: value.contiguous() for key, value in ours.backbone.state_dict().items()}
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    theirs = build(name, seed=1, weights=str(path), **options).eval()
    image = images(32, 32)
    assert torch.equal(ours(image), theirs(image))


def test_a_whole_file_with_its_classifier_loads(tmp_path):
    import timm

    whole = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **SMALL)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    encoder = build(weights=str(tmp_path / "whole.safetensors"))
    assert torch.equal(encoder.backbone.blocks[1].mlp.fc1.weight, whole.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, change):
    state = dict(build().backbone.state_dict())
    if change == "missing":
        del state["blocks.1.mlp.fc1.weight"]
    elif change == "unknown":
        state["blocks.9.mlp.fc1.weight"] = torch.zeros(1)
    else:
        state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors does not fit vit_tiny_patch16_224: .*blocks\.[19]\.mlp"):
        build(weights=str(tmp_path / "bad.safetensors"))


class Touch:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", ["pth", "bin", "ckpt"])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, suffix):
    path, trace = tmp_path / f"evil.{suffix}", tmp_path / "ran"
    torch.save({**build().backbone.state_dict(), "evil": Touch(str(trace))}, path)
    with pytest.raises(UserError, match="holds no plain weights"):
        build(weights=str(path))
    assert not trace.exists()


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.pth"):
        build(weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="there is no file"):
        build(weights=str(tmp_path))
    (tmp_path / "x.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match=r"x\.safetensors holds no plain weights"):
        build(weights=str(tmp_path / "x.safetensors"))


def test_without_a_hub_the_message_names_the_file(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError,
        match=r"(?s)cannot get the weights of vit_small.*model\.safetensors of timm/vit_small_patch14_dinov2\.lvd142m",
    ):
        VisionEncoder("vit_small_patch14_dinov2.lvd142m", 32, 16)


# What the user gets wrong


def test_unknown_names_get_near_ones():
    with pytest.raises(
        UserError, match=r"'vit_large_patch14_dinov3' is no timm model\. Near names: .*vit_large_patch14_dinov2"
    ):
        build("vit_large_patch14_dinov3")
    with pytest.raises(UserError, match="no timm model"):
        build("vit_large_patch14_dinov2.lvd999m")


@pytest.mark.parametrize(("size", "near"), [(250, r"\(256, 256\)"), ((256, 100), r"\(256, 96\)"), (8, r"\(16, 16\)")])
def test_sizes_that_do_not_divide(size, near):
    with pytest.raises(UserError, match=f"not divisible by the downsampling 16: use e.g. {near}"):
        grid_of(size, 16)


def test_strides_and_layers_that_are_not_there():
    with pytest.raises(UserError, match=r"no feature map 64 times smaller than the image, only \[2, 4, 8, 16, 32\]"):
        build("tf_efficientnet_lite0", 64, 64, model_args={})
    with pytest.raises(UserError, match=r"^layer 2 is out of range: vit_tiny_patch16_224 has 2 layers"):
        build(layer=2)


def test_images_of_another_size():
    with pytest.raises(UserError, match=r"built for images of \(32, 32\) pixels but got \(48, 32\)"):
        build()(images(48, 32))
