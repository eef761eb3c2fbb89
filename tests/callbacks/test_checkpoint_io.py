"""What is written in the background is what a checkpoint was, whole and in order, whatever happens meanwhile."""

import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import threading
import time
import zipfile
from itertools import count
from pathlib import Path

import pytest
import torch

import aligntok.callbacks.checkpoint_io as module
from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.callbacks.checkpoint_io import AtomicCheckpointIO
from aligntok.errors import UserError
from aligntok.stages import LatentAlignment
from aligntok.weights.checkpoint import read_checkpoint
from tests.ranks import run_ranks

FORK = multiprocessing.get_context("fork")  # of this process, with all that is imported; it computes in one thread
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
BACKGROUND = {"background": True}


@pytest.fixture
def held_back(monkeypatch):
    """Let no write begin before this event is set."""
    go, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (go.wait(10), save(*args)))
    return go


def records(path):
    """Return what torch.save wrote, without the name that the file had then."""
    with zipfile.ZipFile(path) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist() if "serialization_id" not in name}


def test_the_file_is_the_one_that_a_write_at_once_gives(tmp_path, held_back):
    weight = torch.randn(4, 6)
    state = torch.nn.Linear(2, 2).state_dict() | {"tied": weight, "view": weight[1:3, ::2], "scalar": torch.tensor(3)}
    checkpoint = {"state_dict": state, "also": [weight, {"decays": [0.9, weight.T]}], "name": "a"}
    held_back.set()
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "one.ckpt")
    held_back.clear()
    io = AtomicCheckpointIO()
    io.save_checkpoint(checkpoint, tmp_path / "two.ckpt", BACKGROUND)
    weight += 1  # the step goes on
    checkpoint["also"][1]["decays"].append(1)
    held_back.set()
    io.teardown()
    assert records(tmp_path / "one.ckpt") == records(tmp_path / "two.ckpt")


def test_a_run_that_saves_in_the_background_writes_what_it_was_at_that_step(tiny, tmp_path, held_back):
    """Weights, averages and optimizer move on while it waits; a read waits for it."""

    class Slow(SaveCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 3:
                held_back.set()

    def run(folder, steps, callback):
        trainer = tiny.trainer(folder, steps, [EMA([0.5, 0.9]), callback], gradient_clip_val=1.0)
        trainer.fit(tiny.stage(LatentAlignment, adversarial=tiny.gan(norm="batch")), tiny.data(26))
        return torch.load(folder / "checkpoints" / f"step_{2:07d}.ckpt", weights_only=True)

    ours = run(tmp_path / "background", 4, Slow(keep_every_n_steps=2))
    once = run(tmp_path / "at_once", 2, SaveCheckpoint(keep_every_n_steps=2))
    for key in once.keys() - {"callbacks"}:
        tiny.assert_same(ours[key], once[key], key)


def test_one_write_at_a_time_and_a_read_waits(tmp_path, held_back):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {}, "step": 1}, path, {**BACKGROUND, "also": [tmp_path / "step_1.ckpt"]})
    assert not path.exists()
    threading.Timer(0.1, held_back.set).start()
    io.save_checkpoint({"state_dict": {}, "step": 2}, path, BACKGROUND)
    assert read_checkpoint(tmp_path / "step_1.ckpt")["step"] == 1
    assert io.load_checkpoint(path)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step_1.ckpt"]


def test_where_there_are_no_hard_links_the_file_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("Operation not supported")))
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt", {"also": [tmp_path / "step_1.ckpt"]})
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "step_1.ckpt").read_bytes()


