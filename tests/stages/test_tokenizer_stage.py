"""What all tokenizer stages promise apart from the adversarial step."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, GaussianAdapter, LinearAdapter, Tokenizer, VisionEncoder
from aligntok.stages import DecoderRefinement, EncoderPretraining, LatentAlignment, PerceptualAlignment

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")  # runs without validation


def test_stage_2_moves_the_encoder(tiny, tmp_path):
    stage = tiny.stage(PerceptualAlignment)
    before = tiny.copies(stage.tokenizer.encoder)
    tiny.trainer(tmp_path, 1).fit(stage, datamodule=tiny.data())
    moved = [name for name, p in stage.tokenizer.encoder.named_parameters() if not torch.equal(p, before[name])]
    assert "backbone.blocks.0.mlp.fc1.weight" in moved


@pytest.mark.parametrize("cls", [LatentAlignment, DecoderRefinement])
def test_a_frozen_encoder_with_batch_norm_does_not_move(tiny, tmp_path, cls):
    """In train mode its running statistics would, and with them every latent."""
    encoder = VisionEncoder("resnet10t", 16, 4, weights=None)
    decoder = ConvDecoder(latent_dim=4, width=8, multipliers=[1, 1, 2], num_blocks=1, num_groups=4)
    stage = tiny.stage(cls, tokenizer=Tokenizer(encoder, LinearAdapter(encoder.width, 4), decoder))
    stage.tokenizer.encoder.train()  # how timm hands it over
    before = tiny.copies(encoder)
    tiny.trainer(tmp_path, 2, num_sanity_val_steps=1, limit_val_batches=1).fit(stage, datamodule=tiny.data())
    assert all(torch.equal(value, before[name]) for name, value in tiny.copies(encoder).items())


@pytest.mark.parametrize("cls", [LatentAlignment, PerceptualAlignment])
def test_a_stage_that_comes_in_eval_mode_is_trained_in_train_mode(tiny, tmp_path, cls):
    stage = tiny.stage(cls)
    stage.eval()
    tiny.trainer(tmp_path, 1).fit(stage, datamodule=tiny.data())
    assert stage.tokenizer.decoder.training
    assert stage.tokenizer.encoder.training == (cls is PerceptualAlignment)


@pytest.mark.parametrize(
    "bad", [torch.full((4, 3, 16, 16), 2.0), torch.full((4, 3, 16, 16), -0.5), torch.zeros(4, 3, 16, 16).byte()]
)
def test_images_that_are_not_in_0_1_are_refused(tiny, bad):
    with pytest.raises(UserError, match=r"images must be floats in \[0, 1\]"):
        tiny.stage(LatentAlignment).training_step({"image": bad}, 0)


def test_fp16_is_refused(tiny, tmp_path):
    stage = tiny.stage(LatentAlignment)

    class Half:
        precision = "16-mixed"

    stage._trainer = Half()
    with pytest.raises(UserError, match=r"precision 16-mixed: .*use bf16-mixed"):
        stage.setup("fit")


def test_a_kl_weight_needs_a_gaussian(tiny):
    with pytest.raises(UserError, match=r"kl_weight needs .*GaussianAdapter"):
        tiny.stage(LatentAlignment, kl_weight=1e-6)


def test_with_a_kl_weight_training_samples_and_validation_does_not(tiny):
    stage = tiny.stage(LatentAlignment, tokenizer=tiny.tokenizer(adapter=GaussianAdapter), kl_weight=1e-6)
    image = tiny.images(2)
    features = stage.tokenizer.encoder(image)
    first, second, again = (stage.adapt(features, {"id": torch.tensor(ids)})[0] for ids in ([0, 1], [2, 1], [0, 1]))
    assert not torch.equal(first[0], second[0])  # another image, another sample
    assert torch.equal(first[1], second[1])
    assert torch.equal(first, again)
    assert torch.equal(stage.predict_step({"image": image}, 0), stage.predict_step({"image": image}, 0))


def test_without_statistics_or_data_to_measure_them_it_does_not_start(tiny, tmp_path):
    loader = torch.utils.data.DataLoader([{"image": torch.rand(3, 16, 16)}] * 8, batch_size=4)
    with pytest.raises(
        UserError, match=r"DecoderRefinement needs the statistics of the latents: call stage\.measure_latents"
    ):
        tiny.trainer(tmp_path, 1).fit(tiny.stage(DecoderRefinement), loader)
    stage = tiny.stage(DecoderRefinement)
    stage.measure_latents([tiny.images()])
    measured = stage.tokenizer.latent_std.clone()
    tiny.trainer(tmp_path, 1).fit(stage, loader)
    assert torch.equal(stage.tokenizer.latent_std, measured)


def test_the_pretrained_encoder_is_the_file_that_the_next_stage_loads(tmp_path, tiny):
    torch.manual_seed(0)
    encoder = VisionEncoder("tf_efficientnet_lite0", 16, 4, weights=None)  # cut off after stride 4
    stage = EncoderPretraining(encoder, num_classes=12)
    tiny.trainer(tmp_path, 2).fit(stage, datamodule=tiny.data())
    loaded = VisionEncoder("tf_efficientnet_lite0", 16, 4, weights=str(tmp_path / "encoder.safetensors"))
    image = tiny.images(2)
    assert torch.equal(loaded.eval()(image), encoder.eval()(image))


def test_loaders_of_ones_own_work(tiny, tmp_path):
    loader = torch.utils.data.DataLoader([{"image": torch.rand(3, 16, 16)}] * 8, batch_size=4)
    trainer = tiny.trainer(tmp_path, 3)
    trainer.fit(tiny.stage(LatentAlignment), loader)
    assert trainer.global_step == 3


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_in_which_the_weights_are_rounded_is_refused_by_name(tiny, tmp_path, precision):
    for stage in (tiny.stage(LatentAlignment), tiny.autoregressive()):
        with pytest.raises(UserError, match=f"precision {precision}: .*use (bf16-mixed|32-true)"):
            tiny.trainer(tmp_path, 1, precision=precision).fit(stage, datamodule=tiny.data())
