"""Signals that ask a run to end: noted when they come, acted upon where nothing is lost; a Slurm job is requeued."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # Slurm's warning before a time limit; preemption, `kill`
INTERRUPTED = 130  # exit code after Ctrl-C, as a shell reports it: 128 + SIGINT
UNFINISHED = 143  # ... after another signal, whatever its number: what there is is saved, the same command goes on

asked = 0  # the number of the signal that asked this process to end; 0: none did


class Preempted(SystemExit):
    """Ends a run that is saved but not finished, with exit code 143, or 130 after Ctrl-C.

    >>> Preempted(signal.SIGUSR1).code, Preempted(signal.SIGINT).code
    (143, 130)
    """

    def __init__(self, number: int) -> None:
        super().__init__(INTERRUPTED if number == signal.SIGINT else UNFINISHED)


def note(number: int, *args: Any) -> None:
    """Note a signal; the handler of all that ask a run to end."""
    global asked
    asked = max(asked, number)


def forget() -> None:
    """Take back what was noted: it was acted upon."""
    global asked
    asked = 0


@contextmanager
def listening(ends: bool = False) -> Iterator[None]:
    """Note signals from now on, instead of dying of them.

    Args:
        ends: The process ends after it: what it did is decided by then, and a signal that comes late changes nothing.
    """
    forget()
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        forget()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler)


def stop_listening() -> None:
    """Die of signals again, also of one that came already: the run has nothing to save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if asked:
        raise Preempted(asked)


def ignore(*args: Any) -> None:
    """Ignore these signals, in a process that reads for one that notes them: Slurm, and a terminal, send to both."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def was_requeued() -> bool:
    """Tell whether Slurm or torchrun has started this job before."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT") or 0) > 0 for name in ("SLURM", "TORCHELASTIC"))


def requeue() -> None:
    """Put the Slurm job that this process is a part of back into the queue, and say so; elsewhere do nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if shutil.which("scontrol") is None:
        print(f"  Slurm job {job} is not requeued: no scontrol here. Queue the next one: sbatch -d afterany:{job}")
        return
    state = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    if " JobState=RUNNING " not in state.stdout:
        print(f"  Slurm job {job} is not requeued: Slurm ends it", flush=True)  # scancel, or the time limit
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    print(f"  Slurm job {job} {'is requeued' if not done.returncode else 'is not requeued: ' + done.stderr.strip()}")
