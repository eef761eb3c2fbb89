"""A run that was cut off and resumed is the uninterrupted run, to the last bit."""

import pytest
import torch

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.data import Augmentation
from aligntok.errors import UserError
from aligntok.networks import GaussianAdapter
from aligntok.stages import DecoderRefinement, LatentAlignment, PerceptualAlignment

CUT, END = 4, 7  # 3 steps per epoch: the cut is in the middle of the second


def fit(
    tiny, folder, max_steps, cls, seed=0, ckpt_path=None, ema=True, accumulate=1, gan=True, previous=None, **options
):
    torch.manual_seed(seed)
    tokenizer = tiny.tokenizer(
        seed, GaussianAdapter if options.get("kl_weight") else tiny.linear, drop_path_rate=0.3, depth=2
    )
    adversarial = tiny.gan(seed, weight={4: 0.0, 5: 0.5}, discriminator_start=3) if gan else None
    schedule = {"learning_rate": {0: 0.0, 2: 2e-3, 7: 1e-4}, "adversarial": adversarial}
    stage = tiny.stage(cls, seed, tokenizer, **schedule, **options)
    if previous is not None:
        stage.init_from(previous)
    callbacks = [SaveCheckpoint(every_n_steps=CUT), *([EMA(0.8)] if ema else [])]
    trainer = tiny.trainer(folder, max_steps, callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
    data = tiny.data(26, augmentation=Augmentation("random_resized"), calibration_images=20)
    torch.manual_seed(seed + 77)  # a new process has another state of the generator
    trainer.fit(stage, datamodule=data, ckpt_path=ckpt_path)
    return stage, torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (LatentAlignment, {}),
        (LatentAlignment, {"ema": False, "accumulate": 2}),
        (LatentAlignment, {"kl_weight": 1e-2, "gan": False}),
        (PerceptualAlignment, {}),
        (PerceptualAlignment, {"accumulate": 2, "lora_rank": 2}),
        (DecoderRefinement, {}),
    ],
)
def test_resumed_equals_uninterrupted(tiny, tmp_path, cls, options, monkeypatch):
    _, straight = fit(tiny, tmp_path / "straight", END, cls, **options)
    first, half = fit(tiny, tmp_path / "cut", CUT, cls, **options)
    assert half["global_step"] == CUT

    def never(*_):
        raise AssertionError("the statistics of the latents are measured again")

    monkeypatch.setattr(cls, "measure_latents", never)
    stage, resumed = fit(
        tiny, tmp_path / "cut", END, cls, seed=5, ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt"), **options
    )
    assert resumed["global_step"] == straight["global_step"] == END
    assert {"state_dict", "optimizer_states", "lr_schedulers"} <= straight.keys()
    if options.get("ema", True):
        assert "current_model_state" in straight
        assert not torch.equal(
            straight["state_dict"]["tokenizer.decoder.conv_out.weight"],
            straight["current_model_state"]["tokenizer.decoder.conv_out.weight"],
        )
    ignored = {"callbacks", "hparams_name", "pytorch-lightning_version", "loops"}
    for key in straight.keys() - ignored:
        tiny.assert_same(resumed[key], straight[key], key)
    progress = [c["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"] for c in (resumed, straight)]
    tiny.assert_same(progress[0]["optimizer"]["step"]["total"], progress[1]["optimizer"]["step"]["total"])
    if cls is PerceptualAlignment:
        tiny.assert_same(dict(stage.anchor.network.state_dict()), dict(first.anchor.network.state_dict()), "anchor")


def test_the_resume_needs_no_file_of_the_previous_stage(tiny, tmp_path):
    _, one = fit(tiny, tmp_path / "one", 2, LatentAlignment, gan=False)
    path = tmp_path / "one/checkpoints/last.ckpt"
    first, _ = fit(tiny, tmp_path / "two", CUT, PerceptualAlignment, seed=3, previous=path, gan=False)
    anchor = dict(first.anchor.network.state_dict())
    assert torch.equal(anchor["1.project.weight"], one["state_dict"]["tokenizer.adapter.project.weight"])
    path.unlink()
    last = str(tmp_path / "two/checkpoints/last.ckpt")
    stage, _ = fit(tiny, tmp_path / "two", END, PerceptualAlignment, seed=4, ckpt_path=last, gan=False)
    tiny.assert_same(dict(stage.anchor.network.state_dict()), anchor)


def test_a_checkpoint_of_another_stage_is_refused(tiny, tmp_path):
    fit(tiny, tmp_path, CUT, LatentAlignment, gan=False)
    with pytest.raises(UserError, match=r"stage LatentAlignment, this run is DecoderRefinement.*--init_from"):
        fit(tiny, tmp_path, END, DecoderRefinement, ckpt_path=str(tmp_path / "checkpoints/last.ckpt"), gan=False)


def test_nothing_that_only_measures_is_saved(tiny, tmp_path):
    _, checkpoint = fit(tiny, tmp_path, CUT, PerceptualAlignment, perceptual=tiny.judge())
    for state in ("state_dict", "current_model_state"):
        assert {key.split(".")[0] for key in checkpoint[state]} == {"tokenizer", "loss"}
    assert all(
        key.startswith("loss.adversarial.discriminator.") for key in checkpoint["state_dict"] if key.startswith("loss")
    )


def test_weights_without_an_optimizer_are_for_init_from(tiny, tmp_path):
    _, checkpoint = fit(tiny, tmp_path, 2, LatentAlignment)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="without an optimizer: give it as --init_from"):
        fit(tiny, tmp_path / "again", 4, LatentAlignment, ckpt_path=str(tmp_path / "weights.ckpt"))
