"""Build the wheel, install it into an empty environment, and run README's commands from an empty folder, small.

``make test-wheel PYTHON=python3.11``. Without downloads: what needs published files must say so in a line, exit code 2.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
README = (SOURCE / "README.md").read_text()
SHAPES = "--images aligntok.data.Shapes --images.num_images 64 --images.image_size 32 --min_psnr 0 --accelerator cpu"
TWO_STEPS = "--config run/debug.yaml --data.global_batch_size 4"
TOKENIZER = f"--config size/debug.yaml --config data/shapes.yaml --config offline.yaml {TWO_STEPS}"
ALITOK = f"--config size/alitok_debug.yaml --config data/shapes.yaml --config offline.yaml {TWO_STEPS}"
SMALLER = [  # what a command of the table contains, and the words that make it small
    ("fit --config alitok_stage1.yaml", f"{ALITOK} --model.auxiliary mse"),
    ("--config alitok_stage", ALITOK),
    ("--config stage", TOKENIZER),
    ("fit --config dit.yaml", f"--config size/dit_debug.yaml {TWO_STEPS}"),
    ("sample --config dit.yaml", "--config size/dit_debug.yaml --num_samples 8 --accelerator cpu"),
    ("fit --config alitok_ar.yaml", f"--config size/ar_debug.yaml {TWO_STEPS}"),
    ("encode", SHAPES),
    ("chain", "--dry_run"),
    ("submit", "--dry_run"),
    ("new", ""),
    ("report", ""),
    ("repair", ""),
]
NEEDS_FILES = ["evaluate", "import", "sample --config lightningdit.yaml", "plan", "fetch"]
OFFLINE = """
model: {init_args: {loss: {init_args: {perceptual: null}}}}
callbacks: {rfid: null}
"""
PICTURES = """
from pathlib import Path
from aligntok.data import Shapes
Path("FOLDER").mkdir()
for i in range(40):
    Shapes(40, (150, 200))[i][0].save(f"FOLDER/{i}.jpg")
"""


def main() -> None:
    """Run everything; the first thing that is wrong ends it."""
    with tempfile.TemporaryDirectory() as folder:
        venv, empty = Path(folder) / "venv", Path(folder) / "empty"
        empty.mkdir()
        run(sys.executable, "-m", "venv", venv)
        run(venv / "bin/pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, SOURCE)
        (wheel,) = Path(folder).glob("*.whl")
        run(venv / "bin/pip", "install", "--quiet", f"{wheel}[offline]")
        os.chdir(empty)
        os.environ.update(PATH=f"{venv / 'bin'}:{os.environ['PATH']}", PYTHONPATH="")
        readme()


def readme() -> None:
    """Run the table of commands, then the start of the quickstart and the ten lines of Python."""
    Path("offline.yaml").write_text(OFFLINE)
    run("python", "-c", PICTURES)
    run("aligntok", "--version")
    run("aligntok", "--help")
    table = README.partition("\n## Commands\n")[2].partition("\n\n##")[0]
    commands = re.findall(r"`(aligntok [^`]+)`", "\n".join(line for line in table.splitlines() if line[:1] == "|"))
    for command in commands:
        words = command.removeprefix("aligntok ")
        if any(words.startswith(start) for start in NEEDS_FILES):
            run(*shlex.split(command), code=2)
        else:
            more = next(more for part, more in SMALLER if part in words)
            run(*shlex.split(command), *shlex.split(more))
    run(*shlex.split(f"aligntok fit --config photos/stage1.yaml --config FOLDER.yaml {TWO_STEPS}"))  # as `new` says
    chain = ["aligntok", "chain", "chains/quickstart.yaml", "--dry_run"]
    steps = subprocess.run(chain, capture_output=True, text=True, check=True).stdout
    for step in re.findall(r"aligntok ((?:fit|encode) .*)", steps):
        if "control" not in step:
            small = "--config run/debug.yaml" if step.startswith("fit") else "--min_psnr 0"
            run("aligntok", *shlex.split(step), *small.split(), *few(step))
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run("python", "-c", block)


def few(step: str) -> list[str]:
    """Draw few samples where a generator is measured."""
    return ["--callbacks.gfid.num_samples", "20"] if "dit.yaml" in step else []


def run(*words: object, code: int = 0) -> None:
    """Run a command, which must end with ``code``; print it and how long it took."""
    text, start = shlex.join(map(str, words)), time.perf_counter()
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    print(f"{time.perf_counter() - start:6.1f} s  {text[:150]!r}", flush=True)
    if result.returncode != code or "Traceback" in result.stderr:
        sys.exit(f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}\nexit code {result.returncode}, not {code}: {text}")
    if code:
        print(f"          {result.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
