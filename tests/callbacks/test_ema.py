"""The average of the weights: what validation sees and a checkpoint's state_dict holds."""

import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.errors import UserError
from aligntok.stages import DecoderRefinement, LatentAlignment, PerceptualAlignment
from aligntok.weights import read_checkpoint

LAST = "tokenizer.decoder.conv_out.weight"
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
    mean, std = (checkpoint["state_dict"][f"tokenizer.latent_{key}"].flatten() for key in ("mean", "std"))
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


def fitted(tiny, folder, stage, callback, steps=3, **options):
    """Train some steps and return the checkpoint that is saved after them."""
    trainer = tiny.trainer(folder, steps, [callback, SaveCheckpoint(1)], **options)
    trainer.fit(stage, datamodule=tiny.data())
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def test_what_is_frozen_is_not_averaged_and_saved_once(tiny, tmp_path):
    """0.999 w + 0.001 w is not w in floats: over a long run a frozen encoder would wander off."""
    stage = tiny.stage(DecoderRefinement, perceptual=tiny.judge(), learning_rate=1e-2)
    start = tiny.copies(stage)
    callback = EMA(0.999)
    checkpoint = fitted(tiny, tmp_path, stage, callback)
    assert {name.split(".")[1] for name in callback.averages[0]} == {"decoder"}
    assert checkpoint["current_model_state"].keys() == callback.averages[0].keys()
    assert checkpoint["state_dict"].keys() == stage.state_dict().keys()
    encoder = [name for name in checkpoint["state_dict"] if ".encoder." in name]
    assert encoder
    assert all(torch.equal(checkpoint["state_dict"][name], start[name]) for name in encoder)


def test_buffers_are_taken_over(tmp_path, tiny):
    stage = tiny.stage(LatentAlignment)
    stage.extra = torch.nn.BatchNorm1d(3)  # running statistics, and a count
    stage.on_after_backward = lambda: stage.extra(torch.rand(4, 3))
    checkpoint = fitted(tiny, tmp_path, stage, EMA(0.5))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(checkpoint["state_dict"][f"extra.{name}"], getattr(stage.extra, name))
    assert stage.extra.num_batches_tracked >= 2


def test_twenty_steps_equal_lightnings_averaging_bit_for_bit(tiny, tmp_path):
    """The averages of the class that this one replaces; the warm-up ends within them."""

    class Former(WeightAveraging):
        def __init__(self):
            super().__init__(use_buffers=False, multi_avg_fn=self.average)

        @torch.no_grad()
        def average(self, averages, weights, count):
            decay = min(0.5, (1 + int(count)) / (10 + int(count)))
            torch._foreach_lerp_(averages, weights, 1 - decay)

    former, ours = Former(), EMA(0.5)
    stage = tiny.stage(LatentAlignment, adversarial=tiny.gan(weight=0.5, norm="batch"), learning_rate=1e-2)
    checkpoint = fitted(tiny, tmp_path, stage, ours, 20, **{"enable_progress_bar": False})
    again = tiny.stage(LatentAlignment, adversarial=tiny.gan(weight=0.5, norm="batch"), learning_rate=1e-2)
    theirs = fitted(tiny, tmp_path / "former", again, former, 20)
    tiny.assert_same(dict(checkpoint["state_dict"]), dict(theirs["state_dict"]))
    raw = dict(checkpoint["state_dict"]) | checkpoint["current_model_state"]
    tiny.assert_same(raw, dict(theirs["current_model_state"]))
    assert int(checkpoint["averaging_state"]["n_averaged"]) == int(theirs["averaging_state"]["n_averaged"]) == 20


