"""`aligntok chain`: what runs, what is skipped, what goes on, and what is refused because it would mix two runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from aligntok.__main__ import main
from aligntok.programs import chain
from aligntok.programs.steps import Step, read_chain

CHAIN = f"""
output: runs
steps:
  first: fit --config quickstart/encoder.yaml --config run/debug.yaml
  second: >-
    fit --config quickstart/encoder.yaml --config run/debug.yaml --callbacks.stop {__name__}.CtrlC
    --model.encoder.weights ${{first}}/encoder.safetensors
  measured: validate --config quickstart/encoder.yaml --config run/debug.yaml --ckpt_path last --output ${{second}}
"""
FIRST, SECOND = Path("runs/first/checkpoints/last.ckpt"), Path("runs/second/checkpoints/last.ckpt")


class CtrlC(pl.Callback):
    """Presses it when the second step begins, once."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 1 and not Path("pressed").exists():
            Path("pressed").touch()
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_finished_is_skipped_and_what_was_cut_off_goes_on(in_folder, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(chain, "run", lambda words: ran.append(words[0]) or main(words))  # without another process
    Path("mine.yaml").write_text("layers: [all.yaml]\nsteps: {measured: null}")
    Path("all.yaml").write_text(CHAIN)
    with pytest.raises(SystemExit) as end:
        main(["chain", "mine.yaml"])
    assert end.value.code == 130
    assert ran == ["fit", "fit"]
    assert "aligntok: step 2 of 2, second, was interrupted after" in capsys.readouterr().err
    assert torch.load(SECOND, weights_only=True)["global_step"] == 1
    made = FIRST.stat().st_mtime_ns
    assert main(["chain", "mine.yaml"]) == 0
    assert ran[2:] == ["fit"]
    printed = capsys.readouterr().out
    assert "# step 1 of 2, first: finished before, skipped" in printed
    assert "from step 1, ends at step 2" in printed
    assert torch.load(SECOND, weights_only=True)["global_step"] == 2
    assert main(["chain", "mine.yaml"]) == 0
    assert len(ran) == 3
    assert FIRST.stat().st_mtime_ns == made


def test_what_was_made_otherwise_is_refused_and_what_builds_on_it_too(in_folder, fails, capsys):
    Path("mine.yaml").write_text(CHAIN)

    def finish(*numbers, weights=0):
        for number in numbers:
            step = read_chain("mine.yaml")[number]
            path = (FIRST, SECOND, Path("runs/second/validate.json"))[number]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.full((3,), weights), path)
            step.write(step.made())

    def todo(*words):
        assert main(["chain", "mine.yaml", "--dry_run", *words]) == 0
        return [
            line.split(", ")[1]
            for line in capsys.readouterr().out.splitlines()
            if line[0] == "#" and "skipped" not in line
        ]

    finish(0, 1, 2)
    assert todo() == []
    Path("runs/chain/first.json").unlink()
    assert todo() == ["first"]  # made by hand: the command itself sees how far it is
    finish(0)
    assert todo("--", "--trainer.devices", "4", "--config", "run/debug.yaml") == []  # on another machine it is the same
    line = fails("chain", "mine.yaml", "--", "--trainer.max_steps", "3")
    assert "first was made by other words or configs (see runs/chain/first.json): move runs/first away" in line
    Path("changed.yaml").write_text("{}")
    Path("mine.yaml").write_text(CHAIN.replace("encoder.yaml", "encoder.yaml --config changed.yaml", 1))
    assert todo() == []  # another file that says the same
    Path("changed.yaml").write_text("model: {init_args: {label_smoothing: 0.1}}")  # behind the same words
    assert "--keep first" in fails("chain", "mine.yaml")
    assert main(["chain", "mine.yaml", "--keep", "first"]) == 0
    assert todo() == []
    shutil.rmtree("runs/first")
    assert todo("--only", "first") == ["first"]
    finish(0)
    assert todo() == []  # the same weights again
    finish(0, weights=1)
    assert "second was made from another first" in fails("chain", "mine.yaml")
    assert todo("--keep", "second") == []
    assert "second was made from another first" in fails("chain", "mine.yaml")  # that was a dry run
    finish(1, weights=2)
    assert todo() == ["measured"]  # which is not refused: it may be written over
    read_chain("mine.yaml")[1].write(None)  # begun, not finished
    assert todo() == ["second", "measured"]
    assert "second was made by other words" in fails(
        "chain", "mine.yaml", "--only", "second", "--", "--seed_everything", "1"
    )


