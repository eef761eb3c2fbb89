"""The average of the weights: what validation sees and a checkpoint's state_dict holds."""

import lightning.pytorch as pl
import pytest
import torch

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.networks import VisionEncoder
from aligntok.stages import DecoderRefinement, LatentAlignment, PerceptualAlignment

DECAY = 0.3  # reached within the few steps of a test


class Average(pl.Callback):
    """Averages by hand, in doubles; notes what validation sees."""

    def __init__(self):
        self.average, self.seen, self.count = None, [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = {name: p.detach().double() for name, p in pl_module.named_parameters()}
        old = self.average or now
        decay = min(DECAY, (1 + self.count) / (10 + self.count))  # the warm-up that the class documents
        self.average = {name: decay * old[name] + (1 - decay) * now[name] for name in now}
        self.count += 1

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_checkpoint_and_validation_have_the_average(tiny, tmp_path, accumulate):
    mine = Average()
    callbacks = [mine, EMA(DECAY), SaveCheckpoint()]
    options = {"limit_val_batches": 1, "val_check_interval": 5 * accumulate, "check_val_every_n_epoch": None}
    trainer = tiny.trainer(tmp_path, 5, callbacks, accumulate_grad_batches=accumulate, **options)
    stage = tiny.stage(LatentAlignment, adversarial=tiny.gan(weight=0.5), learning_rate=1e-2)
    trainer.fit(stage, datamodule=tiny.data())
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert len(mine.seen) == 1
    for name, value in mine.average.items():
        torch.testing.assert_close(checkpoint["state_dict"][name].double(), value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mine.seen[0][name].double(), value, rtol=1e-5, atol=1e-7)
        assert torch.equal(stage.state_dict()[name], checkpoint["state_dict"][name])  # what fit leaves behind
    raw = checkpoint["current_model_state"]["tokenizer.decoder.conv_out.weight"]
    assert (raw - checkpoint["state_dict"]["tokenizer.decoder.conv_out.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("cls", [PerceptualAlignment, DecoderRefinement])
def test_statistics_measured_before_the_first_step_are_in_the_average(tiny, tmp_path, cls, sanity):
    trainer = tiny.trainer(
        tmp_path, 2, [EMA(DECAY), SaveCheckpoint()], num_sanity_val_steps=sanity, limit_val_batches=1
    )
    stage = tiny.stage(cls, learning_rate=0.0)
    trainer.fit(stage, datamodule=tiny.data())
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    latent = stage.tokenizer.adapter(stage.tokenizer.encoder(torch.cat([b["image"] for b in tiny_batches(tiny)])))
    for state in ("state_dict", "current_model_state"):
        mean, std = (checkpoint[state][f"tokenizer.latent_{key}"].flatten() for key in ("mean", "std"))
        torch.testing.assert_close(mean, latent.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, latent.transpose(0, 1).flatten(1).std(1), rtol=1e-4, atol=1e-5)


def test_a_validation_before_the_first_step_has_the_measured_statistics(tiny, tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(pl_module.tokenizer.latent_std.clone())

    stage = tiny.stage(DecoderRefinement)
    options = {"num_sanity_val_steps": 1, "limit_val_batches": 1}
    tiny.trainer(tmp_path, 1, [EMA(DECAY), Watch()], **options).fit(stage, datamodule=tiny.data())
    assert torch.equal(seen[0], stage.tokenizer.latent_std)
    assert not torch.equal(seen[0], torch.ones(4, 1, 1))


def tiny_batches(tiny):
    data = tiny.data()
    data.setup()
    return list(data.calibration_dataloader())


def test_what_is_frozen_does_not_drift_by_rounding(tiny, tmp_path):
    """0.999 w + 0.001 w is not w in floats: over a long run a frozen encoder and the shared anchor would wander off."""
    stage = tiny.stage(PerceptualAlignment, perceptual=tiny.judge(), learning_rate=0.0)
    start = tiny.copies(stage)
    callback = EMA(0.999)
    callback.setup(tiny.trainer(tmp_path, 1), stage, "fit")
    for _ in range(50):
        callback._average_model.update_parameters(stage)
    for module in (stage, callback._average_model.module):
        assert all(torch.equal(value, start[name]) for name, value in tiny.copies(module).items())


def test_buffers_are_copied_not_averaged(tmp_path, tiny):
    encoder = VisionEncoder("resnet10t", 16, 8, weights=None)  # batch norm: running statistics, and a count
    stage = tiny.stage(LatentAlignment)
    stage.extra = encoder
    callback = EMA(0.5)
    callback.setup(tiny.trainer(tmp_path, 1), stage, "fit")
    encoder.train()
    for _ in range(3):
        encoder(tiny.images(4))
        callback._average_model.update_parameters(stage)
    for name, value in callback._average_model.module.extra.named_buffers():
        assert torch.equal(value, dict(encoder.named_buffers())[name]), name


def test_an_average_of_another_network_shares_what_never_changes(tiny, tmp_path):
    stage = tiny.stage(PerceptualAlignment, perceptual=tiny.judge())
    callback = EMA()
    callback.setup(tiny.trainer(tmp_path, 1), stage, "fit")
    average = callback._average_model.module
    assert average.anchor is stage.anchor
    assert average.perceptual.judge is stage.perceptual.judge
    assert average.tokenizer is not stage.tokenizer
