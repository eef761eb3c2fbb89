"""What a real Trainer sees: order, resume, ranks, workers, bad files."""

import hashlib
import random
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import FakeData
from torchvision.datasets import ImageFolder as TorchvisionFolder

from aligntok.__main__ import last_message
from aligntok.data import Augmentation, Digits, ImageFolder, LatentDataModule, Shapes
from aligntok.data.images import center_crop, read_image
from aligntok.errors import UserError
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:You requested to overfit")  # a test does so

SIZE = 8


class Noise(Dataset):
    """Images that tell their index by their pixels."""

    classes = ("a", "b")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (10, 14, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 2


class Recorder(pl.LightningModule):
    """Keeps ids and a hash of the images of each training batch, and the ids of each validation batch."""

    def __init__(self, asks_for_steps=False):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))  # its buffers make DDP talk in each forward
        self.asks_for_steps = asks_for_steps
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(record(batch))
        return self.network(batch["image"]).mean()

    def validation_step(self, batch, batch_idx):
        self.network(batch["image"])
        self.val_batches.append(batch["id"].tolist())

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return batch["id"]

    def configure_optimizers(self):
        if self.asks_for_steps:  # builds the loaders before the checkpoint's state is there
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)


def record(batch):
    assert batch["image"].dtype == torch.float32
    return batch["id"].tolist(), hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()[:8]