def test_a_failure_in_the_background_is_said_once_and_the_file_stays(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {}, "step": 1}, path)
    good = module.write_atomically
    monkeypatch.setattr(module, "write_atomically", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
    for said in (lambda: io.save_checkpoint({}, path, BACKGROUND), lambda: io.load_checkpoint(path), io.teardown):
        io.save_checkpoint({"state_dict": {}, "step": 2}, path, BACKGROUND)
        with pytest.raises(UserError, match="disk is full"):
            said()
        io.teardown()
        assert read_checkpoint(path)["step"] == 1
    io.save_checkpoint({}, path, BACKGROUND)
    monkeypatch.setattr(module, "write_atomically", good)
    io.save_checkpoint({"state_dict": {}, "step": 3}, path)  # there is room again
    assert io.load_checkpoint(path)["step"] == 3


def read_and_count(path):
    """Read a checkpoint, also a damaged one; return how many bytes this process asked the system for."""
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    counted = [bytes_read()]
    state = AtomicCheckpointIO().load_checkpoint(path / "good.ckpt")["state_dict"]
    counted.append(bytes_read())
    with pytest.raises(UserError, match="damaged, it is not what was written"):
        AtomicCheckpointIO().load_checkpoint(path / "bad.ckpt")
    return counted[1] - counted[0], state["weight"].sum().item()


def bytes_read():
    text = Path("/proc/self/io").read_text()
    return int(text.split()[1])


def test_one_rank_reads_the_file_once_and_the_others_only_what_they_use(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(1 << 20)}}, tmp_path / "good.ckpt")
    content = bytearray((tmp_path / "good.ckpt").read_bytes())
    content[1 << 20] ^= 1
    (tmp_path / "bad.ckpt").write_bytes(content)
    (first, one), (second, two) = run_ranks(2, read_and_count, tmp_path)
    assert one == two == 1 << 20
    assert len(content) <= first < 1.1 * len(content)
    assert second < 0.1 * len(content)


def save_for_ever(path, begun, finished, limit=None):
    """Save a step after the other; note which one began last, and which one is known to be written."""
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    io, weight = AtomicCheckpointIO(), torch.zeros(1 << 20)
    for step in count(1):
        weight.fill_(step)
        begun.value = step
        state = {"weight": weight, **({"more": torch.ones(1 << 20)} if limit and step > 1 else {})}
        io.save_checkpoint({"state_dict": state, "global_step": step}, path, BACKGROUND)
        finished.value = step - 1
        weight += 1


@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_there_is_a_whole_checkpoint(tmp_path, moment):
    path, (begun, finished) = tmp_path / "last.ckpt", (FORK.Value("i", 0) for _ in range(2))
    process = FORK.Process(target=save_for_ever, args=(path, begun, finished))
    process.start()
    end = time.monotonic() + 60
    while finished.value < 2 and process.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(random.Random(moment).uniform(0, 0.05))
    process.kill()
    process.join()
    checkpoint = read_checkpoint(path)  # compares the checksums
    step = checkpoint["global_step"]
    assert 2 <= finished.value <= step <= begun.value
    assert (checkpoint["state_dict"]["weight"] == step).all()


def test_a_file_that_grows_too_large_leaves_the_old_one(tmp_path, capfd):
    """As on a full disk: the system takes a part of what is written."""
    path, (begun, finished) = tmp_path / "last.ckpt", (FORK.Value("i", 0) for _ in range(2))
    process = FORK.Process(target=save_for_ever, args=(path, begun, finished, 6 << 20))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert "last.ckpt: the disk is full; what was there before is untouched" in capfd.readouterr().err
    assert begun.value == 3
    assert read_checkpoint(path)["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_full_disk_ends_with_the_reason_and_the_old_checkpoint(tiny, small_disk, capsys):
    class Fill(SaveCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.strategy.checkpoint_io.wait()
                with (small_disk / "other").open("wb") as file, pytest.raises(OSError, match="space"):
                    file.write(bytes(1 << 20))
            super().on_train_batch_end(trainer, *args)

    trainer = tiny.trainer(small_disk, 9, [Fill(every_n_steps=1)])
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: the disk is full; .*untouched"):
        trainer.fit(tiny.stage(LatentAlignment), tiny.data())
    last = small_disk / "checkpoints" / "last.ckpt"
    assert f"{last} is of step 1: --ckpt_path last" in capsys.readouterr().out
    assert read_checkpoint(last)["global_step"] == 1
    assert trainer.global_step <= 4
