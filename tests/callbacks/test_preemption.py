"""A signal ends a run between two steps, on all ranks, and it goes on from there bit for bit."""

import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import aligntok.callbacks.agreement
from aligntok import preemption
from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.preemption import Preempted
from aligntok.stages import LatentAlignment
from tests.callbacks.test_interruption import COMPARED, STEPS, STOP, at, gan, run
from tests.conftest import Tiny
from tests.ranks import run_ranks

SCONTROL = """#!/bin/sh
echo "$@" >> "$0.calls"
[ "$1" = requeue ] || echo "JobId=1 JobState=$STATE Reason=None"
"""


def kill(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of an array, and a program in place of Slurm's; return the file of its calls."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(SCONTROL)
    program.chmod(stat.S_IRWXU)
    for name, value in {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "2",
        "STATE": "RUNNING",
    }.items():
        monkeypatch.setenv(name, value)
    return program.with_name("scontrol.calls")


@pytest.mark.parametrize(
    ("where", "number", "step"),
    [
        ({"prepare": at("training_step", kill(signal.SIGTERM), STOP - 1)}, signal.SIGTERM, STOP - 1),
        ({"prepare": at("validation_step", kill(signal.SIGUSR1), STOP // 2)}, signal.SIGUSR1, STOP),
    ],
    ids=["SIGTERM in a step", "SIGUSR1 in validation"],
)
def test_a_signal_loses_no_finished_step(tiny, tmp_path, slurm, where, number, step, capsys):
    options = {"limit_val_batches": 2}
    whole = run(tiny, tmp_path / "whole", gan, **options)
    with preemption.listening(), pytest.raises(Preempted) as end:
        run(tiny, tmp_path / "cut", gan, **where, **options)
    assert end.value.code == 143
    printed = capsys.readouterr().out
    assert f"is of step {step}: --ckpt_path last" in printed
    assert "Slurm job 5_2 is requeued" in printed
    assert slurm.read_text().splitlines() == ["show job -o 5_2", "requeue 5_2"]
    tiny.assert_same(run(tiny, tmp_path / "cut", gan, resume=True, **options), whole)


def test_a_signal_that_workers_get_too_does_not_end_them(tiny, tmp_path, capsys):
    """Slurm sends it to all processes of a task."""

    def to_all():
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid, number)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    def prepare(stage, data):
        data.num_workers = 1
        at("training_step", to_all, STOP - 1)(stage, data)

    with pytest.raises(Preempted):
        run(tiny, tmp_path, gan, prepare=prepare)
    assert f"is of step {STOP - 1}: --ckpt_path last" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [({"STATE": "COMPLETING"}, "Slurm ends it"), ({"PATH": ""}, "no scontrol here. .* sbatch -d afterany:5_2")],
)
def test_a_job_that_cannot_be_requeued_says_so(slurm, monkeypatch, change, words, capsys):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    preemption.requeue()
    assert re.search(words, capsys.readouterr().out)
    assert not slurm.exists() or "requeue" not in slurm.read_text()


def test_a_finished_process_is_not_killed_by_a_late_signal():
    program = """
import os, signal
from aligntok import preemption
with preemption.listening(ends=True):
    pass
for number in preemption.SIGNALS:
    os.kill(os.getpid(), number)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_run_that_saves_nothing_dies_of_signals_also_of_an_earlier_one():
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted):
            preemption.stop_listening()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def rank():
    return int(os.environ["LOCAL_RANK"])


def train(folder, number=0, sender=0, method="training_step", calls=3, timeout=60, **options):
    """Train on one of two ranks, of which rank 1 is slow; one of them gets a signal."""
    stage, data = Tiny.stage(LatentAlignment, learning_rate=1e-2), Tiny.data(26)
    if rank() == 1:
        at("training_step", lambda: time.sleep(0.1), 2)(stage, data)
    if number and rank() == sender:
        at(method, kill(number), calls)(stage, data)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=timeout))
    last = folder / "checkpoints" / "last.ckpt"
    options = {"limit_val_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    callbacks = [EMA([0.5, 0.9]), SaveCheckpoint(every_n_steps=1000)]
    trainer = Tiny.trainer(folder, STEPS, callbacks, strategy=strategy, devices=2, **options)
    try:
        trainer.fit(stage, data, ckpt_path=str(last) if last.exists() else None)
    except Preempted as end:
        return end.code, trainer.global_step
    checkpoint = torch.load(last, weights_only=True)
    return {key: checkpoint[key] for key in COMPARED}


CUTS = {
    "term": {"number": signal.SIGTERM, "sender": 1},
    "usr1": {"number": signal.SIGUSR1, "sender": 0, "method": "validation_step", "calls": 1},
    "int": {"number": signal.SIGINT, "sender": 1, "calls": 2},
}


def cut_and_resumed(root):
    """Return what an uninterrupted run learned, and of each cut its exit code, step, and what it learned at last."""
    results = {"whole": train(root / "whole")}
    with preemption.listening():
        for name, cut in CUTS.items():
            results[name] = train(root / name, **cut), train(root / name)
    return results


def test_ranks_agree_on_a_signal_that_came_to_one_of_them(tiny, tmp_path, slurm):
    ranks = run_ranks(2, cut_and_resumed, tmp_path)
    for results in ranks:
        for name, code in (("term", 143), ("usr1", 143), ("int", 130)):
            (found, step), learned = results[name]
            assert found == code
            assert 2 <= step < STEPS
            tiny.assert_same(learned, ranks[0]["whole"])
    assert slurm.read_text().splitlines() == 2 * ["show job -o 5_2", "requeue 5_2"]


def test_a_run_that_goes_on_with_another_split_says_so(tiny, tmp_path, capsys):
    run(tiny, tmp_path, gan)
    assert "was 1 x 1 x 8" not in capsys.readouterr().out
    trainer = tiny.trainer(tmp_path, STEPS + 1, [EMA(), SaveCheckpoint()], accumulate_grad_batches=2)
    trainer.fit(gan(tiny), tiny.data(26), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert "devices x accumulated x batch was 1 x 1 x 8 and is now 1 x 2 x 4" in capsys.readouterr().out


def hang(folder):
    aligntok.callbacks.agreement.PATIENCE = 1
    try:
        train(folder, signal.SIGSTOP, sender=1, timeout=3)
    except RuntimeError:
        sys.exit(1)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path, capsys):
    with pytest.raises(AssertionError, match="ended with"):
        run_ranks(2, hang, tmp_path, seconds=60)
    assert "rank 1 on " in capsys.readouterr().out


def test_lightnings_handlers_that_ours_replace_are_there(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 1)
    for name in ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn", "register_signal_handlers"):
        assert callable(getattr(trainer._signal_connector, name))
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert hasattr(DDPStrategy(), "_timeout")
