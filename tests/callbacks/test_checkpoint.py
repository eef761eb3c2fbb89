"""When a run saves itself, and that nothing half-written replaces a good file."""

import errno
import os
import zipfile
from contextlib import nullcontext
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.callbacks.checkpoint import check_room
from aligntok.callbacks.measurement import Measurement
from aligntok.callbacks.progress import MetricsCSV
from aligntok.errors import UserError
from aligntok.files import read_json
from aligntok.stages import LatentAlignment


class Count(SaveCheckpoint):
    """Notes which batches, counted from 1 over the run, wrote which files."""

    def __init__(self, **options):
        super().__init__(**options)
        self.writes = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        save = trainer.save_checkpoint
        trainer.save_checkpoint = lambda path, *a, **k: (
            self.writes.append((trainer.fit_loop.total_batch_idx + 1, path.name)),
            save(path, *a, **k),
        )
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        trainer.save_checkpoint = save


def fit(tiny, folder, callback, max_steps=5, **options):
    data = tiny.data(26)  # three steps per epoch
    stage = tiny.stage(LatentAlignment)
    trainer = tiny.trainer(folder, max_steps, [callback], **options)
    trainer.fit(stage, datamodule=data)
    return trainer


def test_saves_when_due_and_at_the_end(tiny, tmp_path):
    callback = Count(every_n_steps=2, keep_every_n_steps=3)
    fit(tiny, tmp_path, callback)
    assert callback.writes == [(step, "last.ckpt") for step in (2, 3, 4, 5)]
    steps = {
        path.name: torch.load(path, weights_only=True)["global_step"] for path in (tmp_path / "checkpoints").iterdir()
    }
    assert steps == {"last.ckpt": 5, "step_0000003.ckpt": 3}


def test_a_checkpoint_that_is_kept_is_not_written_twice(tiny, tmp_path):
    fit(tiny, tmp_path, SaveCheckpoint(every_n_steps=2, keep_every_n_steps=2), max_steps=2)
    first, second = (tmp_path / "checkpoints").iterdir()
    assert first.samefile(second)


class Scripted(Measurement):
    """Measures what it is told, at each step."""

    needs = ()

    def __init__(self, *values):
        self.values = values

    def finish(self, trainer, module):
        return {"score": self.values[trainer.global_step - 1]}


@pytest.mark.parametrize(
    ("keep_best", "kept"), [("val/score", {2: 4.0, 3: 5.0, 6: 6.0}), ("-val/score", {2: 3.0, 3: 3.0, 6: -1.0})]
)
@pytest.mark.parametrize("every", [1, 1000])  # what is best is saved anyway, or only because it is
def test_the_best_step_stays_over_a_resume(tiny, tmp_path, keep_best, kept, every):
    scores, best = (3.0, 4.0, 5.0, 4.0, -1.0, 6.0), tmp_path / "checkpoints" / "best.ckpt"
    for steps, value in kept.items():
        last = tmp_path / "checkpoints" / "last.ckpt"
        callbacks = [EMA(0.5), Scripted(*scores), SaveCheckpoint(every, keep_best=keep_best)]
        trainer = tiny.trainer(tmp_path, steps, callbacks, val_check_interval=1, limit_val_batches=1)
        trainer.fit(tiny.stage(LatentAlignment), tiny.data(26), ckpt_path=last if last.exists() else None)
        step = scores.index(value) + 1
        assert read_json(best.with_name("best.json"), dict) == {"metric": keep_best, "value": value, "step": step}
        content = torch.load(best, weights_only=True)
        assert content["global_step"] == step
        assert best.samefile(last) == (step == steps)
    alone = tmp_path / "alone"
    tiny.trainer(alone, step, [EMA(0.5), SaveCheckpoint()]).fit(tiny.stage(LatentAlignment), tiny.data(26))
    there = torch.load(alone / "checkpoints" / "last.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        tiny.assert_same(content[key], there[key], key)


def test_a_measure_that_nothing_measures_is_named(tiny, tmp_path):
    callbacks = [Scripted(1.0), SaveCheckpoint(keep_best="val/psrn")]
    trainer = tiny.trainer(tmp_path, 1, callbacks, val_check_interval=1, limit_val_batches=1)
    with pytest.raises(UserError, match=r"no val/psrn is measured, but .*val/score"):
        trainer.fit(tiny.stage(LatentAlignment), tiny.data(26))


def test_the_last_step_of_max_epochs_is_saved(tiny, tmp_path):
    callback = Count(every_n_steps=1000)
    fit(tiny, tmp_path, callback, max_steps=-1, max_epochs=2)
    assert callback.writes == [(6, "last.ckpt")]


def test_never_in_the_middle_of_an_accumulation(tiny, tmp_path):
    """There the gradients of the first batches would be lost, and the resumed step be another one."""
    callback = Count(every_n_steps=1000, keep_every_n_steps=2)
    fit(tiny, tmp_path, callback, accumulate_grad_batches=2)
    assert callback.writes == [(4, "last.ckpt"), (8, "last.ckpt"), (10, "last.ckpt")]


def test_fast_dev_run_writes_nothing(tiny, tmp_path):
    callback = Count(every_n_steps=1)
    fit(tiny, tmp_path, callback, fast_dev_run=2)
    assert callback.writes == []


def test_a_run_that_something_else_ends_saves_its_last_step(tiny, tmp_path):
    class Enough(pl.Callback):
        """As `trainer.max_time` does."""

        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 2

    data, stage = tiny.data(26), tiny.stage(LatentAlignment)
    tiny.trainer(tmp_path, 5, [SaveCheckpoint(), Enough()]).fit(stage, data)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_room_for_a_checkpoint_is_looked_for_before_the_first_step(tiny, tmp_path, monkeypatch):
    left = SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: left)
    with pytest.raises(
        UserError, match=r"takes about 0.0 GB, and the disk of .*checkpoints has 0.0 GB left: free some"
    ):
        fit(tiny, tmp_path, SaveCheckpoint())
    left.free = 10_000_000
    trainer = fit(tiny, tmp_path, SaveCheckpoint(), max_steps=1)
    with zipfile.ZipFile(tmp_path / "checkpoints" / "last.ckpt") as file:
        size = sum(entry.file_size for entry in file.infolist() if "/data/" in entry.filename)
    for left.free, enough in ((size + 1, True), (int(0.95 * size), False)):
        with nullcontext() if enough else pytest.raises(UserError, match="GB left"):
            check_room(tmp_path / "last.ckpt", trainer, trainer.lightning_module)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch, where):
    trainer = fit(tiny, tmp_path, SaveCheckpoint(), max_steps=1)
    path = tmp_path / "checkpoints/last.ckpt"
    before = path.read_bytes()

    def full(*args):
        if where == "torch.save":
            args[1].write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: the disk is full; .*untouched"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]  # no .partial


