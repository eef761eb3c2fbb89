import json
from pathlib import Path

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks.discriminators import BlurDiscriminator, PatchDiscriminator

PUBLISHED_KEYS = Path(__file__).parents[3] / "shared" / "golden" / "keys_alitok_discriminator.json"


def count(module):
    return sum(p.numel() for p in module.parameters())


def blur_shapes():
    """AliTok's parameter and buffer names and shapes, from the rule."""
    shapes = {"block_in.0.weight": (128, 3, 5, 5), "block_in.0.bias": (128,)}
    for i, (c_in, c_out) in enumerate([(128, 128), (128, 256), (256, 512)]):
        shapes[f"blocks.{i}.0.weight"] = (c_out, c_in, 3, 3)
        shapes[f"blocks.{i}.1.kernel"] = (1, 1, 4, 4)
        for key in ("0.bias", "2.weight", "2.bias"):
            shapes[f"blocks.{i}.{key}"] = (c_out,)
    shapes |= {"to_logits.0.weight": (512, 512, 1, 1), "to_logits.0.bias": (512,)}
    return shapes | {"to_logits.2.weight": (1, 512, 5, 5), "to_logits.2.bias": (1,)}


def test_published_parameter_counts():
    with torch.device("meta"):
        assert count(PatchDiscriminator()) == 2_765_633
        assert count(BlurDiscriminator()) == 1_909_889


def test_blur_keys_follow_alitok():
    with torch.device("meta"):
        state = BlurDiscriminator().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == blur_shapes()


@pytest.mark.skipif(not PUBLISHED_KEYS.exists(), reason="the published key list is not part of the repository")
def test_blur_keys_are_the_published_ones():
    entries = json.loads(PUBLISHED_KEYS.read_text())["entries"]
    assert {entry["key"]: tuple(entry["shape"]) for entry in entries} == blur_shapes()


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("size", "grid"), [((32, 32), (2, 2)), ((24, 49), (1, 4)), ((256, 256), (30, 30))])
def test_patch_shape(norm, size, grid):
    assert PatchDiscriminator(width=4, norm=norm)(torch.rand(2, 3, *size)).shape == (2, 1, *grid)


@pytest.mark.parametrize("size", [(32, 32), (40, 23), (256, 256)])
def test_blur_shape(size):
    assert BlurDiscriminator(width=4)(torch.rand(2, 3, *size)).shape == (2, 1, 16, 16)
    assert BlurDiscriminator(width=4, num_stages=2, logit_size=5)(torch.rand(2, 3, *size)).shape == (2, 1, 5, 5)


def test_patch_initialisation():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    for layer in discriminator.main:
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.bias is None or not layer.bias.any()
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("discriminator", "independent"),
    [
        (PatchDiscriminator(width=8, norm="batch"), False),
        (PatchDiscriminator(width=8, norm="group"), True),
        (PatchDiscriminator(width=8, norm="none"), True),
        (BlurDiscriminator(width=8), True),
    ],
)
def test_samples_of_a_batch(discriminator, independent):
    discriminator.train()
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    others = torch.cat([image[:1], image[1:] * 0.1])
    same = torch.allclose(discriminator(image)[0], discriminator(others)[0], atol=1e-6, rtol=1e-5)
    assert same == independent


def test_patch_works_in_minus_one_one():
    """A grey image of 0.5 is zero inside: with the biases at zero the logits are zero as well."""
    logits = PatchDiscriminator(width=4, norm="none")(torch.full((1, 3, 32, 32), 0.5))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_patch_receptive_field_is_70_pixels():
    discriminator = PatchDiscriminator(width=4, norm="none")
    image = torch.rand(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, 9, 9], image)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_blur_kernel_and_downsampling():
    blur = BlurDiscriminator(width=4).blocks[0][1]
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    torch.testing.assert_close(blur.kernel[0, 0], line[:, None] * line)
    assert blur.kernel[0, 0, 0, 0].item() == 0.015625
    x = torch.rand(1, 2, 6, 8)
    # one zero on each side, then out[i] = sum_j kernel[j] * padded[2 i + j], along both axes
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    rows = sum(line[j] * padded[:, :, j : j + 5 : 2] for j in range(4))
    expected = sum(line[j] * rows[..., j : j + 7 : 2] for j in range(4))
    torch.testing.assert_close(blur(x), expected)
    assert blur(torch.rand(1, 2, 5, 7)).shape == (1, 2, 3, 4)  # rounded up


def test_gradients_reach_the_image():
    for discriminator in (PatchDiscriminator(width=8), BlurDiscriminator(width=8)):
        image = torch.rand(2, 3, 32, 32, requires_grad=True)
        discriminator(image).mean().backward()
        assert image.grad.abs().sum() > 0
        assert all(p.grad is not None for p in discriminator.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PatchDiscriminator(norm="layer"), "norm='layer'"),
        (lambda: PatchDiscriminator(num_layers=0), "num_layers=0"),
        (lambda: PatchDiscriminator(width=0), "width=0"),
        (lambda: PatchDiscriminator(width=4)(torch.rand(1, 3, 23, 64)), "image of 23x64 pixels"),
        (lambda: BlurDiscriminator(width=0), "width=0"),
        (lambda: BlurDiscriminator(num_stages=0), "num_stages=0"),
        (lambda: BlurDiscriminator(logit_size=0), "logit_size=0"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(UserError, match=message):
        build()
