import json
from pathlib import Path

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks.conv import ConvDecoder, NormSiLU

VAVAE_F16D32 = {"latent_dim": 32, "width": 128, "multipliers": (1, 1, 2, 2, 4), "num_blocks": 3}
SMALL = {"latent_dim": 4, "width": 8, "multipliers": (1, 2, 2), "num_blocks": 2, "num_groups": 4}
PUBLISHED_KEYS = Path(__file__).parents[3] / "shared" / "golden" / "keys_vavae_f16d32.json"


def small_decoder(seed=0, **changes):
    torch.manual_seed(seed)
    return ConvDecoder(**{**SMALL, **changes})


def expected_shapes():
    """Latent diffusion's parameter names and shapes at VA-VAE's f16d32, from the rule."""
    shapes = {}

    def conv(name, c_in, c_out, kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c_out, c_in, kernel, kernel), (c_out,)

    def norm(name, c):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c,), (c,)

    def residual(name, c_in, c_out):
        norm(f"{name}.norm1", c_in)
        conv(f"{name}.conv1", c_in, c_out, 3)
        norm(f"{name}.norm2", c_out)
        conv(f"{name}.conv2", c_out, c_out, 3)
        if c_in != c_out:
            conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    conv("post_quant_conv", 32, 32, 1)
    conv("conv_in", 32, 512, 3)
    residual("mid.block_1", 512, 512)
    attention("mid.attn_1", 512)
    residual("mid.block_2", 512, 512)
    for level, (c_in, c_out) in {4: (512, 512), 3: (512, 256), 2: (256, 256), 1: (256, 128), 0: (128, 128)}.items():
        for j in range(3):
            residual(f"up.{level}.block.{j}", c_out if j else c_in, c_out)
            if level == 4:
                attention(f"up.{level}.attn.{j}", c_out)
        if level > 0:
            conv(f"up.{level}.upsample.conv", c_out, c_out, 3)
    norm("norm_out", 128)
    conv("conv_out", 128, 3, 3)
    return shapes


@pytest.fixture(scope="module")
def vavae():
    with torch.device("meta"):
        return ConvDecoder(**VAVAE_F16D32)


def test_vavae_parameter_count(vavae):
    assert sum(p.numel() for p in vavae.parameters()) == 41_418_659
    assert sum(p.numel() for p in vavae.post_quant_conv.parameters()) == 1_056
    assert vavae.downsampling == 16
    assert vavae.latent_dim == 32


def test_vavae_keys_follow_latent_diffusion(vavae):
    assert {key: tuple(value.shape) for key, value in vavae.state_dict().items()} == expected_shapes()


@pytest.mark.skipif(not PUBLISHED_KEYS.exists(), reason="the published key list is not part of the repository")
def test_vavae_keys_are_the_published_ones(vavae):
    entries = json.loads(PUBLISHED_KEYS.read_text())["entries"]
    published = {
        entry["key"].removeprefix("decoder."): tuple(entry["shape"])
        for entry in entries
        if entry["key"].startswith(("decoder.", "post_quant_conv."))
    }
    assert {key: tuple(value.shape) for key, value in vavae.state_dict().items()} == published


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_any_grid(grid):
    decoder = small_decoder()
    image = decoder(torch.randn(2, 4, *grid))
    assert image.shape == (2, 3, grid[0] * 4, grid[1] * 4)
    assert image.isfinite().all()


def test_output_is_the_network_moved_from_minus_one_one_to_zero_one():
    decoder = small_decoder()
    for parameter in decoder.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    latent = torch.randn(1, 4, 2, 2)
    for internal, nominal in ((-1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (3.0, 2.0)):  # 3 -> 2: not clamped
        torch.nn.init.constant_(decoder.conv_out.bias, internal)
        assert torch.equal(decoder(latent), torch.full((1, 3, 8, 8), nominal))


def test_attention_levels():
    def levels(decoder):
        return [i for i, level in enumerate(decoder.up) if len(level.attn)]

    assert levels(small_decoder()) == [2]  # the lowest resolution
    assert levels(small_decoder(attention_levels=[])) == []
    assert levels(small_decoder(attention_levels=[0, -1])) == [0, 2]
    assert [len(level.attn) for level in small_decoder(attention_levels=[1]).up] == [0, 2, 0]


def test_attention_is_the_formula():
    attention = small_decoder().mid.attn_1
    x = torch.randn(2, 16, 3, 5)
    normed = attention.norm(x)
    q, k, v = (layer(normed).flatten(2) for layer in (attention.q, attention.k, attention.v))  # (B, D, h w)
    weights = torch.softmax(torch.einsum("bdi,bdj->bij", q, k) * 16**-0.5, dim=-1)
    attended = torch.einsum("bij,bdj->bdi", weights, v).unflatten(2, (3, 5))
    torch.testing.assert_close(attention(x), x + attention.proj_out(attended))


def test_last_layer_is_last():
    decoder = small_decoder()
    latent = torch.randn(2, 4, 2, 3)
    (gradient,) = torch.autograd.grad(decoder(latent).square().sum(), decoder.last_layer)
    assert gradient.abs().min() > 0
    step = torch.randn_like(decoder.last_layer)
    with torch.no_grad():
        images = [decoder(latent)]
        for _ in range(2):
            decoder.last_layer.add_(step)
            images.append(decoder(latent))
    assert not torch.allclose(images[0], images[1])
    torch.testing.assert_close(images[2] - images[1], images[1] - images[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 32}, "num_groups=32 does not divide"),
        ({"multipliers": ()}, "multipliers="),
        ({"multipliers": (1, 0)}, "multipliers="),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"attention_levels": [3]}, "level 3 does not exist"),
        ({"attention_levels": [-4]}, "level -4 does not exist"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        small_decoder(**changes)


@pytest.mark.parametrize("shape", [(1, 5, 2, 2), (4, 2, 2)])
def test_wrong_latent(shape):
    with pytest.raises(UserError, match=r"the decoder needs \(B, 4, h, w\)"):
        small_decoder()(torch.randn(shape))


def test_the_norm_of_a_compiled_level_is_groupnorm():
    """By the moments of channels: also where the mean is large beside the deviation, and in its gradients."""
    torch.manual_seed(0)
    norm = NormSiLU(4, 16)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (torch.randn(2, 16, 5, 3) + 30 * torch.randn(2, 16, 1, 1)).requires_grad_()
    inputs, results = (x, *norm.parameters()), []
    for each in (norm.normalized(x), torch.nn.GroupNorm.forward(norm, x)):
        results.append([each, *torch.autograd.grad(each.sin().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
