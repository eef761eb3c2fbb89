"""A gradient that is not finite: the step is skipped and written down; too many in a row stop the run."""

import math
from functools import partial

import pytest
import torch

from aligntok.callbacks import SaveCheckpoint
from aligntok.data import Augmentation, LatentDataModule
from aligntok.data.shapes import Shapes
from aligntok.errors import UserError
from aligntok.guard import PendingCheck
from aligntok.stages import LatentAlignment

FUSED = partial(torch.optim.AdamW, fused=True)  # skips a step by itself, on the device
OPTIMIZERS = pytest.mark.parametrize("optimizer", [torch.optim.AdamW, FUSED])
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient not finite, step skipped")  # what these tests provoke


class Record(SaveCheckpoint):
    """Keeps weights, optimizer state and image ids around each batch."""

    def __init__(self):
        super().__init__(every_n_steps=1)
        self.ids, self.weights, self.adam_steps = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append(batch["id"].tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.adam_steps.append([float(state["step"]) for state in trainer.optimizers[0].state.values()])


def fit(tiny, folder, bad_calls, steps, accumulate=1, **options):
    record = Record()
    stage = tiny.stage(LatentAlignment, perceptual=tiny.NaNAt(*bad_calls), adversarial=tiny.gan(weight=0.5), **options)
    trainer = tiny.trainer(folder, steps, [record], accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
    try:
        trainer.fit(stage, datamodule=tiny.data())
    finally:
        record.trainer, record.stage = trainer, stage
    return record


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def rows(folder):
    lines = (folder / "nonfinite_steps.csv").read_text().splitlines()
    return [(int(step), [int(i) for i in ids.split()]) for step, _, ids in (line.split(",") for line in lines)]


@OPTIMIZERS
def test_a_single_step_is_skipped_and_written_down(tiny, tmp_path, optimizer):
    record = fit(tiny, tmp_path, [2], 5, optimizer=optimizer)
    assert not same(record.weights[0], record.weights[1])
    assert same(record.weights[1], record.weights[2])  # generator and discriminator
    assert record.adam_steps[2] == record.adam_steps[1]
    assert not same(record.weights[2], record.weights[3])
    assert rows(tmp_path) == [(2, record.ids[2])]
    assert record.trainer.global_step == 5
    assert record.stage.guard.bad_steps == 0


def test_images_are_named_by_their_places_in_the_source_of_which_some_are_held_out(tiny, tmp_path):
    data = LatentDataModule(Shapes(40, 16), 8, 16, val=0.25, augmentation=Augmentation("center", flip=False))
    record = Record()
    stage = tiny.stage(LatentAlignment, perceptual=tiny.NaNAt(1))
    tiny.trainer(tmp_path, 2, [record]).fit(stage, datamodule=data)
    (step, images), part = rows(tmp_path)[0], data.sources["train"]
    assert images == [int(part.indices[i]) for i in record.ids[step]] != record.ids[step]


def test_with_accumulation_the_whole_step_is_skipped(tiny, tmp_path):
    record = fit(tiny, tmp_path, [3], 3, accumulate=2)  # the second half of the second step
    assert same(record.weights[1], record.weights[3])
    assert not same(record.weights[3], record.weights[5])
    assert rows(tmp_path) == [(1, record.ids[2] + record.ids[3])]
    assert all(p.isfinite().all() for p in record.weights[-1].values())


def test_a_good_step_sets_the_count_back(tiny, tmp_path):
    record = fit(tiny, tmp_path, [0, 1, 3, 4], 6, max_nonfinite_steps=3)
    assert record.trainer.global_step == 6
    assert [step for step, _ in rows(tmp_path)] == [0, 1, 3, 4]


@OPTIMIZERS
def test_too_many_in_a_row_stop_the_run_with_a_good_checkpoint(tiny, tmp_path, optimizer):
    with pytest.raises(
        UserError, match=r"not finite in 3 steps in a row up to (step )?4.*nonfinite_steps\.csv.*--ckpt_path last"
    ):
        fit(tiny, tmp_path, [2, 3, 4], 9, max_nonfinite_steps=3, optimizer=optimizer)
    assert [step for step, _ in rows(tmp_path)] == [2, 3, 4]
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    for tensors in (checkpoint["state_dict"], *checkpoint["optimizer_states"][0]["state"].values()):
        assert all(bool(value.isfinite().all()) for value in tensors.values())
    record = fit_on(tiny, tmp_path, 7)
    assert record.trainer.global_step == 7


def test_a_checkpoint_that_is_not_there_is_not_called_good(tiny, tmp_path):
    with pytest.raises(UserError, match="Start again with a lower learning rate"):
        fit(tiny, tmp_path, [0], 9, max_nonfinite_steps=1)
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_the_optimizer_that_skips_by_itself_takes_the_same_steps(tiny, tmp_path):
    """To the last bit, also where the first step is skipped."""
    one = fit(tiny, tmp_path / "one", [0, 2], 4, optimizer=FUSED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligntok.stages.stage.skips_on_device", lambda optimizer: False)
        two = fit(tiny, tmp_path / "two", [0, 2], 4, optimizer=FUSED)
    assert all(map(same, one.weights, two.weights))
    assert one.adam_steps[-1] == two.adam_steps[-1]


def test_what_a_gpu_finds_is_looked_at_later_but_before_a_checkpoint(tiny, tmp_path):
    stage = tiny.stage(max_nonfinite_steps=3)
    stage.trainer = tiny.trainer(tmp_path, 1)
    stage.guard.pending = [PendingCheck(torch.tensor(True), None, step, [torch.tensor([step])]) for step in range(5)]
    stage.guard.count(stage, keep=3)
    assert rows(tmp_path) == [(0, [0]), (1, [1])]
    with pytest.raises(UserError, match="not finite in 3 steps in a row up to 2"):
        stage.on_save_checkpoint({})


def fit_on(tiny, folder, steps):
    record = Record()
    stage = tiny.stage(LatentAlignment, seed=9, perceptual=tiny.NaNAt(), adversarial=tiny.gan(weight=0.5))
    trainer = tiny.trainer(folder, steps, [record], gradient_clip_val=1.0)
    trainer.fit(stage, datamodule=tiny.data(), ckpt_path=str(folder / "checkpoints/last.ckpt"))
    record.trainer = trainer
    return record


@pytest.mark.parametrize("clip", [None, 1.0])
def test_infinite_gradients_count_too(tiny, tmp_path, clip):
    stage = tiny.stage(learning_rate={0: 1e-3})
    stage.trainer = tiny.trainer(tmp_path, 1)
    stage.log_dict = lambda *_, **__: None
    optimizer = stage.configure_optimizers()["optimizer"]
    for value in (math.inf, math.nan):
        weight = stage.tokenizer.decoder.last_layer
        before = tiny.copies(stage)
        for parameter in stage.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        weight.grad[0] = value
        stage.configure_gradient_clipping(optimizer, clip)
        optimizer.step()
        assert all(torch.equal(now, before[name]) for name, now in tiny.copies(stage).items())
    assert stage.guard.bad_steps == 2


def test_what_the_guard_cannot_do_right_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="gradient_clip_algorithm"):
        tiny.trainer(tmp_path, 1, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(
            tiny.stage(), datamodule=tiny.data()
        )
