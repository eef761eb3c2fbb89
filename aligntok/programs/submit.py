"""``aligntok submit``: an sbatch file for a training, or one for each step of a chain, submitted to Slurm."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from aligntok.errors import UserError, check, check_nonnegative, check_positive, words_of
from aligntok.files import write_text
from aligntok.layers import read_configs
from aligntok.programs.chain import split_dashes
from aligntok.programs.parser import Parser
from aligntok.programs.steps import Step, read_chain

DESCRIPTION = """\
Write an sbatch file into the folder of a run and submit it; of a chain one for each step that is not finished, where
each job waits for the one before. Two minutes before the end of its time, or when it is preempted, a job saves its
last step and is requeued.

  aligntok submit stage1.yaml --nodes 4 --gpus 8 --time 8:00:00
  aligntok submit stage2.yaml mine.yaml --dry_run -- --init_from runs/stage1/checkpoints/last.ckpt
  aligntok submit chains/aligntok.yaml --nodes 4 --gpus 8 --time 24:00:00 --partition gpu

Several configs are layers of one fit. Words after -- are added to each fit."""

SEED = "\0"  # in a word: the number of a job in its array


def submit_command(arguments: list[str]) -> None:
    """Run ``aligntok submit`` with the words that follow it.

    Raises:
        UserError: A step of the chain was made by other words, or Slurm refuses a job.
    """
    words, added = split_dashes(arguments)
    options = parse(words)
    own = read_configs(*options.configs)
    output = options.output or str(own.get("output", "runs/default"))
    command = shlex.join(["aligntok", "submit", *(word for word in arguments if word != "--dry_run")])
    jobs, before = (of_chain if "steps" in own else of_configs)(options, output, added), ""
    for step, line in jobs:
        text, path = script(step, line, options, command), step.folder / f"{step.name}.sbatch"
        if options.dry_run:
            print(f"# {path}\n" * (len(jobs) > 1) + text, end="")
            continue
        write_text(path, text)
        for number in range(options.repeat):
            kind = "afterany" if number else "aftercorr" if options.array else "afterok"
            before = sbatch(path, [f"--dependency={kind}:{before}", "--kill-on-invalid-dep=yes"] if before else [])
            print(f"{path}: job {before}", flush=True)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = Parser("submit", DESCRIPTION)
    add = parser.add_argument
    add("configs", metavar="CONFIG", nargs="+", help="a chain, or the layers of a fit: files, or names of shipped ones")
    add("--output", help="folder of the run or chain, in place of what the config says")
    add("--nodes", type=int, default=1, help="(default: 1)")
    add("--gpus", type=int, default=8, help="of each node, a task for each; 0: one task without (default: 8)")
    add("--cpus", type=int, default=8, help="of each task, where images are read (default: 8)")
    add("--repeat", type=int, default=1, metavar="N", help="N jobs, one after another: for where none can be requeued")
    add("--time", metavar="H:MM:SS", help="of each job, which is requeued until it has finished")
    add("--array", metavar="SEEDS", help="such as 0-4: a run of each seed, in a folder of that number")
    for name in ("partition", "account", "qos"):
        add(f"--{name}", help="as sbatch takes it")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="one more, such as --sbatch=--exclusive")
    add("--srun", default="", metavar="OPTIONS", help="of srun, such as --srun=--container-image=FILE")
    add("--setup", action="append", default=[], metavar="LINE", help="of shell, before srun")
    add("--dry_run", action="store_true", help="print the files and submit nothing")
    options = parser.parse_args(words)
    check_positive(nodes=options.nodes, cpus=options.cpus, repeat=options.repeat)
    check_nonnegative(gpus=options.gpus)
    return options


def added_words(options: argparse.Namespace, added: Sequence[str]) -> dict[str, list[str]]:
    """Return the words for steps of each verb: the run layer, what the user adds, the size of the job."""
    sizes = {"num_nodes": options.nodes, "devices": max(1, options.gpus)}
    fabric = [word for key, size in sizes.items() for word in (f"--{key}", str(size))]
    trainer = [word.replace("--", "--trainer.") for word in fabric]
    seed = ["--seed_everything", SEED] if options.array else []
    layer = ["--config", "run/slurm.yaml"]
    words = {"fit": [*layer, *added, *seed, *trainer], "encode": fabric, "sample": fabric}
    return {**words, "validate": [*layer, *trainer], "test": [*layer, *trainer]}


def of_configs(options: argparse.Namespace, output: str, added: Sequence[str]) -> list[tuple[Step, list[str]]]:
    """Return the fit and the words that run it."""
    layers = [word for name in options.configs for word in ("--config", name)]
    words = ["fit", *layers, *added_words(options, added)["fit"], "--output", output]
    step = Step(Path(output).name, words, output)
    return [(step, [f"{word}/{SEED}" if word == output and options.array else word for word in step.words])]


def of_chain(options: argparse.Namespace, output: str, added: Sequence[str]) -> list[tuple[Step, list[str]]]:
    """Return the steps from the first one that is not finished, and the words that run each."""
    check(
        len(options.configs) == 1, f"a chain is submitted alone, without {options.configs[-1]}: name it in its layers"
    )
    more, name = added_words(options, added), options.configs[0]
    steps = read_chain(name, output, more)
    first = 0 if options.array else next((i for i, step in enumerate(steps) if not step.is_finished()), len(steps))
    chain = ["chain", name, "--output", f"{output}/{SEED}" if options.array else output]
    extra = {verb: ["--", *words] for verb, words in more.items()}
    return [(step, [*chain, "--only", step.name, *extra.get(step.verb, ())]) for step in steps[first:]]


def script(step: Step, words: Sequence[str], options: argparse.Namespace, command: str) -> str:
    """Return the sbatch file that runs some words of aligntok, as ``command`` writes it."""
    alone = step.verb in ("evaluate", "report")  # programs of one process
    tasks = 1 if alone else max(1, options.gpus)
    values = {
        "job-name": step.name,
        "nodes": 1 if alone else options.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": min(tasks, options.gpus),
        "cpus-per-task": options.cpus,
        **{name: getattr(options, name) for name in ("time", "array", "partition", "account", "qos")},
        "output": shlex.quote(f"{step.folder}/{step.name}-{'%A_%a' if options.array else '%j'}.out"),
    }
    quoted = ["$SLURM_ARRAY_TASK_ID".join(part and shlex.quote(part) for part in w.split(SEED)) for w in words]
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={options.cpus}", *filter(None, [options.srun])]
    line = "".join((" \\\n    " if word[:2] == "--" else " ") + word for word in quoted)
    lines = [
        "#!/bin/bash",
        f"# Written by: {command}",
        f"# By hand: mkdir -p {shlex.quote(str(step.folder))} && sbatch FILE",
        *(f"#SBATCH --{name}={value}" for name, value in values.items() if value),
        *(f"#SBATCH {option}" for option in options.sbatch),
        "# two minutes before the end of its time: save the last step, and be requeued; the log goes on",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        *options.setup,
        f"{' '.join(srun)} aligntok{line}",
    ]
    return "\n".join(lines) + "\n"


def sbatch(path: Path, options: Sequence[str]) -> str:
    """Submit a file and return the number of the job, which finds this aligntok in its ``$PATH``."""
    beside = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    try:
        words = ["sbatch", "--parsable", *options, str(path)]
        result = subprocess.run(words, env=beside, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError("there is no sbatch: submit where Slurm is, or see the files by --dry_run") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refuses {path}: {words_of(RuntimeError(error.stderr))}") from error
    return result.stdout.strip().partition(";")[0]
