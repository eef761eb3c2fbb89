"""Bad steps that do not end: a spike is skipped, and after too many the run goes back to its last checkpoint."""

import csv
import shutil

import pytest
import torch

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.callbacks.progress import MetricsCSV
from aligntok.errors import UserError
from aligntok.guard import Guard
from aligntok.stages import LatentAlignment

SAVED, BAD, END = 3, (4, 5), 8  # step of the checkpoint; batches, from 0, with a bad gradient; last step
WEIGHTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
pytestmark = pytest.mark.filterwarnings("ignore:.*(step skipped|goes back)")


class Huge(torch.nn.Module):
    """A perceptual loss with a gradient a thousand times too large at the given calls."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, image, reference):
        self.count += 1
        return (image - reference).square().mean() * (1e3 if self.count - 1 in self.calls else 1.0)


def fit(tiny, folder, steps, perceptual=None, resume=False, every=SAVED, **options):
    adversarial = tiny.gan(norm="batch", weight=0.1)
    options = {"learning_rate": {0: 0.0, 2: 2e-3, 7: 1e-4}, "max_nonfinite_steps": 2, **options}
    stage = tiny.stage(LatentAlignment, perceptual=perceptual or tiny.NaNAt(), adversarial=adversarial, **options)
    callbacks = [EMA([0.5, 0.9]), SaveCheckpoint(every_n_steps=every)]
    logger = MetricsCSV(folder)
    trainer = tiny.trainer(folder, steps, callbacks, gradient_clip_val=1.0, logger=logger, log_every_n_steps=1)
    path = folder / "checkpoints" / "last.ckpt"
    trainer.fit(stage, tiny.data(26), ckpt_path=str(path) if resume else None)  # three steps per epoch
    return stage, torch.load(path, weights_only=True)


def test_a_run_that_goes_back_is_a_resume_that_skips_the_bad_batches(tiny, tmp_path):
    """In weights, averages, optimizer, schedule, statistics of batch norms, place in the data, and curves."""
    stage, ours = fit(tiny, tmp_path / "ours", END, tiny.NaNAt(*BAD), max_rollbacks=1)
    assert stage.guard.rollbacks == ours["guard"]["rollbacks"] == 1
    _, saved = fit(tiny, tmp_path / "fresh", SAVED)
    _, later = fit(tiny, tmp_path / "later", BAD[-1] + 1)
    loops = later["loops"]["fit_loop"]
    for key in ("epoch_loop.automatic_optimization.optim_progress", "epoch_loop.state_dict"):
        loops[key] = saved["loops"]["fit_loop"][key]
    where = {key: later[key] for key in ("loops", "LatentDataModule", "epoch")}
    torch.save(saved | where, tmp_path / "fresh" / "checkpoints" / "last.ckpt")
    _, fresh = fit(tiny, tmp_path / "fresh", END, resume=True)
    for key in (*WEIGHTS, "LatentDataModule", "averages"):
        tiny.assert_same(ours[key], fresh[key], key)
    with (tmp_path / "ours" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == list(range(END))


def test_bad_steps_that_come_again_end_the_run(tiny, tmp_path):
    """With what was undone counted over a resume, and the bad images behind it."""
    with pytest.raises(UserError, match="went back to a checkpoint 1 times before"):
        fit(tiny, tmp_path, END, tiny.NaNAt(*BAD, 6, 7), max_rollbacks=1)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == SAVED
    place = saved["LatentDataModule"]
    assert 3 * place["epoch"] + place["image"] // 8 == BAD[-1] + 1  # batches of 8, three per epoch
    stage, ours = fit(tiny, tmp_path, END, resume=True, max_rollbacks=1)
    assert stage.guard.rollbacks == ours["guard"]["rollbacks"] == 1


def test_a_kill_after_a_rollback_does_not_lead_into_the_bad_images_again(tiny, tmp_path, monkeypatch):
    """The checkpoint that it went back to is written anew, with the place in the data where it goes on."""

    def killed(*args, **options):
        save(*args, **options)
        raise KeyboardInterrupt

    save = SaveCheckpoint.save_where_due
    monkeypatch.setattr(
        SaveCheckpoint, "save_where_due", lambda self, trainer, now: (killed if now else save)(self, trainer, now)
    )
    with pytest.raises(SystemExit):
        fit(tiny, tmp_path / "cut", END, tiny.NaNAt(*BAD), max_rollbacks=1)
    monkeypatch.undo()
    resumed = fit(tiny, tmp_path / "cut", END, resume=True, max_rollbacks=1)[1]
    whole = fit(tiny, tmp_path / "whole", END, tiny.NaNAt(*BAD), max_rollbacks=1)[1]
    for key in (*WEIGHTS, "LatentDataModule", "guard"):
        tiny.assert_same(resumed[key], whole[key], key)


def test_the_last_step_is_not_undone(tiny, tmp_path):
    stage, ours = fit(tiny, tmp_path, BAD[-1] + 1, tiny.NaNAt(*BAD), max_rollbacks=1)
    assert stage.guard.rollbacks == 0
    assert ours["global_step"] == BAD[-1] + 1


def test_no_checkpoint_is_written_between_bad_steps(tiny, tmp_path):
    """Else it would go back to weights that may be bad themselves."""
    _, ours = fit(tiny, tmp_path, END, tiny.NaNAt(3, 4, 5), every=1, max_rollbacks=1, max_nonfinite_steps=3)
    assert ours["guard"]["rollbacks"] == 1
    shutil.rmtree(tmp_path)
    other, _ = fit(tiny, tmp_path, END, tiny.NaNAt(3, 4), every=1, max_rollbacks=1, max_nonfinite_steps=3)
    assert other.guard.rollbacks == 0


def test_a_spike_is_skipped(tiny, tmp_path):
    options = {"max_norm_ratio": 20.0, "norm_memory": 2}
    _, ours = fit(tiny, tmp_path / "spike", 5, Huge(3), **options)
    _, nan = fit(tiny, tmp_path / "nan", 5, tiny.NaNAt(3), **options)
    for key in WEIGHTS:
        tiny.assert_same(ours[key], nan[key], key)
    assert {float(count) for _, count in ours["guard"]["usual"].values()} == {4.0}
    assert (tmp_path / "spike" / "nonfinite_steps.csv").read_text().startswith("3,0,")
    _, taken = fit(tiny, tmp_path / "off", 5, Huge(3))
    assert "guard" not in taken
    key = "tokenizer.decoder.conv_out.weight"
    assert not torch.equal(taken["state_dict"][key], ours["state_dict"][key])


def test_the_usual_norm_goes_on_with_a_resume(tiny, tmp_path):
    options = {"max_norm_ratio": 20.0, "norm_memory": 2}
    _, whole = fit(tiny, tmp_path / "whole", 5, **options)
    fit(tiny, tmp_path / "cut", SAVED, **options)
    _, resumed = fit(tiny, tmp_path / "cut", 5, resume=True, **options)
    tiny.assert_same(resumed["guard"], whole["guard"])


def test_no_norm_is_a_spike_before_there_is_a_usual_one():
    guard = Guard(max_norm_ratio=2.0, norm_memory=3)
    found = [bool(guard.is_bad({"a": torch.tensor(1.0), "b": torch.tensor(b)})) for b in (1.0, 50.0, 1.0, 50.0, 1.0)]
    assert found == [False, False, False, True, False]


@pytest.mark.parametrize(("name", "value"), [("max_norm_ratio", 1.0), ("norm_memory", 0), ("max_rollbacks", -1)])
def test_numbers_without_sense_are_refused(tiny, name, value):
    with pytest.raises(UserError, match=name):
        tiny.stage(**{name: value})