class SaveAlways(pl.Callback):
    """A checkpoint after each batch, each validation and each epoch."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def save(self, trainer, when):
        batches = len(trainer.lightning_module.train_batches)
        trainer.save_checkpoint(self.folder / f"{batches:02d}_{when}.ckpt")

    def on_train_batch_end(self, trainer, *args):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *args):
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *args):
        self.save(trainer, "epoch")


def trainer(callbacks=(), **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "max_steps": 10,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def module(num_images=26, global_batch_size=8, num_val=5, **options):
    return LatentDataModule(Noise(num_images), global_batch_size, SIZE, val=Noise(num_val), **options)


def flat(batches):
    return list(chain.from_iterable(batches))


def fit(data=None, ckpt_path=None, callbacks=(), recorder=None, **options):
    recorder = recorder or Recorder()
    trainer(callbacks, **options).fit(recorder, datamodule=data or module(), ckpt_path=ckpt_path)
    return recorder.train_batches


# --- resume: 26 images in steps of 8 are 3 steps an epoch


RUNS = {
    "plain": {"max_steps": 8},
    "epochs": {"max_steps": -1, "max_epochs": 3},
    "accumulate": {"max_steps": 5, "accumulate_grad_batches": 2},
    "validate within the epoch": {"max_steps": 7, "limit_val_batches": 1.0, "val_check_interval": 2,
                                  "check_val_every_n_epoch": None},
    "validate at its end": {"max_steps": 7, "limit_val_batches": 1.0},
    "limited epochs": {"max_steps": 8, "limit_train_batches": 2},
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_run_resumed_anywhere_equals_the_uninterrupted_one(tmp_path, run):
    options = RUNS[run]
    whole = fit(callbacks=[SaveAlways(tmp_path)], **options)
    assert len({image_hash for _, image_hash in whole}) == len(whole)
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) >= len(whole)
    for path in checkpoints:
        if run == "accumulate" and path.stem.endswith("epoch"):
            continue  # Lightning 2.6 then takes one batch more into the epoch that is over, and steps on it alone
        taken = int(path.name[:2])
        assert fit(ckpt_path=path, **options) == whole[taken:], path.name


def test_workers_change_no_sample_and_resume_exactly(tmp_path):
    whole = fit(max_steps=8)
    assert fit(module(num_workers=2), callbacks=[SaveAlways(tmp_path)], max_steps=8) == whole
    for batches in (1, 3, 5):
        path = next(tmp_path.glob(f"{batches:02d}_batch.ckpt"))
        assert fit(module(num_workers=2), ckpt_path=path, max_steps=8) == whole[batches:]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_built_before_the_state_is_restored_do_not_restart_the_order(tmp_path, workers):
    whole = fit(callbacks=[SaveAlways(tmp_path)], recorder=Recorder(True))
    path = next(tmp_path.glob("05_batch.ckpt"))
    assert fit(module(num_workers=workers), ckpt_path=path, recorder=Recorder(True)) == whole[5:]


def test_another_batch_size_goes_on_at_the_same_image(tmp_path):
    order = [index for ids, _ in fit(max_steps=3) for index in ids]
    fit(max_steps=1, callbacks=[SaveAlways(tmp_path)])
    path = next(tmp_path.glob("01_batch.ckpt"))
    for batch in (2, 4, 12):
        resumed = fit(module(global_batch_size=batch), ckpt_path=path, max_steps=1 + 36 // batch)
        ids = [index for batch_ids, _ in resumed for index in batch_ids]
        left = (26 - 26 % batch - 8) // batch * batch  # of the first epoch
        assert ids[: min(left, 16)] == order[8 : 8 + min(left, 16)]
        following = ids[left : left + 12]
        assert following == [index for batch_ids, _ in fit(max_steps=6)[3:] for index in batch_ids][:12]


def test_fitting_twice_goes_on_and_a_new_trainer_begins_again():
    whole = fit(max_steps=8)
    data, recorder = module(), Recorder()
    first = trainer(max_steps=4)
    first.fit(recorder, datamodule=data)
    first.fit_loop.epoch_loop.max_steps = 8
    first.fit(recorder, datamodule=data)
    assert recorder.train_batches == whole
    assert fit(data, max_steps=2) == whole[:2]


def test_epochs_have_their_own_order_and_augmentation():
    source = Noise(8)
    data = LatentDataModule(source, 8, SIZE, val=source)
    epochs = [dict(zip(*batch_of(data), strict=True)) for _ in range(3)]
    assert all(set(epoch) == set(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    changed = [epochs[0][index] != epochs[1][index] for index in range(8)]
    assert sum(changed) >= 6  # 2 x 4 crops and flips: rarely the same
    assert epochs[0] == dict(zip(*batch_of(LatentDataModule(source, 8, SIZE, val=source)), strict=True))
    assert epochs[0] != dict(zip(*batch_of(LatentDataModule(source, 8, SIZE, val=source, seed=1)), strict=True))


def batch_of(data):
    data.setup()
    batch = next(iter(data.train_dataloader()))
    return batch["id"].tolist(), [image.numpy().tobytes() for image in batch["image"]]


def test_overfit_batches_repeat_the_same_images():
    batches = fit(module(num_val=16, num_workers=1), max_steps=4, overfit_batches=2)
    assert batches[:2] == batches[2:]


# --- evaluation


def test_each_image_is_evaluated_once_in_order_with_adms_crop():
    data, recorder = module(num_val=13), Recorder()
    trainer(limit_val_batches=1.0).validate(recorder, datamodule=data, verbose=False)
    assert recorder.val_batches == [list(range(8)), list(range(8, 13))]
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    expected = np.asarray(center_crop(Noise(5)[2][0], (SIZE, SIZE))).transpose(2, 0, 1)
    assert torch.equal((batch["image"][2] * 255).round().to(torch.uint8), torch.from_numpy(expected.copy()))
    assert batch["label"].tolist() == [0, 1] * 4


def test_test_and_predict_take_the_validation_images_by_default():
    data, recorder = module(num_val=11), Recorder()
    run = trainer()
    run.test(recorder, datamodule=data, verbose=False)
    assert flat(recorder.val_batches) == list(range(11))
    assert torch.cat(run.predict(recorder, datamodule=data)).tolist() == list(range(11))
    other = LatentDataModule(Noise(16), 8, SIZE, val=Noise(3), test=Noise(4))
    other.setup()
    assert other.num_images("test") == 4


def test_bytes_become_floats_from_0_to_1():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).permute(0, 3, 1, 2)
    batch = module().on_after_batch_transfer({"image": image, "label": torch.zeros(1)}, 0)
    assert torch.allclose(batch["image"].flatten(), torch.tensor([0, 0.2, 1]))
    assert batch["image"].is_contiguous()
    again = module().on_after_batch_transfer(batch, 0)
    assert torch.equal(again["image"], batch["image"])


def test_calibration_images_are_always_the_same_and_not_augmented():
    data = module(26, calibration_images=10)
    data.setup()
    first, second = (list(data.calibration_dataloader()) for _ in range(2))
    ids = torch.cat([batch["id"] for batch in first])
    assert len(set(ids.tolist())) == 10
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def test_preview_is_spread_over_the_validation_images():
    data = module(num_val=9)
    data.setup()
    assert data.preview(3).shape == (3, 3, SIZE, SIZE)
    assert data.preview(20).shape[0] == 9
    assert torch.equal(data.preview(3)[1], data.preview(9)[3])
    assert data.preview(3).min() >= 0
    assert data.preview(3).max() <= 1


def test_holdout_is_taken_from_training_where_val_is_missing():
    data = LatentDataModule(Digits("train"), 8, SIZE)
    data.setup()
    assert (data.num_images("train"), data.num_images("val")) == (1293, 144)
    assert data.classes == [str(i) for i in range(10)]
    assert not set(data.sources["train"].indices) & set(data.sources["val"].indices)


def test_evaluation_of_a_held_out_part_decodes_in_full(tmp_path):
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    data = LatentDataModule(ImageFolder(str(tmp_path)), 2, SIZE)
    data.setup()
    index = int(data.sources["val"].indices[0])
    expected = np.asarray(center_crop(read_image(tmp_path / f"{index}.jpg"), (SIZE, SIZE)))
    assert np.array_equal(data.datasets["val"][0]["image"].numpy(), expected)
    assert data.datasets["train"].source[0][0].size == (8, 8)  # decoded at 1/8
    assert data.sources["train"][0][0].size == (64, 64)  # for calibration


def test_fingerprint_tells_images_and_crop():
    prints = []
    for source, size in ((Noise(5), 8), (Noise(6), 8), (Noise(5), 16)):
        data = LatentDataModule(Noise(16), 8, size, val=source)
        data.setup()
        prints.append(data.fingerprint("val"))
    assert len(set(prints)) == 3


# --- ranks


RANK_RUNS = {  # on two ranks: options of the trainer, global batch size, and whether it goes on from the fourth step
    "fresh": ({}, 8, False),
    "accumulated": ({"accumulate_grad_batches": 2}, 8, False),
    "resumed": ({}, 8, True),
    "resumed_smaller": ({}, 4, True),
}


def fit_on_rank(folder):
    """Return the batches of training and validation of each run on this rank."""
    records = {}
    for name, (options, global_batch_size, resumed) in RANK_RUNS.items():
        options = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), **options}
        recorder, data = Recorder(), module(num_val=9, global_batch_size=global_batch_size)
        path = folder / "04_batch.ckpt" if resumed else None
        trainer(max_steps=7, limit_val_batches=1.0, **options).fit(recorder, datamodule=data, ckpt_path=path)
        records[name] = {"train": recorder.train_batches, "val": recorder.val_batches}
    return records


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Batches of a run on one process, and the records of runs on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = fit(callbacks=[SaveAlways(folder)], max_steps=7)
    first, second = run_ranks(2, fit_on_rank, folder)
    return [ids for ids, _ in alone], {name: (first[name], second[name]) for name in RANK_RUNS}


def merged(ranks):
    """Return the images of each batch over all ranks."""
    assert len(ranks[0]["train"]) == len(ranks[1]["train"])
    return [sorted(a[0] + b[0]) for a, b in zip(ranks[0]["train"], ranks[1]["train"], strict=True)]


def test_two_ranks_of_4_see_the_batches_of_one_of_8(two_ranks):
    alone, records = two_ranks
    assert merged(records["fresh"]) == [sorted(ids) for ids in alone]
    assert all(len(ids) == 4 for rank in records["fresh"] for ids, _ in rank["train"])


def test_accumulated_batches_make_up_the_same_steps(two_ranks):
    alone, records = two_ranks
    halves = merged(records["accumulated"])
    assert [sorted(a + b) for a, b in zip(halves[::2], halves[1::2], strict=True)] == [sorted(ids) for ids in alone]


def test_two_ranks_go_on_where_one_stopped(two_ranks):
    alone, records = two_ranks
    assert merged(records["resumed"]) == [sorted(ids) for ids in alone[4:]]
    smaller = merged(records["resumed_smaller"])
    assert [sorted(a + b) for a, b in zip(smaller[::2], smaller[1::2], strict=False)] == [sorted(alone[4])]


def test_validation_over_two_ranks_counts_each_of_9_images_once(two_ranks):
    _, records = two_ranks
    for ranks in records.values():
        batches = [rank["val"] for rank in ranks]
        assert len(batches[0]) == len(batches[1])
        seen = sorted(index for rank in batches for ids in rank for index in ids)
        assert seen == sorted(list(range(9)) * (len(seen) // 9))


# --- what users get wrong


def picture(path, index=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 images, two of them bad: 1 %."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(200):
        picture(folder / f"{i:03d}.png", i)
    (folder / "005.png").write_bytes(b"")
    (folder / "150.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_named_and_skipped(pictures, capfd, workers):
    source = ImageFolder(str(pictures))
    data, recorder = LatentDataModule(source, 20, SIZE, val=source, num_workers=workers), Recorder()
    trainer(max_steps=10, limit_val_batches=1.0).fit(recorder, datamodule=data)
    assert len(recorder.train_batches) == 10
    assert not {5, 150} & {index for ids, _ in recorder.train_batches for index in ids}
    assert flat(recorder.val_batches) == [i for i in range(200) if i not in (5, 150)]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("aligntok: image skipped")]
    assert len(lines) == 2  # both in training: validation reads the same source
    assert sum("005.png: the file is empty" in line for line in lines) == 1


def test_bad_files_are_counted_over_the_whole_source(tmp_path, capfd):
    """Of 300 images three may be bad, also where all of them are held out."""
    for i in range(300):
        picture(tmp_path / f"{i:03d}.png", i)

    def read(*held):
        data = LatentDataModule(ImageFolder(str(tmp_path)), 20, SIZE, val=0.1)
        data.setup()
        for number in held:
            (tmp_path / f"{data.source_indices('val', [number])[0]:03d}.png").write_bytes(b"")
        return data, sum(len(batch["id"]) for batch in data.val_dataloader())

    assert read(3, 7, 11)[1] == 27
    assert "(3 of 300 so far)" in capfd.readouterr().err
    data, _ = read()
    (tmp_path / f"{data.source_indices('train', [5])[0]:03d}.png").write_bytes(b"")
    with pytest.raises(UserError, match="4 of 300 images cannot be read, more than 1%"):
        next(iter(data.in_order(data.datasets["train"])))


@pytest.mark.parametrize("workers", [0, 1])
def test_raise_is_one_clean_line(pictures, workers):
    source = ImageFolder(str(pictures))
    data = LatentDataModule(source, 20, SIZE, val=source, num_workers=workers, on_bad_image="raise")
    with pytest.raises(UserError) as caught:
        trainer(max_steps=10).fit(Recorder(), datamodule=data)
    message = last_message(caught.value)
    assert message.startswith("cannot read image ")
    assert message.endswith("(on_bad_image is raise)")
    assert "\n" not in message


def test_a_batch_without_a_readable_image_is_left_out_of_evaluation(pictures):
    source = ImageFolder(str(pictures))
    data, recorder = LatentDataModule(source, 1, SIZE, val=source), Recorder()
    trainer(limit_val_batches=1.0).validate(recorder, datamodule=data, verbose=False)
    assert recorder.val_batches == [[i] for i in range(200) if i not in (5, 150)]


def test_preview_replaces_a_bad_image(pictures):
    source = ImageFolder(str(pictures))
    data = LatentDataModule(source, 8, SIZE, val=source)
    data.setup()
    assert data.preview(40).shape[0] == 40  # one of them is number 5, another 150


def setup_error(*args, **options):
    with pytest.raises(UserError) as caught:
        LatentDataModule(*args, **options).setup("fit")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_errors_are_one_line(tmp_path):
    picture(tmp_path / "good" / "a.png")
    good = ImageFolder(str(tmp_path / "good"))
    for i in range(3):
        path = tmp_path / "bad" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert "there is no image folder" in setup_error(ImageFolder(str(tmp_path / "x")), 1, SIZE, val=good)
    assert "holds no image" in setup_error(ImageFolder(str(tmp_path / "empty")), 1, SIZE, val=good)
    assert "holds no image" in setup_error(good, 1, SIZE, val=good, test=ImageFolder(str(tmp_path / "empty")))
    message = setup_error(good, 1, SIZE, val=ImageFolder(str(tmp_path / "bad")))
    assert message.startswith("val: no image can be read (3 of 3 tried); the last: cannot read image ")


def test_batches_that_do_not_divide_or_fill_are_refused():
    assert "26 training images do not fill one step of global_batch_size 32" in setup_error(
        Noise(26), 32, SIZE, val=Noise(4)
    )
    assert "global_batch_size=0" in setup_error(Noise(26), 0, SIZE, val=Noise(4))
    with pytest.raises(UserError, match="global_batch_size 9 is not divisible by 1 devices x 2 accumulated"):
        fit(module(global_batch_size=9), accumulate_grad_batches=2)


def test_an_option_without_effect_is_refused():
    with pytest.raises(UserError, match=r"crop_scale .* no effect on crop center"):
        LatentDataModule(Noise(8), 8, SIZE, augmentation=Augmentation("center", crop_scale=(0.5, 1.0)))


def test_empty_dataset_is_named():
    assert "test holds no image" in setup_error(Noise(8), 8, SIZE, val=Noise(4), test=Noise(0))


def test_classes_with_other_numbers_are_refused(tmp_path):
    for name in ("train/cat", "train/dog", "val/dog", "other/bird"):
        picture(tmp_path / name / "1.png")
    train, val, other = (ImageFolder(str(tmp_path / name)) for name in ("train", "val", "other"))
    message = setup_error(train, 1, SIZE, val=val)
    assert message.startswith("class 'dog' is number 1 of train, but 0 of val")
    (tmp_path / "val" / "cat").mkdir()
    LatentDataModule(train, 1, SIZE, val=ImageFolder(str(tmp_path / "val"))).setup()
    LatentDataModule(train, 1, SIZE, val=other).setup()


# --- torchvision


def test_torchvision_datasets_serve_as_they_are(tmp_path):
    for i in range(8):
        picture(tmp_path / str(i % 2) / f"{i}.png", i)
    for source in (FakeData(8, (3, 12, 10), num_classes=3), TorchvisionFolder(str(tmp_path))):
        data = LatentDataModule(source, 4, SIZE, val=source)
        batches = fit(data, max_steps=2)
        assert sorted(flat(ids for ids, _ in batches)) == list(range(8))
    assert data.classes == ["0", "1"]


def test_torchvision_datasets_with_a_transform_or_other_targets_are_refused():
    tensors = FakeData(8, (3, 12, 10), transform=lambda image: torch.zeros(3, 4, 4))
    assert "FakeData gives (Tensor, " in setup_error(tensors, 4, SIZE, val=tensors)
    boxes = FakeData(8, (3, 12, 10), target_transform=lambda label: label + 0.5)
    assert "gives the label '" in setup_error(boxes, 4, SIZE, val=boxes)


@pytest.mark.parametrize("crop", ["random", "random_resized", "center"])
@pytest.mark.parametrize("size", [8, (8, 12)])
def test_every_crop_gives_the_size_of_the_config(crop, size):
    data = LatentDataModule(Shapes(8, 20), 8, size, val=Shapes(8, 20), augmentation=Augmentation(crop=crop))
    data.setup()
    expected = (8, 8) if size == 8 else size
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape == (8, 3, *expected)
    flips = LatentDataModule(Shapes(8, 20), 8, size, val=Shapes(8, 20), augmentation=Augmentation("center", flip=False))
    flips.setup()
    assert torch.equal(flips.datasets["train"][(3, 1)]["image"], flips.datasets["val"][1]["image"])


def test_random_state_of_the_process_is_left_alone():
    states = [random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()]
    data = module()
    data.setup()
    next(iter(data.val_dataloader()))
    assert data.datasets["train"][(0, 0)] is not None
    assert states[0] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_val_is_images_or_a_share():
    with pytest.raises(UserError, match="val=None: give images, or the share"):
        LatentDataModule(Digits(), global_batch_size=4, image_size=8, val=None)