def test_reading_runs_no_code_whatever_is_asked(tiny, tmp_path):
    trainer = fit(tiny, tmp_path, SaveCheckpoint(), max_steps=1)
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "evil": Touch(str(tmp_path / "ran"))}, path)
    with pytest.raises(UserError, match="refused"):
        trainer.strategy.load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "ran").exists()


class Touch:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def logged(folder, *rows):
    logger = MetricsCSV(folder)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
        logger.save()
    logger.finalize("success")
    return logger.path.read_bytes().decode()


def test_metrics_have_a_column_for_each_name_and_go_on_from_the_resumed_step(tmp_path):
    first = logged(
        tmp_path, (0, {"train/loss": 0.5}), (1, {"train/loss": 0.25}), (1, {"val/psnr": 20.0}), (2, {"z": 1})
    )
    assert first == "step,train/loss,val/psnr,z\r\n0,0.5,,\r\n1,0.25,,\r\n1,,20.0,\r\n2,,,1\r\n"
    resumed = logged(tmp_path, (1, {"train/loss": torch.tensor(0.125)}), (2, {"a": 3}))
    assert resumed == "a,step,train/loss,val/psnr,z\r\n,0,0.5,,\r\n,1,0.125,,\r\n3,2,,,\r\n"


@pytest.mark.parametrize(
    "torn",
    [b"20,0.", b"20,0.5,", b"20", b",,\r\n", b"2,0.1", b"20,\0\0\0\r\n", b"20,0.5,0.1,0.2\r\n", b"\xff\xfe,1\r\n"],
)
def test_a_line_that_is_not_whole_does_not_block_the_resume(tmp_path, torn):
    """As a kill, a power failure, or two runs in one folder leave them; another line may be glued to it."""
    (tmp_path / "metrics.csv").write_bytes(b"step,train/loss,z\r\n10,0.5,\r\n" + torn)
    text = logged(tmp_path, (30, {"train/loss": 0.1}))
    kept = [line for line in text.splitlines() if line not in ("step,train/loss,z", "10,0.5,", "30,0.1,")]
    assert kept in ([], ["20,\ufffd"])


@pytest.mark.parametrize("cut", range(1, 31))
def test_a_line_that_was_cut_short_is_dropped(tmp_path, cut):
    """Wherever it was cut: `120` may have been cut from `1200`. A cut header leaves nothing."""
    whole = "step,train/loss\r\n10,0.5\r\n120,0.25\r\n"
    (tmp_path / "metrics.csv").write_bytes(whole[:-cut].encode())
    kept = [line for line in whole[:-cut].split("\n")[:-1] if line[0].isdigit()]
    text = logged(tmp_path, (1300, {"train/loss": 0.1}))
    assert text.splitlines() == ["step,train/loss", *(line.strip() for line in kept), "1300,0.1"]


def test_a_full_disk_is_named_where_metrics_are_written(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.path.symlink_to("/dev/full")
    logger.columns = ["step", "a"]
    logger.log_metrics({"a": 1}, 0)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.csv: the disk is full"):
        logger.save()