def test_a_product_that_is_gone_or_changed_is_not_finished(tmp_path):
    step = Step("samples", ["sample", "--config", "sample.yaml"], str(tmp_path))
    assert step.made() is None
    step.folder.mkdir()
    (step.folder / "samples.json").write_text("{}")
    torch.save(torch.zeros(3), step.folder / "samples_1x1x1x3.npz")
    step.write(step.made())
    assert step.is_finished()
    torch.save(torch.ones(3), step.folder / "samples_1x1x1x3.npz")  # as large as before
    assert not step.is_finished()
    (step.folder / "samples_1x1x1x3.npz").unlink()
    assert not step.is_finished()


def test_a_step_ends_the_chain_with_its_exit_code(in_folder):
    (in_folder / "mine.yaml").write_text("output: a\nsteps: {report: report nowhere, again: report nowhere}")
    words = [sys.executable, "-m", "aligntok", "chain", "mine.yaml"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert first == "aligntok: error: there is no folder nowhere"
    assert re.match(r"aligntok: step 1 of 2, report, ended with exit code 2 after \d:\d\d:\d\d\. The same", second)
    assert "step 2" not in result.stdout


class EndsTheChain(pl.Callback):
    """Sends TERM to the process above when the third step begins, once."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2 and not Path("sent").exists():
            Path("sent").touch()
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)


@pytest.mark.slow
def test_a_signal_to_the_chain_reaches_its_step(in_folder):
    fit = "fit --config quickstart/encoder.yaml --config run/debug.yaml --trainer.max_steps 4"
    fit += f" --callbacks.stop {__name__}.EndsTheChain"
    (in_folder / "mine.yaml").write_text(f"output: runs\nsteps: {{first: {fit}}}")
    words = [sys.executable, "-m", "aligntok", "chain", "mine.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 143, result.stderr
    assert "aligntok: step 1 of 1, first, was interrupted after" in result.stderr
    assert torch.load(FIRST, weights_only=True)["global_step"] in (2, 3)
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.load(FIRST, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("trainer: {}", [], "mine.yaml is no chain: it needs `output:` and `steps:`"),
        ("output: a\nsteps: {one: ftt}", [], "mine.yaml: one begins with 'ftt', give one of fit, validate"),
        ("output: a\nsteps: {one: report a}", ["--only", "two"], "there is no step two: mine.yaml has one"),
        ("output: a\nsteps: {one: report}", [], "one: name a folder or a file after report"),
        ("output: a\nsteps: {one: fit --config nosuch.yaml}", [], "--config nosuch.yaml"),
        ("output: a\nsteps: {one: report a}", ["--", "--output", "b"], "--output stands before the --"),
        ("layers: [chains/quickstart.yaml]", ["--output", "b"], "the configs of stage1 read from runs/quickstart/"),
    ],
)
def test_a_chain_that_cannot_be(text, words, line, in_folder, fails):
    (in_folder / "mine.yaml").write_text(text)
    assert line in fails("chain", "mine.yaml", *words)


def test_several_tasks_run_one_step(in_folder, fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 tasks run one step together, by --only STEP" in fails("chain", "chains/quickstart.yaml")
    assert main(["chain", "chains/quickstart.yaml", "--only", "encoder", "--dry_run"]) == 0


def test_a_layer_changes_one_step_and_takes_out_another(in_folder):
    (in_folder / "mine.yaml").write_text(
        "layers: [chains/aligntok.yaml]\nreference: ours.npz\nsteps: {stage3_measured: null, report: report elsewhere}"
    )
    steps = {step.name: step for step in read_chain("mine.yaml", "o", {"fit": ["--trainer.max_steps", "9"]})}
    assert [*steps] == ["stage1", "stage2", "stage3", "latents", "dit", "samples", "gfid", "report"]
    assert (
        "--init_from o/stage1/checkpoints/last.ckpt --trainer.max_steps 9 --output o/stage2" in steps["stage2"].command
    )
    assert "--reference ours.npz" in steps["gfid"].command
    assert steps["report"].command == "aligntok report elsewhere"
    inputs = {name: [other.name for other in step.inputs] for name, step in steps.items()}
    assert inputs["stage1"] == []
    assert inputs["stage3"] == ["stage2"]
    assert inputs["dit"] == ["stage3", "latents"]
    assert inputs["gfid"] == ["samples"]
