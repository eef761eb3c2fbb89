"""CPU seconds until a command answers: the help, mistakes in names, the report, a printed config."""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = [
    "--help",
    "--version",
    "fti",
    "fit --config nosuch.yaml",
    "report RUN",
    "fit --config stage1.yaml --print_config",
]


def cpu_seconds(command: list[str], folder: str) -> float:
    """Run Python once; return its user and system time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "RUN").mkdir()
        (Path(folder) / "RUN" / "metrics.csv").write_text("step,val/psnr\n0,10.0\n1,20.0\n")
        commands = {f"`aligntok {words}`": ["-m", "aligntok", *words.split()] for words in COMMANDS}
        commands["`import lightning` alone"] = ["-c", "import lightning"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):  # in turn: what else the machine does falls on all of them
            for name, command in commands.items():
                seconds[name].append(cpu_seconds(command, folder))
    print("| command | CPU s (range) |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")


if __name__ == "__main__":
    main()
