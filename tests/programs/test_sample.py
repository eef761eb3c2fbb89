"""Samples as files: the same whatever the batch, going on where they were cut off, never of two kinds in one folder."""

import errno
import json
import os
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aligntok import preemption
from aligntok.callbacks import EMA
from aligntok.data import ClassLabels
from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.metrics.reference import AdmFile
from aligntok.preemption import Preempted
from aligntok.programs.fabric import make_fabric
from aligntok.programs.sample import sample as draw_samples
from tests.conftest import Tiny
from tests.ranks import run_ranks

COUNT = 22


@pytest.fixture
def draw(tiny):
    """Return a function that writes samples into a folder and returns the ids that were drawn for it."""

    def draw(folder, stage=None, source=None, precision="32-true", **options):
        stage = stage or generator(tiny)
        drawn, sample = [], stage.sample
        stage.sample = lambda ids, label: drawn.append(ids.tolist()) or sample(ids, label)
        labels = (source or ClassLabels(COUNT, 12)).labels
        fabric = make_fabric("cpu", 1, precision=precision)
        draw_samples(stage, labels, folder, fabric, **{"block_size": 8, "batch_size": 3, **options})
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
    assert draw(tmp_path) == []
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
    assert len(files(tmp_path / "cut")) == 11  # two batches of the second block are there, which is drawn again
    assert not list((tmp_path / "cut").glob("*.npz"))
    assert [*chain(*draw(tmp_path / "cut"))] == list(range(8, COUNT))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


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
        "guide": ({"guidance": Guidance(2.0, guide=tiny.dit(2))}, ["guide None"]),
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
        draw(tmp_path, precision="bf16-mixed")
    assert files(tmp_path) == before
    assert json.loads((tmp_path / "samples.json").read_text())["count"] == COUNT


def test_damaged_files_of_the_folder_are_named(tmp_path, draw):
    draw(tmp_path)
    (tmp_path / "png/000007_class7.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"000007_class7\.png: the file is empty"):
        draw(tmp_path)
    (tmp_path / "samples.json").write_text("[3]")
    with pytest.raises(UserError, match=r"samples\.json is broken"):
        draw(tmp_path)


def test_what_cannot_be_written(tiny, tmp_path, draw):
    with pytest.raises(UserError, match=r"decoded by model\.tokenizer"):
        draw(tmp_path, generator(tiny, tokenizer=None))
    with pytest.raises(UserError, match="label"):
        draw(tmp_path, generator(tiny, network=tiny.dit(num_classes=10)))
    for option in ("block_size", "batch_size"):
        with pytest.raises(UserError, match="0: give at least 1"):
            draw(tmp_path, **{option: 0})
    assert not (tmp_path / "png").exists()


@pytest.mark.parametrize("name", ["samples.json", "000009_class9.png", f"samples_{COUNT}x16x16x3.npz"])
def test_a_full_disk_is_one_line_and_the_same_call_goes_on(tmp_path, draw, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"cannot write .*: the disk is full"):
            draw(tmp_path / "full")
    assert not list((tmp_path / "full").rglob(".*"))
    draw(tmp_path / "full")
    draw(tmp_path / "whole")
    assert files(tmp_path / "full") == files(tmp_path / "whole")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw(tmp_path / "file" / "samples")


def test_a_signal_ends_after_the_batch(tiny, tmp_path, draw):
    draw(tmp_path / "whole")
    stage, sample = generator(tiny), None

    def signalled(ids, label):
        if 3 in ids:
            os.kill(os.getpid(), signal.SIGUSR1)
        return sample(ids, label)

    stage.sample, sample = signalled, stage.sample
    with preemption.listening(), pytest.raises(Preempted, match="143"):
        draw(tmp_path / "cut", stage)
    assert len(files(tmp_path / "cut")) == 6
    draw(tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def draw_on_rank(folder):
    fabric = make_fabric("cpu", 2)
    draw_samples(generator(Tiny), ClassLabels(COUNT, 12).labels, folder, fabric, block_size=8, batch_size=3)


def cut_on_rank(folder):
    """Send a signal to one rank, then draw the rest; return the exit code of the first try."""
    with preemption.listening():
        if os.environ["LOCAL_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted) as end:
            draw_on_rank(folder)
    count = len(files(folder))
    draw_on_rank(folder)
    return end.value.code, count


@pytest.mark.skipif(torch.__version__ < "2.7", reason="a rank of gloo that leaves before the others may wait for ever")
def test_two_ranks_write_the_bytes_of_one(tmp_path, draw):
    draw(tmp_path / "one")
    assert run_ranks(2, cut_on_rank, tmp_path / "two") == [(143, 14)] * 2  # the blocks of the first rank, 8 and 6
    assert files(tmp_path / "two") == files(tmp_path / "one")
    names = [f"samples_{COUNT}x16x16x3.npz", "samples.json"]
    assert all((tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)


@pytest.mark.filterwarnings("ignore:.*overridden `on_before_batch_transfer`")  # stage and data both have a say
def test_samples_are_of_the_average_that_is_asked_for(tiny, tmp_path):
    stage = generator(tiny)
    folder = tiny.cache(tmp_path / "latents", stage.tokenizer)
    ema = EMA([0.5, 0.9])
    trainer = tiny.trainer(tmp_path, 2, [ema])
    trainer.fit(stage, datamodule=tiny.cached(folder))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)

    def loaded(**options):
        other = generator(tiny)
        other.load(str(path), **options)
        return tiny.copies(other.network)

    wanted = {None: tiny.copies(stage.network)}  # `fit` left the first average in the stage
    wanted |= {0.5: wanted[None], 0.9: ema.averages[1], 0: ema.averages[0]}
    for decay, weights in wanted.items():
        found = loaded(ema=decay)
        for name, value in weights.items():
            assert torch.equal(found[name.removeprefix("network.")], value), (decay, name)
    assert any(not torch.equal(a, b) for a, b in zip(loaded(ema=0.9).values(), loaded(ema=0).values(), strict=True))
    with pytest.raises(UserError, match=r"no average of decay 0\.7; it has 0\.5, 0\.9; 0 means the raw weights"):
        loaded(ema=0.7)
