import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

from aligntok.data import Digits, ImageFolder, Shapes
from aligntok.data.dataset import reduced
from aligntok.data.mixture import split_holdout
from aligntok.data.sources import Subset, read_item, source_id
from aligntok.errors import UserError
from tests.ranks import run_ranks


def save(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def names(source):
    return [os.fsdecode(name) for name in source.index[1]]


def labels(source):
    return [source[i][1] for i in range(len(source))]


# --- folders


def test_class_folders_are_numbered_by_name_and_searched_to_any_depth(tmp_path):
    save(tmp_path / "b" / "1.png", 10)
    save(tmp_path / "a" / "deep" / "er" / "2.JPEG", 20)
    save(tmp_path / "a" / "1.png", 30)
    source = ImageFolder(str(tmp_path))
    assert source.classes == ["a", "b"]
    assert names(source) == ["a/1.png", "a/deep/er/2.JPEG", "b/1.png"]
    assert labels(source) == [0, 0, 1]
    assert source[0][0].getpixel((0, 0)) == (30, 0, 0)
    assert source[2][0].size == (8, 6)


def test_flat_folder_has_label_0_and_no_classes(tmp_path):
    for name in ("c.png", "a.jpg", "ä ö.webp"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    source = ImageFolder(str(tmp_path))
    assert source.classes == []
    assert names(source) == ["a.jpg", "c.png", "ä ö.webp"]
    assert labels(source) == [0, 0, 0]


def test_class_folder_without_images_keeps_its_number(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    save(tmp_path / "c" / "1.png")
    source = ImageFolder(str(tmp_path))
    assert source.classes == ["a", "b", "c"]
    assert labels(source) == [0, 2]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "a" / ".thumbnails" / "1.png")
    save(tmp_path / ".cache" / "1.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"a Mac was here")
    (tmp_path / ".beside.png").write_bytes(b"")
    source = ImageFolder(str(tmp_path))
    assert source.classes == ["a"]
    assert names(source) == ["a/1.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    store = tmp_path / "store"
    save(store / "cats" / "1.png")
    save(store / "single.png")
    root = tmp_path / "root"
    (root / "dogs").mkdir(parents=True)
    (root / "cats").symlink_to(store / "cats")
    (root / "dogs" / "one.png").symlink_to(store / "single.png")
    (root / "dogs" / "more").symlink_to(store / "cats")
    (root / "dogs" / "again").symlink_to(store / "cats")
    (root / "dogs" / "circle").symlink_to(root / "dogs")
    (root / "dogs" / "gone.png").symlink_to(store / "gone.png")
    found = names(ImageFolder(str(root)))
    assert found == ["cats/1.png", "dogs/again/1.png", "dogs/gone.png", "dogs/one.png"]


def test_missing_empty_and_mixed_folders_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no image folder .*nowhere.*data\.train\.root"):
        len(ImageFolder(str(tmp_path / "nowhere")))
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"empty holds no image.*\.jpg"):
        len(ImageFolder(str(tmp_path / "empty")))
    save(tmp_path / "mixed" / "a" / "1.png")
    save(tmp_path / "mixed" / "stray.png")
    with pytest.raises(UserError, match=r"folders \(a/1\.png\) and beside them \(stray\.png\)") as caught:
        len(ImageFolder(str(tmp_path / "mixed")))
    assert "\n" not in str(caught.value)


def test_other_files_are_counted_in_a_line(tmp_path, capsys):
    for name in ("a/1.png", "b/2.JPG", "b/3.gif", "b/4.GIF", "a/5.avif", "a/deep/notes", "a/.DS_Store", "Thumbs.db"):
        save(tmp_path / "1.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "1.png").rename(tmp_path / name)
    for _ in range(2):  # said once
        assert names(ImageFolder(str(tmp_path))) == ["a/1.png", "b/2.JPG"]
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: files left out: 2 .gif, 1 .db, 1 .avif, 1 without a suffix (read are .jpg," in said


def test_what_leads_to_itself_is_no_folder(tmp_path):
    save(tmp_path / "a" / "1.png")
    for name in ("loop", "b.png", "a/loop", "a/c.png"):
        (tmp_path / name).symlink_to(Path(name).name)
    os.mkfifo(tmp_path / "a" / "d.png")
    with pytest.raises(UserError, match=r"beside them \(b\.png\)"):
        len(ImageFolder(str(tmp_path)))
    (tmp_path / "b.png").unlink()
    source = ImageFolder(str(tmp_path))
    assert names(source) == ["a/1.png", "a/c.png", "a/d.png"]
    assert len(source.fingerprint()) == 16
    for number in (1, 2):
        with pytest.raises(UserError, match=r"cannot read image"):
            source[number]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_folder_is_named(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot read image folder .*a: Permission denied"):
            len(ImageFolder(str(tmp_path)))
    finally:
        (tmp_path / "a").chmod(0o700)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ImageFolder("~")) == 1


def test_reduced_folder_decodes_coarser_and_leaves_the_other_alone(tmp_path):
    save(tmp_path / "a.jpg", size=(256, 128))
    source = ImageFolder(str(tmp_path))
    small = reduced(Subset(source, [0]), 32)
    assert small[0][0].size == (64, 32)
    assert source[0][0].size == (256, 128)


# --- fingerprints


def test_fingerprint_changes_with_a_file_and_not_with_the_place(tmp_path):
    for i in range(3):
        save(tmp_path / "here" / "a" / f"{i}.png", i, size=(8 + i, 8))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (str(tmp_path / name) for name in ("here", "there"))
    first = ImageFolder(here).fingerprint()
    assert first == ImageFolder(there).fingerprint()
    (tmp_path / "there" / "a" / "1.png").rename(tmp_path / "there" / "a" / "x.png")
    renamed = ImageFolder(there).fingerprint()
    (tmp_path / "here" / "a" / "1.png").write_bytes(b"another size")
    assert len({first, renamed, ImageFolder(here).fingerprint()}) == 3


def test_every_source_has_an_id_that_depends_on_its_images(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")

    class Own(torch.utils.data.Dataset):
        """No fingerprint, no repr: the default one is an address in memory."""

        def __init__(self, value):
            self.value = value

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.new("RGB", (4, 4), (self.value, index, 0)), 0

    sources = [
        Own(1),
        Own(2),
        Digits("train"),
        Digits("val"),
        Shapes(24, 16),
        Shapes(24, 16, seed=1),
        Shapes(25, 16),
        FakeData(20, (3, 8, 8)),
        FakeData(20, (3, 9, 8)),
        Subset(Shapes(24, 16), [0, 1]),
        Subset(Shapes(24, 16), [0, 2]),
        ImageFolder(str(tmp_path)),
    ]
    ids = [source_id(source) for source in sources]
    assert len(set(ids)) == len(sources)
    assert ids == [source_id(source) for source in sources]
    assert source_id(Own(1)) == ids[0]


def test_ids_are_the_same_in_another_process():
    subset = Subset(Digits("val"), [0, 5])
    assert run_ranks(1, source_id, subset) == [source_id(subset)]


# --- holdout


def test_holdout_is_disjoint_complete_and_always_the_same():
    source = Digits("train")
    train, val = split_holdout(source, 0.1)
    assert len(val) == 144
    assert sorted([*train.indices, *val.indices]) == list(range(1437))
    assert val.classes == source.classes
    assert np.array_equal(val.indices, split_holdout(Digits("train"), 0.1)[1].indices)
    assert val[3][1] == source[int(val.indices[3])][1]
    assert set(labels(val)) == set(range(10))  # spread over the set, not its end


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001, -1, 2])
def test_holdout_of_nothing_or_all_is_refused(share):
    with pytest.raises(UserError, match=r"val=.* name images"):
        split_holdout(Shapes(20, 8), share)


# --- items of other datasets


def one(item):
    return [item]


@pytest.mark.parametrize("label", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_labels_are_whole_numbers_of_any_library(label):
    assert read_item(one((Image.new("L", (1, 1)), label)), 0)[1] == 3


@pytest.mark.parametrize("label", [3.0, [1, 2], torch.tensor([1, 2]), {"boxes": []}])
def test_other_labels_are_refused(label):
    with pytest.raises(UserError, match=r"list gives the label .*target_transform"):
        read_item(one((Image.new("L", (1, 1)), label)), 0)


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ((torch.zeros(3, 4, 4), 0), r"\(Tensor, int\)"),
        ((np.zeros((4, 4, 3)), 0), r"\(ndarray, int\)"),
        (Image.new("L", (1, 1)), r"\(Image\)"),
        ({"image": 0}, r"\(dict\)"),
        ((Image.new("L", (1, 1)), 0, 0), r"\(Image, int, int\)"),
    ],
)
def test_other_items_are_refused(item, kind):
    with pytest.raises(UserError, match=rf"list gives {kind}, not \(PIL image, label or caption\)"):
        read_item(one(item), 0)


def test_digits_are_two_disjoint_parts():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    image, label = val[0]
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    assert np.asarray(image).max() == 255
    assert 0 <= label < 10


def test_a_cache_is_split_as_its_source_though_images_without_a_row_are_missing():
    _, val = split_holdout(Digits("train"), 0.1)
    count = len(Digits("train"))
    ids = np.setdiff1d(np.arange(count), [0, 3, 5, int(val.indices[0])])
    train, held = split_holdout(Digits("train"), 0.1, ids, count)
    assert ids[held.indices].tolist() == val.indices[1:].tolist()
    assert len(train) + len(held) == len(ids)
    smaller = split_holdout(Digits("train"), 0.01, ids, count)[1]
    assert set(smaller.indices) < set(held.indices)  # a generator may hold out less than its tokenizer did


def test_an_empty_root_is_not_the_current_folder(tmp_path, monkeypatch):
    save(tmp_path / "1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="root of an image folder is empty"):
        ImageFolder("")
    assert len(ImageFolder(".")) == 1
