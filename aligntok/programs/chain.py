"""``aligntok chain CHAIN.yaml``: commands in order; a finished one is skipped, one that was cut off goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any, TextIO

from aligntok import preemption
from aligntok.errors import check
from aligntok.programs.parser import Parser
from aligntok.programs.steps import is_first_task, read_chain

DESCRIPTION = """\
Run the steps of a chain in order, each a command of its own. The same words go on where it was cut off: a step that
is finished is skipped.

  aligntok chain chains/quickstart.yaml
  aligntok chain mine.yaml --output runs/mine -- --config run/debug.yaml

Words after -- are added to each fit, or to the step of --only. In the steps, ${key} stands for another key of the
chain, ${STEP} for the folder of an earlier step: OUTPUT/STEP, unless its words say --output."""


def chain_command(arguments: list[str]) -> None:
    """Run ``aligntok chain`` with the words that follow it.

    Raises:
        SystemExit: With the exit code of a step that did not end with 0.
    """
    parser = Parser("chain", DESCRIPTION)
    parser.add_argument("chain", metavar="CHAIN", help="YAML file, or name of a shipped one")
    parser.add_argument("--output", help="folder of all steps, in place of the chain's own")
    parser.add_argument("--only", metavar="STEP", help="run this step and no other")
    parser.add_argument("--keep", metavar="STEP", action="append", default=[], help="take what it made as it is")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    words, added = split_dashes(arguments)
    options = parser.parse_args(words)
    steps = read_chain(options.chain, options.output, {options.only or "fit": added})
    names = [step.name for step in steps]
    for name in [*filter(None, [options.only]), *options.keep]:
        check(name in names, f"there is no step {name}: {options.chain} has {', '.join(names)}")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("WORLD_SIZE") or 1)
    check(
        tasks == 1 or options.only, f"{tasks} tasks run one step together, by --only STEP: see aligntok submit --help"
    )
    for number, step in enumerate(steps, 1):
        if options.only not in (None, step.name):
            continue
        title, start = f"step {number} of {len(steps)}, {step.name}", time.monotonic()
        finished = step.is_finished(step.name in options.keep)
        say(f"# {title}{': finished before, skipped' * finished}", *[step.command] * (not finished or options.dry_run))
        if options.dry_run:
            continue
        step.write(step.made() if finished else None)
        if finished:
            continue
        if preemption.asked:
            if is_first_task():
                preemption.requeue()
            raise preemption.Preempted(preemption.asked)
        code = run(step.words)
        took = timedelta(seconds=round(time.monotonic() - start))
        if code:
            stopped = code in (preemption.INTERRUPTED, preemption.UNFINISHED)
            how = "was interrupted" if stopped else f"ended with exit code {code}"
            say(f"aligntok: {title}, {how} after {took}. The same command goes on from there", file=sys.stderr)
            raise SystemExit(code)
        step.write(step.made())
        say(f"# {title}: {took}")


def run(words: list[str]) -> int:
    """Run a command in a process of its own and return its exit code.

    TERM and USR1 are handed on to it; Ctrl-C reaches it by itself.
    """
    with subprocess.Popen([sys.executable, "-m", "aligntok", *words]) as process:

        def hand_on(number: int, _: Any) -> None:
            preemption.note(number)
            process.send_signal(number)

        handlers = {**dict.fromkeys(preemption.SIGNALS, hand_on), signal.SIGINT: lambda *_: None}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        code = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def split_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before ``--``, and those after it.

    >>> split_dashes(["chain.yaml", "--", "--config", "run/debug.yaml"])
    (['chain.yaml'], ['--config', 'run/debug.yaml'])
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words, added = arguments[:end], arguments[end + 1 :]
    check(
        not any(word.startswith("--output") for word in added), "--output stands before the --: it is the folder of all"
    )
    return words, added


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, of all processes of a job by the first."""
    if is_first_task():
        print(*lines, sep="\n", file=file, flush=True)
