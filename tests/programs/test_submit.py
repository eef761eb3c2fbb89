"""`aligntok submit`: the sbatch files that it writes, as bash and sbatch read them. Slurm itself: tests/slurm."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from aligntok.__main__ import main
from aligntok.programs.steps import read_chain

READY = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))
SRUN = 'srun() { printf "%s\\n" "$@"; }\n'  # prints its words, one on a line, as bash hands them over


@pytest.fixture
def dry(in_folder, capsys):
    """Return the files that a command would submit."""

    def run(*words):
        assert main(["submit", "--dry_run", *words]) == 0
        printed = capsys.readouterr().out
        return [f"#!/bin/bash{text}" for text in printed.split("#!/bin/bash")[1:]]

    return run


def options_of(text):
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if line[:7] == "#SBATCH"]
    return {name: value for name, _, value in pairs}


def words_of(text, **environment):
    result = subprocess.run(["bash", "-uec", SRUN + text], env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_a_config_is_one_job(dry):
    size = ("--nodes", "4", "--gpus", "8", "--time", "8:00:00", "--partition", "gpu", "--sbatch=--exclusive")
    more = (
        "--setup",
        "echo 'ready to go'",
        "--srun=--mpi=none",
        "--output",
        "my runs/it's",
        "--",
        "--trainer.max_steps",
        "9",
    )
    (text,) = dry("stage1.yaml", *size, *more)
    options = options_of(text)
    expected = {"nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "8", "time": "8:00:00"}
    expected |= {"partition": "gpu", "exclusive": "", "signal": "USR1@120", "requeue": "", "open-mode": "append"}
    assert options.items() >= expected.items()
    assert shlex.split(options["output"]) == ["my runs/it's/it's-%j.out"]
    fit = "aligntok fit --config stage1.yaml --config run/slurm.yaml --trainer.max_steps 9 --trainer.num_nodes 4"
    said, *words = words_of(text)
    assert said == "ready to go"
    assert words[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=8", "--mpi=none"]
    assert words[3:-3] == f"{fit} --trainer.devices 8 --output".split()
    assert words[-3:] == ["my runs/it's", "--ckpt_path", "last"]


def test_an_array_is_a_run_of_each_seed(dry):
    (text,) = dry("dit.yaml", "--array", "0-2", "--output", "my runs/dit")
    assert options_of(text)["array"] == "0-2"
    assert options_of(text)["output"] == "'my runs/dit/dit-%A_%a.out'"
    words = words_of(text, SLURM_ARRAY_TASK_ID="2")
    assert words[words.index("--output") + 1] == "my runs/dit/2"
    assert words[words.index("--seed_everything") + 1] == "2"


def test_a_chain_is_a_job_for_each_step_that_is_not_finished(dry, fails):
    texts = dry("chains/aligntok.yaml", "--nodes", "2", "--gpus", "4", "--", "--trainer.max_steps", "9")
    steps = read_chain("chains/aligntok.yaml")
    assert [options_of(text)["job-name"] for text in texts] == [step.name for step in steps]
    words = {step.verb: " ".join(words_of(text)[3:]) for step, text in zip(steps, texts, strict=True)}
    chain, layer = "chain chains/aligntok.yaml --output runs/aligntok --only", "--config run/slurm.yaml"
    size = "--num_nodes 2 --devices 4"
    assert words["encode"] == f"{chain} latents -- {size}"
    assert words["fit"] == f"{chain} dit -- {layer} --trainer.max_steps 9 {size.replace('--', '--trainer.')}"
    assert words["evaluate"] == f"{chain} gfid"
    assert (options_of(texts[5])["nodes"], options_of(texts[7])["nodes"]) == ("2", "1")
    assert options_of(texts[7])["ntasks-per-node"] == "1"
    first = read_chain("chains/aligntok.yaml", added={"fit": ["--config", "run/slurm.yaml"]})[0]
    (first.folder / "checkpoints").mkdir(parents=True)
    torch.save({}, first.folder / "checkpoints/last.ckpt")
    first.write(first.made())
    assert options_of(dry("chains/aligntok.yaml", "--gpus", "2")[0])["job-name"] == "stage2"
    assert "stage1 was made by other words" in fails("submit", "chains/aligntok.yaml", "--", "--trainer.max_steps", "9")


def test_what_slurm_would_not_take(fails, in_folder, monkeypatch):
    monkeypatch.setenv("PATH", str(in_folder))
    assert "there is no sbatch: submit where Slurm is, or see the files by --dry_run" in fails("submit", "stage1.yaml")
    assert "gpus=-1" in fails("submit", "stage1.yaml", "--gpus", "-1")
    assert "a chain is submitted alone" in fails("submit", "chains/alitok.yaml", "run/debug.yaml")
    assert "--config nosuch.yaml" in fails("submit", "nosuch.yaml")


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_files_are_what_submit_writes(path, dry):
    text = path.read_text()
    command = shlex.split(text.splitlines()[1].removeprefix("# Written by: "))
    assert command[:2] == ["aligntok", "submit"]
    assert dry(*command[2:]) == [text]
    assert words_of(text)
