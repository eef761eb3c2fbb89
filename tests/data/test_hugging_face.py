"""Datasets of Hugging Face: parquet and arrow files, columns, what is missing."""

import builtins
import io

import numpy as np
import pytest

from aligntok.data import HuggingFaceDataset, LatentDataModule
from aligntok.data.dataset import ImageDataset
from aligntok.errors import UserError
from tests.data.test_captions import picture
from tests.data.test_datamodule import SIZE

datasets = pytest.importorskip("datasets")


def encoded(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def table():
    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(20)],
        "caption": [f"caption {i}" for i in range(20)],
        "alts": [[f"alt {i}", "x"] for i in range(20)],
        "size": list(range(20)),
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def folders(table, tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    table.to_parquet(root / "parquet/train-00000-of-00001.parquet")
    table.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(root / "splits")
    return root


@pytest.mark.parametrize("kind", ["parquet", "saved", "splits"])
def test_images_and_captions_are_those_of_the_table(folders, kind):
    source = HuggingFaceDataset(str(folders / kind), {"caption": 0.5, "alts": 0.5})
    assert len(source) == 20
    image, captions = source[7]
    assert np.array_equal(np.asarray(image), np.asarray(picture(7)))
    assert captions == {"caption 7": 0.5, "alt 7": 0.25, "x": 0.25}


def test_splits_and_batches(folders):
    assert len(HuggingFaceDataset(str(folders / "splits"), split="test")) == 3
    data = LatentDataModule(HuggingFaceDataset(str(folders / "saved")), 4, SIZE, num_workers=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    ids = data.source_indices("train", batch["id"].tolist())
    assert batch["caption"] == [f"caption {i}" for i in ids]


def test_bad_rows_are_named_and_skipped(tmp_path, capfd):
    images = [{"bytes": encoded(0), "path": None}] * 197
    images += [{"bytes": b"none", "path": None}, {"bytes": None, "path": "no.png"}, None]
    rows = {"image": images, "caption": ["x"] * 200}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "table")
    data = ImageDataset(HuggingFaceDataset(str(tmp_path / "table")), (SIZE, SIZE))
    assert data.__getitems__(range(0, 199, 198))["id"].tolist() == [0]
    assert "cannot read image 198 of dataset" in capfd.readouterr().err
    data[197]
    assert "the file is no image" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"3 of 200 images .* holds NoneType, no file"):
        data[199]


def test_what_is_missing_is_named(folders, monkeypatch):
    with pytest.raises(UserError, match=r"has no column text: it has \['image', 'caption'"):
        len(HuggingFaceDataset(str(folders / "saved"), "text"))
    with pytest.raises(UserError, match=r"cannot load split val of dataset .* check name and split"):
        len(HuggingFaceDataset(str(folders / "splits"), split="val"))
    with pytest.raises(UserError, match=r"neither a text nor a list of texts"):
        HuggingFaceDataset(str(folders / "saved"), "size")[1]
    real = builtins.__import__

    def without(name, *args):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'aligntok\[datasets\]'"):
        len(HuggingFaceDataset("any"))
