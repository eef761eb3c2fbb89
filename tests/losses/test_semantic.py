import pytest
import torch

from aligntok.losses import semantic_preservation
from aligntok.networks import ConvDecoder, GaussianAdapter, LinearAdapter, Tokenizer, VisionEncoder
from aligntok.stages import PerceptualAlignment


def test_the_two_distances():
    latent, anchor = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    assert torch.allclose(semantic_preservation(latent, anchor), (latent - anchor).square().mean())
    cells = zip(*(x.movedim(1, -1).reshape(-1, 5) for x in (latent, anchor)), strict=True)
    wanted = torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in cells]).mean()
    torch.testing.assert_close(semantic_preservation(latent, anchor, "cosine"), wanted)
    torch.testing.assert_close(semantic_preservation(3 * latent, anchor, "cosine"), wanted)  # length does not count


def semantic(stage, image):
    features = stage.tokenizer.encoder(image)
    latent = stage.tokenizer.normalize(stage.tokenizer.adapter(features))
    return stage.latent_terms(image, features, latent)["semantic"]


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("before", [False, True])
def test_zero_at_the_start_of_stage_2_and_not_later(tiny, tmp_path, distance, before):
    stage = tiny.stage(
        PerceptualAlignment, semantic_distance=distance, semantic_before_adapter=before, learning_rate=1e-2
    )
    image = tiny.images()
    stage.measure_latents([image])
    weight, value = semantic(stage, image)
    assert weight == 1.0
    assert abs(value.item()) < 1e-6
    tiny.trainer(tmp_path, 3).fit(stage, datamodule=tiny.data())
    assert semantic(stage.eval(), image)[1].item() > 1e-5


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_zero_at_the_start_also_with_batch_norm(tiny, distance):
    """In train mode a batch's own statistics would move every latent away from the anchor at once."""
    encoder = VisionEncoder("tf_efficientnet_lite0", 32, 16, weights="offline")
    decoder = ConvDecoder(latent_dim=4, width=8, multipliers=[1, 1, 1, 1, 1], num_blocks=1, num_groups=4)
    tokenizer = Tokenizer(encoder, LinearAdapter(encoder.width, 4), decoder)
    stage = tiny.stage(PerceptualAlignment, tokenizer=tokenizer, semantic_distance=distance)
    image = tiny.images(size=32)
    stage.measure_latents([image])
    stage.train()
    before = tiny.copies(encoder)
    assert abs(float(semantic(stage, image)[1].detach())) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in tiny.copies(encoder).items())
    assert encoder.backbone.training


def test_it_is_in_units_of_the_latents_spread(tiny):
    """Ten times the adapter, measured again, and the same drift of the encoder: the same loss."""
    values = []
    for scale in (1.0, 10.0):
        tokenizer = tiny.tokenizer()
        for parameter in tokenizer.adapter.parameters():
            parameter.data.mul_(scale)
        stage = tiny.stage(PerceptualAlignment, tokenizer=tokenizer)
        image = tiny.images(16)
        stage.measure_latents([image])
        torch.manual_seed(9)
        weight = tokenizer.encoder.backbone.blocks[0].mlp.fc2.weight
        weight.data += 0.1 * torch.randn_like(weight)
        values.append(semantic(stage, image)[1])
    assert values[0].item() > 1e-4
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0)


def test_its_gradient_reaches_encoder_and_adapter_but_not_the_anchor(tiny):
    stage = tiny.stage(PerceptualAlignment)
    for parameter in stage.tokenizer.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    semantic(stage, tiny.images())[1].backward()
    assert stage.tokenizer.encoder.backbone.blocks[0].mlp.fc2.weight.grad.abs().sum() > 0
    assert stage.tokenizer.adapter.project.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in stage.anchor.parameters())


def test_the_kl_term_is_per_pixel(tiny):
    stage = tiny.stage(PerceptualAlignment, tokenizer=tiny.tokenizer(adapter=GaussianAdapter), kl_weight=0.5)
    features = stage.tokenizer.encoder(tiny.images())
    batch = {"id": torch.arange(len(features))}
    latent, terms = stage.adapt(features, batch)
    noise = stage.normal(batch, "latent", (4, 4, 4))
    sample, divergence = stage.tokenizer.adapter.sample(features, noise)
    assert torch.equal(latent, stage.tokenizer.normalize(sample))
    weight, value = terms["kl"]
    assert weight == 0.5
    torch.testing.assert_close(value, divergence.mean() / (3 * 16 * 16))
