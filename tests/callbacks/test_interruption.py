"""A run that ends by an error or Ctrl-C keeps its last finished step, and goes on from there bit for bit."""

import os
import signal

import pytest
import torch

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.stages import CausalTokenization, LatentAlignment

STEPS, STOP = 6, 4  # of the run; number of finished steps when it is cut off
COMPARED = (
    *("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"),
    *("global_step", "LatentDataModule"),
)


class Lost(Exception):
    """Whatever ends a run."""


def fail():
    raise Lost


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class At(EMA):
    """An average that calls a function at the end of a step, before it took that step in."""

    def __init__(self, step, what):
        super().__init__([0.5, 0.9])
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.step = None
            self.what()
        super().on_train_batch_end(trainer, *args)


def gan(tiny):
    """Stage 1 with a discriminator whose batch norms count the images they see."""
    return tiny.stage(LatentAlignment, adversarial=tiny.gan(norm="batch"), learning_rate=1e-2)


def codes(tiny):
    """A stage whose codes move in forward passes."""
    tokenizer = tiny.causal(update="clustering")
    return tiny.stage(CausalTokenization, tokenizer=tokenizer, pixel_loss="mse", auxiliary="mse", learning_rate=1e-2)


def run(tiny, folder, make, resume=False, prepare=None, average=None, **options):
    stage, data = make(tiny), tiny.data(26)  # three steps per epoch
    callbacks = [At(*average) if average else EMA([0.5, 0.9]), SaveCheckpoint(every_n_steps=1000)]
    options = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    if prepare is not None:
        prepare(stage, data)
    last = folder / "checkpoints" / "last.ckpt"
    tiny.trainer(folder, STEPS, callbacks, **options).fit(stage, data, ckpt_path=str(last) if resume else None)
    checkpoint = torch.load(last, weights_only=True)
    return {key: checkpoint[key] for key in COMPARED}


def at(method, what, calls, after=False):
    """Return a function that has a stage's method call ``what``, at its so manieth call."""

    def prepare(stage, data):
        original, count = getattr(stage, method), iter(range(1, 1000))

        def patched(*args, **options):
            due = next(count) == calls
            if due and not after:
                what()
            result = original(*args, **options)
            if due and after:
                what()
            return result

        setattr(stage, method, patched)

    return prepare


def in_data(stage, data):
    """Have the data fail after they handed out the batch that follows the last finished step."""
    original = data.on_after_batch_transfer
    data.on_after_batch_transfer = lambda batch, i: (
        fail() if stage.training and stage.global_step == STOP else original(batch, i)
    )


@pytest.mark.parametrize("make", [gan, codes])
@pytest.mark.parametrize(
    "options",
    [
        {"prepare": at("training_step", fail, STOP + 1, after=True)},
        {"prepare": at("validation_step", fail, STOP // 2)},
        {"average": (STOP, fail)},
        {"prepare": in_data},
        {"prepare": at("training_step", fail, 2 * STOP + 2, after=True), "accumulate_grad_batches": 2},
    ],
    ids=["in a step", "in validation", "in a callback", "in the data", "in an accumulation"],
)
def test_an_error_loses_no_finished_step(tiny, tmp_path, make, options, capsys):
    more = {key: value for key, value in options.items() if key == "accumulate_grad_batches"}
    whole = run(tiny, tmp_path / "whole", make, **more)
    with pytest.raises(Lost):
        run(tiny, tmp_path / "cut", make, **options)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert f"{last} is of step {STOP}: --ckpt_path last goes on" in capsys.readouterr().out
    assert torch.load(last, weights_only=True)["global_step"] == STOP
    tiny.assert_same(run(tiny, tmp_path / "cut", make, resume=True, **more), whole)


@pytest.mark.parametrize(
    ("prepare", "step"),
    [(at("training_step", ctrl_c, STOP), STOP), (at("validation_step", ctrl_c, STOP // 2), STOP)],
    ids=["in a step", "in validation"],
)
def test_ctrl_c_loses_no_finished_step(tiny, tmp_path, prepare, step, capsys):
    whole = run(tiny, tmp_path / "whole", gan)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "cut", gan, prepare=prepare)
    assert signal.getsignal(signal.SIGINT) is before
    assert f"is of step {step}: --ckpt_path last" in capsys.readouterr().out
    tiny.assert_same(run(tiny, tmp_path / "cut", gan, resume=True), whole)


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(tiny, tmp_path):
    def twice():
        ctrl_c()
        ctrl_c()
        pytest.fail("it went on")

    with pytest.raises(SystemExit):
        run(tiny, tmp_path, gan, prepare=at("training_step", twice, STOP))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_first_step_has_nothing_to_keep(tiny, tmp_path, capsys):
    with pytest.raises(Lost):
        run(tiny, tmp_path, gan, prepare=at("training_step", fail, 1))
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "--ckpt_path last" not in capsys.readouterr().out
