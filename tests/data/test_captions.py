"""Captioned images: what a real Trainer gets of them."""

import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

from aligntok.data import Augmentation, CaptionedFolder, Digits, ImageFolder, LatentDataModule
from aligntok.data.dataset import ImageDataset
from aligntok.data.sources import read_item
from aligntok.errors import UserError
from aligntok.randomness import weighted_choice
from tests.data.test_datamodule import SIZE, Recorder, trainer


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8))


class Captioned(Dataset):
    """Pictures with the captions that it is given."""

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return picture(index), self.captions[index]


def folder(path, captions):
    """Write a picture for each caption, in subfolders and beside them; ``None`` writes no text."""
    for i, caption in enumerate(captions):
        stem = path / ("cats" if i % 2 else ".") / f"{i:03d}"
        stem.parent.mkdir(exist_ok=True)
        picture(i).save(stem.with_suffix(".png"))
        if caption is not None:
            stem.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def captions_of(data, epoch, ids):
    return [data[(epoch, i)]["caption"] for i in ids]


class CaptionRecorder(Recorder):
    """Keeps id, caption and a hash of the pixels of each image."""

    def training_step(self, batch, batch_idx):
        pixels = [zlib.crc32(image.numpy().tobytes()) for image in batch["image"]]
        self.train_batches.append(list(zip(batch["id"].tolist(), batch["caption"], pixels, strict=True)))
        return self.network(batch["image"]).mean()


def test_folder_gives_each_image_its_caption(tmp_path):
    texts = ["a fox", "  zwei Füchse\n", "", "line\nline"]
    source = CaptionedFolder(str(folder(tmp_path, texts)))
    names = [name.decode() for name in source.index[1]]
    assert names == ["000.png", "002.png", "cats/001.png", "cats/003.png"]
    assert [list(source[i][1]) for i in range(4)] == [["a fox"], [""], ["zwei Füchse"], ["line\nline"]]
    assert np.array_equal(np.asarray(source[2][0]), np.asarray(picture(1)))
    assert source.classes == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_captions_on_any_number_of_workers_and_resume_exactly(workers, tmp_path):
    source = Captioned([[f"{i} a", f"{i} b", f"{i} c"] for i in range(26)])

    def run(steps, ckpt_path=None):
        recorder = CaptionRecorder()
        data = LatentDataModule(source, 8, SIZE, val=Captioned(["x"] * 8), num_workers=workers)
        run = trainer(max_steps=steps)
        run.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return recorder.train_batches

    whole = run(7)
    assert all(caption.startswith(f"{i} ") for batch in whole for i, caption, _ in batch)
    run(4)
    assert run(7, tmp_path / "4.ckpt") == whole[4:]


def test_choice_is_a_function_of_seed_epoch_and_id_by_the_weights():
    source = Captioned([{"rare": 1, "common": 3, "never": 0}] * 50)
    data = ImageDataset(source, (SIZE, SIZE), Augmentation())
    assert "never" not in captions_of(data, 0, range(50))
    again = ImageDataset(source, (SIZE, SIZE))  # whatever the augmentation
    assert captions_of(again, 7, range(50)) == captions_of(data, 7, range(50))
    assert captions_of(again, 8, range(50)) != captions_of(data, 7, range(50))
    other = ImageDataset(source, (SIZE, SIZE), seed=1)
    assert captions_of(other, 7, range(50)) != captions_of(data, 7, range(50))
    found = Counter(weighted_choice([1, 0, 3], 0, epoch, 5, "caption") for epoch in range(4000))
    assert abs(found[2] / 4000 - 0.75) < 0.03
    assert found[1] == 0


def test_a_caption_given_twice_is_twice_as_likely():
    assert read_item(Captioned([["a", "a", "b"]]), 0)[1] == {"a": 2, "b": 1}


def test_several_captions_of_a_folder_have_weights(tmp_path):
    folder(tmp_path, ["short"] * 3)
    (tmp_path / "000.long.txt").write_text("a long one")
    source = CaptionedFolder(str(tmp_path), {"txt": 0.25, "long.txt": 0.75})
    assert source[0][1] == {"short": 0.25, "a long one": 0.75}
    assert source[1][1] == {"short": 0.25}
    before = source.fingerprint()
    assert CaptionedFolder(str(tmp_path)).fingerprint() != before
    (tmp_path / "000.long.txt").write_text("a longer one")
    assert source.fingerprint() != before


def test_images_without_captions_are_named_counted_and_skipped(tmp_path, capfd):
    texts = ["a fox"] * 200
    texts[3] = None
    source = CaptionedFolder(str(folder(tmp_path, texts)))
    (bad,) = [i for i in range(200) if source.index[1][i] == b"cats/003.png"]
    data = ImageDataset(source, (SIZE, SIZE))
    batch = data.__getitems__(range(200))
    assert bad not in batch["id"].tolist()
    assert len(batch["caption"]) == 199
    words = capfd.readouterr().err
    assert "image skipped (1 of 200 so far): no caption (txt) for image" in words
    assert "003.png" in words
    (tmp_path / "002.txt").write_bytes(b"\xff\xfe\x00caf\xe9")
    data.__getitems__(range(200))
    assert "image skipped (2 of 200 so far): cannot read caption" in capfd.readouterr().err
    (tmp_path / "004.txt").unlink()
    with pytest.raises(UserError, match="3 of 200 images cannot be read, more than 1%; the last: no caption"):
        data.__getitems__(range(200))


@pytest.mark.parametrize("missing", [None, [], {}])
def test_a_caption_that_a_dataset_does_not_give_is_named(missing, capfd):
    data = ImageDataset(Captioned([missing, *["x"] * 199]), (SIZE, SIZE))
    assert data[0] is None
    assert "image 0 of Captioned has no caption" in capfd.readouterr().err
    assert data[1]["caption"] == "x"


@pytest.mark.parametrize("captions", [{"a": -1.0}, {"a": 0}, {"a": float("nan")}, {"a": 1, "b": float("inf")}])
def test_weights_that_are_none_are_refused(captions):
    with pytest.raises(UserError, match="captions with weights"):
        CaptionedFolder("images", captions)
    with pytest.raises(UserError, match="Captioned gives captions with weights"):
        ImageDataset(Captioned([captions]), (SIZE, SIZE), on_bad_image="raise")[0]


def test_what_is_neither_label_nor_caption_is_named():
    with pytest.raises(UserError, match=r"Captioned gives the label '\[1, 2\]', neither a whole number nor a caption"):
        ImageDataset(Captioned([[1, 2]]), (SIZE, SIZE), on_bad_image="raise")[0]
    mixed = ImageDataset(Captioned(["a", 3]), (SIZE, SIZE))
    with pytest.raises(UserError, match="some images have labels and others captions"):
        mixed.__getitems__([0, 1])


def test_labelled_images_are_as_they_were():
    data = LatentDataModule(Digits(), 8, SIZE)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"image", "label", "id"}


def test_a_folder_of_classes_and_one_of_captions_leave_files_out_by_name(tmp_path, capfd):
    folder(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "readme.md").write_text("x")
    assert len(CaptionedFolder(str(tmp_path))) == 4
    words = capfd.readouterr().err
    assert "1 .md" in words
    assert ".txt" not in words
    with pytest.raises(UserError, match="holds images in folders"):
        len(ImageFolder(str(tmp_path)))
    with pytest.raises(UserError, match="there is no image folder"):
        len(CaptionedFolder(str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        len(CaptionedFolder(str(tmp_path / "empty")))
