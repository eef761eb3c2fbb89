import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from aligntok.__main__ import last_message
from aligntok.data.dataset import Augmentation, ImageDataset
from aligntok.data.folders import ImageFolder
from aligntok.data.loaders import as_it_is
from aligntok.errors import UserError

SIZE = (16, 16)


def noise(seed, size=(24, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder(path, count, bad=()):
    for i in range(count):
        noise(i).save(path / f"{i:04d}.png")
    for index, content in bad:
        (path / f"{index:04d}.png").write_bytes(content)
    return ImageFolder(str(path))


def truncated(path):
    return path.read_bytes()[:400]


def dataset(source, replace_bad=True, on_bad_image="skip", seed=0):
    return ImageDataset(source, SIZE, Augmentation(), seed, replace_bad, on_bad_image)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """400 images, four of them bad in different ways: exactly 1 %."""
    path = tmp_path_factory.mktemp("large")
    folder(path, 400)
    (path / "0007.png").write_bytes(b"")
    (path / "0008.png").write_bytes(b"<html>404</html>")
    (path / "0100.png").write_bytes(truncated(path / "0100.png"))
    (path / "0399.png").write_bytes(bytes(1000))
    return ImageFolder(str(path))


def test_sample_is_a_function_of_seed_epoch_and_index(tmp_path):
    source = folder(tmp_path, 3)
    first = dataset(source)[(0, 1)]
    assert first["image"].shape == (16, 16, 3)
    assert first["image"].dtype == torch.uint8
    assert (first["label"], first["id"]) == (0, 1)
    data = dataset(source)
    data[(5, 2)]
    random.random()
    torch.manual_seed(3)
    assert torch.equal(data[(0, 1)]["image"], first["image"])
    others = [dataset(source)[(epoch, 1)]["image"] for epoch in range(1, 6)]
    assert sum(torch.equal(other, first["image"]) for other in others) == 0
    assert not torch.equal(dataset(source, seed=1)[(0, 1)]["image"], first["image"])


def test_a_batch_has_channels_first_and_leaves_bad_images_out(tmp_path):
    data = dataset(folder(tmp_path, 200, bad=[(1, b"")]), replace_bad=False)
    batch = data.__getitems__([(0, 0), (0, 1), (0, 2)])
    assert batch["image"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["image"][1, 2], data[(0, 2)]["image"][..., 2])
    assert batch["id"].tolist() == [0, 2]
    assert batch["label"].dtype == torch.int64
    assert data.__getitems__([(0, 1)]) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_and_counted_once_and_replaced_in_training(large, capfd, workers):
    data = dataset(large)
    loader = DataLoader(data, 16, num_workers=workers, collate_fn=as_it_is)
    for _ in range(2):
        ids = torch.cat([batch["id"] for batch in loader]).tolist()
    assert len(ids) == 400
    assert {7: ids[7], 8: ids[8], 100: ids[100], 399: ids[399]} == {7: 9, 8: 9, 100: 101, 399: 0}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert sorted(line.split("(")[1].split(")")[0] for line in lines) == [f"{i} of 400 so far" for i in (1, 2, 3, 4)]
    for name, reason in {
        "0007": "the file is empty",
        "0008": "the file is no image",
        "0100": "",
        "0399": "no image",
    }.items():
        assert sum(f"/{name}.png: " in line and reason in line for line in lines) == 1
    assert int(data.bad.sum()) == 4


def test_bad_images_are_left_out_in_evaluation(large, capfd):
    loader = DataLoader(dataset(large, replace_bad=False), 16, collate_fn=as_it_is)
    ids = torch.cat([batch["id"] for batch in loader]).tolist()
    assert ids == [i for i in range(400) if i not in (7, 8, 100, 399)]
    assert len(capfd.readouterr().err.splitlines()) == 4


def one_line(error):
    message = last_message(error)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("replace_bad", [False, True])
def test_more_than_one_percent_is_an_error_of_one_line(tmp_path, workers, replace_bad):
    source = folder(tmp_path, 120, bad=[(3, b""), (90, b"x")])
    loader = DataLoader(dataset(source, replace_bad), 8, num_workers=workers, collate_fn=as_it_is)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = one_line(caught.value)
    assert message.startswith("2 of 120 images cannot be read, more than 1%; the last: cannot read image ")
    assert message.endswith("Remove or replace these files")


@pytest.mark.parametrize("workers", [0, 1])
def test_raise_stops_at_the_first(large, workers):
    loader = DataLoader(dataset(large, on_bad_image="raise"), 16, num_workers=workers, collate_fn=as_it_is)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = one_line(caught.value)
    assert message.startswith("cannot read image ")
    assert message.endswith("0007.png: the file is empty (on_bad_image is raise)")


def test_bad_images_of_other_sources_are_named_by_number():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 200

        def __getitem__(self, index):
            if index == 5:
                raise OSError("image file is truncated")
            return noise(index), torch.tensor(index)

    data = dataset(Broken())
    sample = data[(0, 5)]
    assert (sample["id"], sample["label"]) == (6, 6)
    with pytest.raises(UserError, match="image 5 of the source: image file is truncated"):
        dataset(Broken(), on_bad_image="raise")[(0, 5)]


def test_a_programming_error_is_not_taken_for_a_bad_image(tmp_path):
    data = ImageDataset(folder(tmp_path, 1), SIZE, lambda image, size, generator: image.no_such_thing())
    with pytest.raises(AttributeError):
        data[(0, 0)]


def test_a_source_without_any_readable_image_is_told_apart(tmp_path, large):
    source = folder(tmp_path, 50, bad=[(i, b"") for i in range(50)])
    with pytest.raises(UserError, match=r"no image can be read \(32 of 50 tried\); the last: .*the file is empty"):
        dataset(source).check_readable()
    dataset(large).check_readable()
