"""Decoder refinement on cached latents: the encoder rests, and the units are those of the cache."""

import pytest
import torch

from aligntok.callbacks import LinearProbe, SaveCheckpoint
from aligntok.data import Augmentation, LatentDataModule, LatentShards, Shapes
from aligntok.errors import UserError
from aligntok.stages import DecoderRefinement, LatentAlignment, PerceptualAlignment

COUNT = 32


def write(tiny, folder, tokenizer, **options):
    """Cache the training images of ``tiny.data`` with a tokenizer."""
    return tiny.cache(folder, tokenizer, COUNT, shard_size=10, **options)


@pytest.fixture
def measured(tiny):
    """Return a stage whose latents were measured on the training images."""
    stage = tiny.stage(DecoderRefinement)
    data = tiny.data(num_images=COUNT)
    data.setup()
    stage.measure_latents(batch["image"] for batch in data.calibration_dataloader())
    return stage


def cached(folder, images=True, **options):
    train = LatentShards(str(folder), images=Shapes(COUNT, 16) if images else None)
    return LatentDataModule(
        train, 8, 16, **{"val": Shapes(8, 16, seed=1), "augmentation": Augmentation(flip=False), **options}
    )


def test_learns_from_the_cache_what_it_learns_from_the_images_and_the_encoder_rests(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    fingerprint = measured.tokenizer.fingerprint()
    start = tiny.copies(measured)

    def train(data, **options):
        stage = tiny.stage(DecoderRefinement, learning_rate=0.1, optimizer=tiny.sgd)
        stage.load_state_dict({key: start[key] for key in stage.state_dict()})
        calls = []
        stage.tokenizer.encoder.register_forward_hook(lambda *args: calls.append(1))
        tiny.trainer(tmp_path, 6, **options).fit(stage, datamodule=data)
        return stage, len(calls)

    images, encoded = train(tiny.data(num_images=COUNT))
    latents, not_encoded = train(cached(tmp_path / "cache"))
    assert encoded > 6
    assert not_encoded == 0
    assert latents.tokenizer.fingerprint() == fingerprint
    ours, theirs = tiny.copies(latents), tiny.copies(images)
    assert max(float((ours[key] - start[key]).abs().max()) for key in ours if "decoder" in key) > 1e-2
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_the_linear_probe_reads_cached_latents_and_leaves_the_encoder_alone(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    val = LatentShards(str(tmp_path / "cache"), images=Shapes(COUNT, 16))
    probed = {}
    options = {"val": Shapes(COUNT, 16), "augmentation": Augmentation("center", flip=False)}
    images = LatentDataModule(Shapes(COUNT, 16), 8, 16, **options)
    for name, data in (("cached", cached(tmp_path / "cache", val=val)), ("images", images)):
        calls = []
        hook = measured.tokenizer.encoder.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trainer = tiny.trainer(tmp_path, 1, [LinearProbe()], limit_val_batches=None)
        probed[name] = trainer.validate(measured, datamodule=data, verbose=False)[0]["val/probe"], len(calls)
        hook.remove()
    assert probed["cached"] == (pytest.approx(probed["images"][0]), 0)
    assert probed["images"][1] > 0


def test_mirrored_latents_come_with_mirrored_images(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer, flips=True)
    data = cached(tmp_path / "cache", augmentation=Augmentation())
    data.setup("fit")
    for batch in data.train_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        torch.testing.assert_close(batch["latent"], measured.tokenizer.encode(batch["image"]), rtol=1e-4, atol=1e-4)


def test_statistics_of_the_checkpoint_stay_though_others_would_be_measured(tiny, tmp_path):
    """Those of stage 2 are of the latents before it."""
    stage = tiny.stage(DecoderRefinement)
    stage.tokenizer.set_latent_statistics(torch.full((4,), 0.3), torch.full((4,), 2.0))
    write(tiny, tmp_path / "cache", stage.tokenizer)
    tiny.trainer(tmp_path, 1).fit(stage, datamodule=cached(tmp_path / "cache"))
    assert torch.equal(stage.tokenizer.latent_std.flatten(), torch.full((4,), 2.0))
    tiny.trainer(tmp_path, 1).fit(stage, datamodule=tiny.data(num_images=COUNT))
    assert not torch.equal(stage.tokenizer.latent_std.flatten(), torch.full((4,), 2.0))


def test_validation_reconstructs_cached_latents(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    data = cached(tmp_path / "cache", val=LatentShards(str(tmp_path / "cache"), images=Shapes(COUNT, 16)))
    calls = []
    measured.tokenizer.encoder.register_forward_hook(lambda *args: calls.append(1))
    trainer = tiny.trainer(tmp_path, 1, limit_val_batches=1.0)
    trainer.validate(measured, datamodule=data, verbose=False)
    assert not calls
    assert trainer.callback_metrics["val/l1"] > 0
    with pytest.raises(UserError, match="was written by tokenizer"):
        trainer.validate(tiny.stage(DecoderRefinement, seed=1), datamodule=data, verbose=False)
    with pytest.raises(UserError, match="was written by tokenizer"):
        trainer.test(tiny.stage(DecoderRefinement, seed=1), datamodule=data, verbose=False)


def fit_error(tiny, folder, stage, data):
    with pytest.raises(UserError) as caught:
        tiny.trainer(folder, 1).fit(stage, datamodule=data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_tokenizers_cache_is_refused_with_both_fingerprints_also_on_resume(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    other = tiny.stage(DecoderRefinement, seed=1)
    message = fit_error(tiny, tmp_path, other, cached(tmp_path / "cache"))
    assert measured.tokenizer.fingerprint() in message
    assert other.tokenizer.fingerprint() in message
    other.resumed = True
    assert "was written by tokenizer" in fit_error(tiny, tmp_path, other, cached(tmp_path / "cache"))


def test_a_run_on_the_cache_goes_on_without_the_weights_that_it_started_from(tiny, tmp_path):
    """Only its checkpoint knows the encoder and the statistics that wrote the cache."""
    stage = tiny.stage(DecoderRefinement)
    stage.tokenizer.set_latent_statistics(torch.full((4,), 0.3), torch.full((4,), 2.0))
    write(tiny, tmp_path / "cache", stage.tokenizer)
    tiny.trainer(tmp_path, 2, [SaveCheckpoint()]).fit(stage, datamodule=cached(tmp_path / "cache"))
    resumed, last = tiny.stage(DecoderRefinement, seed=1), str(tmp_path / "checkpoints/last.ckpt")
    trainer = tiny.trainer(tmp_path, 4, [SaveCheckpoint()])
    trainer.fit(resumed, datamodule=cached(tmp_path / "cache"), ckpt_path=last)
    assert trainer.global_step == 4
    assert resumed.tokenizer.fingerprint() == stage.tokenizer.fingerprint()


def test_latents_of_another_shape_are_refused_by_both_keys(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    other = DecoderRefinement(tiny.tokenizer(latent_dim=8))
    message = fit_error(tiny, tmp_path, other, cached(tmp_path / "cache"))
    assert "train " in message
    assert "(4, 4, 4)" in message
    assert "tokenizer is (8, 4, 4)" in message


@pytest.mark.parametrize("cls", [LatentAlignment, PerceptualAlignment])
def test_a_stage_that_trains_the_encoder_or_adapter_has_no_use_for_a_cache(tiny, tmp_path, measured, cls):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    message = fit_error(tiny, tmp_path, tiny.stage(cls), cached(tmp_path / "cache"))
    assert f"{cls.__name__} trains the" in message
    assert "train on images" in message


def test_latents_without_images_are_refused(tiny, tmp_path, measured):
    write(tiny, tmp_path / "cache", measured.tokenizer)
    message = fit_error(tiny, tmp_path, measured, cached(tmp_path / "cache", images=False))
    assert "LatentShards(images=" in message


def test_a_second_refinement_keeps_the_units_that_generators_know(tiny, tmp_path):
    """It measures after another stage, but not after itself."""
    stage = tiny.stage(DecoderRefinement)
    stage.tokenizer.set_latent_statistics(torch.full((4,), 0.3), torch.full((4,), 2.0))
    for name, keeps in (("DecoderRefinement", True), ("PerceptualAlignment", False)):
        state = {f"tokenizer.{key}": value for key, value in stage.tokenizer.state_dict().items()}
        torch.save({"state_dict": state, "aligntok_stage": name}, tmp_path / "previous.ckpt")
        following = tiny.stage(DecoderRefinement, seed=1)
        following.init_from(tmp_path / "previous.ckpt")
        tiny.trainer(tmp_path, 1).fit(following, datamodule=tiny.data(num_images=COUNT))
        assert (following.tokenizer.fingerprint() == stage.tokenizer.fingerprint()) == keeps