@pytest.mark.parametrize("decay", [0.5, [0.5, 0.9]])
def test_a_checkpoint_of_lightnings_averaging_goes_on(tiny, tmp_path, decay):
    """Files that earlier versions wrote: all raw weights under `current_model_state`, no decays."""

    def fit(folder, steps, ckpt_path=None, seed=0):
        trainer = tiny.trainer(tmp_path / folder, steps, [EMA(decay), SaveCheckpoint(1)])
        trainer.fit(tiny.stage(LatentAlignment, seed), datamodule=tiny.data(), ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / "checkpoints/last.ckpt", weights_only=True)

    straight, old = fit("straight", 6), fit("cut", 3)
    old["current_model_state"] = old["state_dict"] | old["current_model_state"]
    del old["averaging_state"]["decays"], old["averages"]
    torch.save(old, tmp_path / "old.ckpt")
    resumed = fit("resumed", 6, tmp_path / "old.ckpt", seed=1)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        tiny.assert_same(resumed[key], straight[key], key)
    with pytest.raises(UserError, match=r"old\.ckpt has no average of decay 0\.5; it has no average whose decay"):
        read_checkpoint(tmp_path / "old.ckpt", ema=0.5)
    assert torch.equal(
        read_checkpoint(tmp_path / "old.ckpt", ema=0)["state_dict"]["tokenizer.decoder.conv_out.weight"],
        old["current_model_state"]["tokenizer.decoder.conv_out.weight"],
    )


def test_several_decays_at_once(tiny, tmp_path):
    alone = {}
    for decay in (0.3, 0.9):
        stage = tiny.stage(LatentAlignment, learning_rate=1e-2)
        alone[decay] = fitted(tiny, tmp_path / str(decay), stage, EMA(decay), 15)
    stage = tiny.stage(LatentAlignment, learning_rate=1e-2)
    fitted(tiny, tmp_path, stage, EMA([0.9, 0.3]), 7)
    stage = tiny.stage(LatentAlignment, seed=1, learning_rate=1e-2)  # resumed: both go on
    path = tmp_path / "checkpoints/last.ckpt"
    trainer = tiny.trainer(tmp_path, 15, [EMA([0.9, 0.3]), SaveCheckpoint(1)])
    trainer.fit(stage, datamodule=tiny.data(), ckpt_path=path)
    for decay in (0.3, 0.9):
        tiny.assert_same(read_checkpoint(path, ema=decay)["state_dict"], dict(alone[decay]["state_dict"]), str(decay))
    assert torch.equal(read_checkpoint(path)["state_dict"][LAST], alone[0.9]["state_dict"][LAST])
    assert torch.equal(read_checkpoint(path, ema=0)["state_dict"][LAST], alone[0.3]["current_model_state"][LAST])
    with pytest.raises(
        UserError, match=r"last\.ckpt has no average of decay 0\.999; it has 0\.9, 0\.3; 0 means the raw"
    ):
        read_checkpoint(path, ema=0.999)


def test_a_checkpoint_saved_after_the_run_holds_both(tiny, tmp_path):
    stage = tiny.stage(LatentAlignment, learning_rate=1e-2)
    trainer = tiny.trainer(tmp_path, 3, [EMA(0.5), SaveCheckpoint(1)])
    trainer.fit(stage, datamodule=tiny.data())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    states = [
        torch.load(path, weights_only=True) for path in (tmp_path / "after.ckpt", tmp_path / "checkpoints/last.ckpt")
    ]
    for key in ("state_dict", "current_model_state"):
        tiny.assert_same(states[0][key], states[1][key], key)


def test_a_second_average_is_refused(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 1, [EMA(0.9), EMA(0.99)])
    with pytest.raises(UserError, match="EMA stands twice"):
        trainer.fit(tiny.stage(), datamodule=tiny.data())


def test_the_stage_is_not_copied(tiny, tmp_path):
    """What the command line builds holds, by its optimizer, the trainer and the launcher's processes and locks."""
    stage = tiny.stage(LatentAlignment)
    stage.lock = threading.Lock()
    fitted(tiny, tmp_path, stage, EMA(0.5))


@pytest.mark.parametrize("decay", [1.0, -0.1, [], [0.9, 0.9]])
def test_decays_that_make_no_sense(decay):
    with pytest.raises(UserError, match="EMA: decay"):
        EMA(decay)


def test_without_warm_up_the_decay_is_constant_and_with_it_late():
    assert EMA(0.9999).decay_after(80_000) < 0.9999 == EMA(0.9999).decay_after(89_991)
    assert EMA(0.9999, warmup=False).decay_after(1) == 0.9999
