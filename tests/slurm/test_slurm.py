"""The command line under a real Slurm of two virtual nodes: `make test-slurm`."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from aligntok.preemption import SIGNALS
from tests.conftest import Tiny
from tests.slurm.cluster import Cluster, NoSlurm, is_running

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
STEPS, EVERY = 150, 10  # optimizer steps of a run; between two checkpoints
LIMIT = 600  # seconds that a trial may take at most: all of them run side by side
AT_ONCE = 4
SIGNALS_PER_JOB = 5
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
RECIPE = [
    *("--config", "quickstart/encoder.yaml", "--config", "run/cpu.yaml", "--trainer.max_steps", STEPS),
    *("--trainer.val_check_interval", 25, "--trainer.limit_val_batches", 3),
    *("--trainer.num_sanity_val_steps", 0, "--trainer.enable_progress_bar", "false"),
    *("--callbacks.checkpoint.init_args.every_n_steps", EVERY),
    *("--callbacks.ema.class_path", "aligntok.callbacks.EMA"),
    *("--model.encoder.init_args.model_args", f"'{TINY}'"),
    *("--callbacks.slowed.class_path", "tests.slurm.slowed.Slowed"),
]
KEPT = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "LatentDataModule")
SCRIPT = """#!/bin/bash
srun --kill-on-bad-exit=1 --label {python} -m aligntok fit {options}
"""


class Job:
    """A run of two ranks on two nodes.

    Args:
        cluster: Where it runs.
        folder: Its output.
        nodes: How many; one task each.
        sbatch: Further options of sbatch.
        options: Of ``aligntok fit``.
    """

    def __init__(self, cluster, folder, *options, nodes=2, sbatch=()):
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)
        script = folder / "job.sbatch"
        words = [*RECIPE, "--output", folder, "--trainer.devices", 1, "--trainer.num_nodes", nodes, *options]
        script.write_text(SCRIPT.format(python=sys.executable, options=" ".join(map(str, words))))
        asked = ["-N", nodes, "--ntasks-per-node=1", "-c", 1, "--requeue", "--open-mode=append", "-D", ROOT]
        self.id = cluster.call("sbatch", "--parsable", *asked, "-o", folder / "log", *sbatch, script)

    def wait(self, condition, what):
        """Wait until something is so."""
        end = time.monotonic() + LIMIT
        while not (found := condition()):
            assert time.monotonic() < end, f"job {self.id}, no {what} in time: {self.log[-3000:]}"
            self.cluster.revive()
            time.sleep(0.05)
        return found

    @property
    def log(self):
        """What it has printed so far."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self):
        """What Slurm calls it."""
        return self.cluster.field(self.id, "JobState")

    @property
    def restarts(self):
        """How often it was requeued."""
        return int(self.cluster.field(self.id, "Restarts"))

    def processes(self):
        """Return the process of each rank, as far as they note signals."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = dict(word.split("=", 1) for word in path.read_text().split("\0") if "=" in word)
                ours = words.get("SLURM_JOB_ID") == self.id and words["SLURM_CONF"] == str(self.cluster.config)
                if ours and "SLURM_PROCID" in words and "-m\0aligntok" in path.with_name("cmdline").read_text():
                    caught = int(re.search(r"SigCgt:\s*(\w+)", path.with_name("status").read_text())[1], 16)
                    if all(caught >> (number - 1) & 1 for number in SIGNALS):
                        found[int(words["SLURM_PROCID"])] = int(path.parent.name)
            except (OSError, UnicodeDecodeError):
                continue  # it has ended
        return found

    def started(self):
        """Wait until both ranks note signals, and return their processes by rank."""
        return self.wait(lambda: len(found := self.processes()) == 2 and found, "processes")

    def at(self, step):
        """Wait until the run has done so many steps."""
        path = self.folder / "step"
        self.wait(lambda: (path.exists() and int(path.read_text() or 0) >= step) or self.ended(), f"step {step}")
        assert not self.ended(), f"job {self.id} ended before step {step}: {self.log[-3000:]}"

    def ended(self):
        """Whether it is over."""
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def end(self):
        """Wait for its end, and return its state."""
        self.wait(self.ended, "end")
        return self.state

    def requeued(self, times):
        """Wait until it is back in the queue for the so manieth time, and have it start soon, not in two minutes."""
        self.wait(lambda: (self.restarts == times and self.state == "PENDING") or self.ended(), "requeue")
        assert self.state == "PENDING", f"job {self.id} is {self.state}: {self.log[-3000:]}"
        self.cluster.call("scontrol", "update", f"jobid={self.id}", "starttime=now+3seconds")

    def saved(self, step=None):
        """Return its last step and what it had learned by then, or by a step that it kept."""
        path = self.folder / "checkpoints" / ("last.ckpt" if step is None else f"step_{step:07d}.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        return checkpoint["global_step"], {key: checkpoint[key] for key in KEPT}


def slow(seconds=0.06, **options):
    """Return the options of a run of which one rank is slow."""
    words = {"seconds": seconds, **options}
    return [word for key, value in words.items() for word in (f"--callbacks.slowed.init_args.{key}", value)]


def trial_whole(cluster, folder):
    """Run it to its end, and keep each step to compare others with."""
    job = Job(cluster, folder, "--callbacks.checkpoint.init_args.keep_every_n_steps", 1)
    assert job.end() == "COMPLETED", job.log
    return job


def trial_nodes(cluster, folder, nodes):
    """Take a few steps whose size follows the gradient."""
    sgd = ["--model.optimization.optimizer.class_path", "torch.optim.SGD", "--trainer.max_steps", 5]
    job = Job(cluster, folder, *sgd, nodes=nodes)
    assert job.end() == "COMPLETED", job.log
    return job


def trial_signals(cluster, folder, name, seed):
    """Send a signal again and again, at random moments of the start or the training, and let the job end."""
    moments, step = random.Random(seed), 0
    early = moments.randint(1, SIGNALS_PER_JOB)  # the one that comes while the run starts
    job = Job(cluster, folder, *slow(rank=moments.randrange(2)))
    for times in range(1, SIGNALS_PER_JOB + 1):
        job.started()
        if times == early:
            time.sleep(moments.uniform(0, 3))
        else:
            step += moments.randint(1, 25)
            job.at(step)
            time.sleep(moments.uniform(0, 0.1))
        cluster.call("scancel", f"--signal={name}", job.id)
        job.requeued(times)
    assert job.end() == "COMPLETED", job.log
    return job


def trial_time_limit(cluster, folder):
    """Have Slurm warn of the end of the time, at most a minute early."""
    job = Job(cluster, folder, *slow(1.5, times=1), sbatch=["--time=2", "--signal=USR1@30"])
    job.requeued(1)
    assert job.end() == "COMPLETED", job.log
    return job


def trial_scancel(cluster, folder):
    """Cancel a job: what it has done is saved, and it stays cancelled."""
    job = Job(cluster, folder, *slow())
    job.at(EVERY + 3)
    cluster.call("scancel", job.id)
    assert job.end() == "CANCELLED"
    job.wait(lambda: not cluster.call("squeue", "-h", "-j", job.id, check=False), "end of its processes")
    assert "is not requeued: Slurm ends it" in job.log
    assert job.restarts == 0
    assert job.saved()[0] > EVERY
    return job


def trial_kill(cluster, folder, rank):
    """Kill a rank: the job fails soon."""
    job = Job(cluster, folder, *slow())
    processes = job.started()
    job.at(2 * EVERY + 3)
    os.kill(processes[rank], signal.SIGKILL)
    began = time.monotonic()
    assert job.end() == "FAILED"
    assert time.monotonic() - began < 60
    return job


def trial_stop(cluster, folder, rank):
    """Stop a rank: it is named in time, and the job fails."""
    minutes = 0.5
    job = Job(cluster, folder, *slow(), "--timeout", minutes)
    processes = job.started()
    job.at(2 * EVERY + 3)
    os.kill(processes[rank], signal.SIGSTOP)
    began = time.monotonic()
    try:
        job.wait(lambda: f"rank {rank} on node{rank + 1} hangs" in job.log, "name")
        assert time.monotonic() - began < 60 * minutes + 30  # after the timeout the others sign a list
        assert job.end() == "FAILED", job.log
    finally:
        if is_running(processes[rank]):
            os.kill(processes[rank], signal.SIGKILL)
    return job


class Submitted(Job):
    """A job that `aligntok submit` has made."""

    def __init__(self, cluster, folder, id):
        self.cluster, self.folder, self.id = cluster, folder, id

    @property
    def log(self):
        """What it has printed so far."""
        return "".join(path.read_text() for path in self.folder.glob("*.out"))


def trial_chain(cluster, folder):
    """Submit a chain, have its first job requeued, and let the second one build on it."""
    folder.mkdir()
    first = " ".join(map(str, ["fit", *RECIPE, *slow()]))
    second = f"{first} --trainer.max_steps 2 --model.encoder.weights ${{first}}/encoder.safetensors"
    (folder / "chain.yaml").write_text(
        yaml.safe_dump({"output": str(folder), "steps": {"first": first, "second": second}})
    )
    size = ["--nodes", 2, "--gpus", 0, "--cpus", 1]
    command = [
        sys.executable,
        "-m",
        "aligntok",
        "submit",
        folder / "chain.yaml",
        *size,
        "--",
        "--config",
        "run/cpu.yaml",
    ]
    ids = re.findall(r"\.sbatch: job (\d+)", cluster.call(*command))
    one, two = (Submitted(cluster, folder / name, id) for name, id in zip(("first", "second"), ids, strict=True))
    one.at(EVERY + 3)
    assert two.state == "PENDING"
    cluster.call("scancel", "--signal=USR1", one.id)
    one.requeued(1)
    assert two.end() == "COMPLETED", one.log + two.log
    assert one.state == "COMPLETED"
    assert two.saved()[0] == 2
    assert cluster.call(*command) == ""  # all of it is finished
    return one


TRIALS = {
    "time limit": trial_time_limit,  # the longest one first
    "whole": trial_whole,
    "nodes 1": partial(trial_nodes, nodes=1),
    "nodes 2": partial(trial_nodes, nodes=2),
    **{f"USR1 {i}": partial(trial_signals, name="USR1", seed=i) for i in range(2)},
    **{f"TERM {i}": partial(trial_signals, name="TERM", seed=10 + i) for i in range(2)},
    "kill 0": partial(trial_kill, rank=0),
    "kill 1": partial(trial_kill, rank=1),
    "stop 0": partial(trial_stop, rank=0),
    "stop 1": partial(trial_stop, rank=1),
    "chain": trial_chain,
    "scancel": trial_scancel,
}


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """All trials, under way side by side."""
    try:
        cluster = Cluster()
    except NoSlurm as reason:
        pytest.skip(f"no Slurm here: {reason}")
    root = tmp_path_factory.mktemp("slurm")
    cluster.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with cluster, ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {name: pool.submit(trial, cluster, root / name.replace(" ", "_")) for name, trial in TRIALS.items()}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("name", [name for name in TRIALS if not name.startswith("nodes")])
def test_what_is_kept_is_what_the_whole_run_had_at_that_step(trials, name):
    step, learned = trials[name].result().saved()
    least = {"scancel": EVERY, **dict.fromkeys(("kill 0", "kill 1", "stop 0", "stop 1"), 2 * EVERY)}
    assert step >= least.get(name, STEPS)
    Tiny.assert_same(learned, trials["whole"].result().saved(step)[1])


def test_two_nodes_are_one_process(trials):
    one, two = (trials[f"nodes {count}"].result().saved()[1]["current_model_state"] for count in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
