"""Samples as files: the same whatever the batch, going on where they were cut off, never of two kinds in one folder."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from aligntok.callbacks import SampleWriter
from aligntok.data import ClassLabels
from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.metrics.reference import AdmFile

COUNT = 22


@pytest.fixture
def draw(tiny):
    """Return a function that writes samples into a folder and returns the ids that were drawn for it."""

    def draw(folder, stage=None, source=None, trainer=None, **options):
        stage = stage or generator(tiny)
        drawn, sample = [], stage.sample
        stage.sample = lambda ids, label: drawn.append(ids.tolist()) or sample(ids, label)
        writer = SampleWriter(**{"block_size": 8, "batch_size": 3, **options})
        data = tiny.data(predict=source or ClassLabels(COUNT, 12))
        tiny.trainer(folder, 1, [writer], enable_checkpointing=False, **(trainer or {})).predict(stage, datamodule=data)
        return drawn

    return draw


def generator(tiny, **options):
    return tiny.generator(**{"sampler": Euler(3), "guidance": Guidance(2.0), **options})


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "png").iterdir())}


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "png").iterdir())]).astype(int)


def test_a_picture_holds_the_sample_of_its_id_and_label(tiny, tmp_path, draw):
    source = ClassLabels(COUNT, 12, "random")
    draw(tmp_path, source=source)
    names = [f"{id:06d}_class{label}.png" for id, label in enumerate(source.labels)]
    assert list(files(tmp_path)) == names
    stage = generator(tiny)
    image = stage.tokenizer.decode(stage.sample(torch.arange(COUNT), torch.from_numpy(source.labels)))
    wanted = (image.permute(0, 2, 3, 1) * 255).round().numpy().astype(int)
    assert abs(pixels(tmp_path) - wanted).max() <= 1
    assert (pixels(tmp_path) != wanted).mean() < 0.01  # rounded, not cut
    assert wanted.std(0).mean() > 1  # they differ


def test_any_batch_size_writes_the_same_up_to_the_rounding_of_a_pixel(tmp_path, draw):
    for size in (7, 64):
        draw(tmp_path / str(size), batch_size=size, block_size=64)
    ours, theirs = (pixels(tmp_path / str(size)) for size in (7, 64))
    assert abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-3


def test_the_npz_is_what_adms_evaluator_takes(tmp_path, draw):
    source = ClassLabels(COUNT, 12, "random")
    draw(tmp_path, source=source)
    path = tmp_path / f"samples_{COUNT}x16x16x3.npz"
    content = np.load(path, allow_pickle=False)
    assert content.files == ["arr_0", "arr_1"]
    assert content["arr_0"].dtype == np.uint8
    assert np.array_equal(content["arr_0"], pixels(tmp_path))
    assert content["arr_1"].dtype == np.int64
    assert np.array_equal(content["arr_1"], source.labels)
    images = torch.cat(list(AdmFile(path).images(5)))
    assert torch.equal((images * 255).round().long(), torch.from_numpy(pixels(tmp_path)).permute(0, 3, 1, 2))


def test_no_npz_on_request_and_each_picture_is_written_once(tmp_path, draw, monkeypatch):
    saved, save = [], Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, *args, **options: saved.append(1) or save(self, *args, **options)
    )
    draw(tmp_path, npz=False)
    assert len(saved) == COUNT
    assert not list(tmp_path.glob("*.npz"))
    assert len(files(tmp_path)) == COUNT


def test_blocks_that_are_there_are_not_drawn_again(tmp_path, draw):
    assert sorted(chain(*draw(tmp_path))) == list(range(COUNT))
    first = files(tmp_path)
    (path,) = tmp_path.glob("*.npz")
    archive = path.read_bytes()
    path.unlink()
    (tmp_path / "png/000009_class9.png").unlink()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "png").iterdir()}
    assert draw(tmp_path) == [[8, 9, 10], [11, 12, 13], [14, 15]]
    assert files(tmp_path) == first
    assert path.read_bytes() == archive
    same = [name for name, time in times.items() if (tmp_path / "png" / name).stat().st_mtime_ns == time]
    assert same == [name for name in times if not 8 <= int(name[:6]) < 16]
    assert draw(tmp_path) == [[0, 1, 2]]  # one batch, because Lightning wants one; it is dropped
    assert files(tmp_path) == first


def test_a_run_that_was_cut_off_goes_on(tiny, tmp_path, draw):
    draw(tmp_path / "whole")
    stage = generator(tiny)
    sample = stage.sample

    def killed(ids, label):
        if 12 in ids:
            raise RuntimeError("killed")
        return sample(ids, label)

    stage.sample = killed
    with pytest.raises(RuntimeError, match="killed"):
        draw(tmp_path / "cut", stage)
    assert len(files(tmp_path / "cut")) == 8
    assert [*chain(*draw(tmp_path / "cut"))] == list(range(8, COUNT))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_an_unfinished_set_has_no_npz(tmp_path, draw, capsys):
    draw(tmp_path, trainer={"limit_predict_batches": 4})
    assert not list(tmp_path.glob("*.npz"))
    assert "2 of 3 blocks are left" in capsys.readouterr().out
    draw(tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_samples_of_two_kinds_are_never_in_one_folder(tiny, tmp_path, draw):
    draw(tmp_path)
    before = files(tmp_path)
    refined = tiny.measured()
    torch.nn.init.normal_(refined.decoder.conv_out.weight)
    cases = {
        "guidance": ({"guidance": Guidance(3.0)}, ["scale=2.0", "scale=3.0"]),
        "sampler": ({"sampler": Euler(4)}, ["num_steps=3", "num_steps=4"]),
        "seed": ({"seed": 5}, ["seed 0", "seed is 5"]),
        "network": ({"network": tiny.dit(1)}, ["network "]),
        "guide": ({"guide": tiny.dit(2)}, ["guide None"]),
        "tokenizer": ({"tokenizer": refined}, ["tokenizer "]),
    }
    for key, (options, words) in cases.items():
        with pytest.raises(UserError, match=f"holds samples of {key} .*--output") as caught:
            draw(tmp_path, generator(tiny, **options))
        assert all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)
    for source, words in (
        (ClassLabels(COUNT + 1, 12), "count 22, but this run's count is 23"),
        (ClassLabels(COUNT, 11), "of labels"),
    ):
        with pytest.raises(UserError, match=words):
            draw(tmp_path, source=source)
    with pytest.raises(UserError, match="precision 32-true, but this run's precision is bf16-mixed"):
        draw(tmp_path, trainer={"precision": "bf16-mixed"})
    assert files(tmp_path) == before
    assert json.loads((tmp_path / "samples.json").read_text())["count"] == COUNT


def test_what_cannot_be_written(tiny, tmp_path, draw):
    with pytest.raises(UserError, match="LatentAlignment draws nothing"):
        tiny.trainer(tmp_path, 1, [SampleWriter()]).predict(tiny.stage(), datamodule=tiny.data())
    with pytest.raises(UserError, match=r"SampleWriter needs model\.tokenizer"):
        tiny.trainer(tmp_path, 1, [SampleWriter()]).predict(
            generator(tiny, tokenizer=None), datamodule=tiny.data(predict=ClassLabels(2, 12))
        )
    with pytest.raises(UserError, match=r"data\.predict to be an aligntok\.data\.ClassLabels"):
        tiny.trainer(tmp_path, 1, [SampleWriter()]).predict(generator(tiny), datamodule=tiny.data())
    with pytest.raises(UserError, match=r"data\.predict to be an aligntok\.data\.ClassLabels"):
        tiny.trainer(tmp_path, 1, [SampleWriter()]).predict(generator(tiny), DataLoader([{"label": 0, "id": 0}]))
    with pytest.raises(UserError, match=r"has 12 classes, but model\.network\.num_classes is 10"):
        draw(tmp_path, generator(tiny, network=tiny.dit(num_classes=10)))
    for option in ("block_size", "batch_size"):
        with pytest.raises(UserError, match="0, but at least 1"):
            SampleWriter(**{option: 0})
    assert not (tmp_path / "png").exists()
