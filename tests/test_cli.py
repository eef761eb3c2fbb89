"""The command line: what users type, and what they get for a mistake."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from aligntok.__main__ import VERBS, main, report_of_thread
from aligntok.cli import merge_layers
from aligntok.data import Digits

pytestmark = pytest.mark.usefixtures("in_folder")

DEBUG = ("--config", "run/debug.yaml")


def encoder_run(*args: str) -> Path:
    assert main(["fit", "--config", "quickstart/encoder.yaml", *DEBUG, *args]) == 0
    return Path("runs/quickstart/encoder")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.precision", "bf16-true"], ["precision bf16-true", "use bf16-mixed"]),
        (["--trainer.precision", "64-true"], ["precision 64-true", "use 32-true"]),
        (["--trainer.precision", "16-mixed"], ["precision 16-mixed", "underflow", "use bf16-mixed"]),
        (["--trainer.strategy", "ddp_spawn"], ["trainer.strategy ddp_spawn", "use ddp"]),
        (["--trainer.strategy", "fsdp"], ["trainer.strategy fsdp", "norm of its own shard", "sharded"]),
        (["--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"], ["trainer.strategy fsdp", "use ddp"]),
        (
            [
                *("--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy"),
                *("--trainer.strategy.start_method", "spawn"),
            ],
            ["trainer.strategy ddp_spawn", "use ddp"],
        ),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_what_lightning_has_and_a_run_cannot_have_is_refused_by_name(fails, args, words):
    """Before anything is built."""
    line = fails("fit", "--config", "quickstart/encoder.yaml", *DEBUG, *args)
    assert all(word in line for word in words)
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "stage22.yaml"], ["stage22.yaml", "stage2.yaml"]),
        (["--config", "quickstart/encoder.yaml", "--model.foo", "3"], ["'foo'", "model"]),
        (["--config", "quickstart/encoder.yaml", "--trainer.max_stepz", "3"], ["trainer.max_stepz"]),
        (["--config", "quickstart/encoder.yaml", "--trainer.max_steps", "many"], ["trainer.max_steps", "many"]),
        (["--config", "base.yaml"], ["data", "train", "recipe"]),
        (["--config", "data/shapes.yaml"], ["model", "recipe"]),
        (["--config", "stage2.yaml"], ["PerceptualAlignment", "previous stage", "--init_from"]),
        (
            ["--config", "quickstart/stage1.yaml"],
            ["model.tokenizer.encoder.name", "no checkpoint runs/quickstart/encoder"],
        ),
        (
            ["--config", "quickstart/encoder.yaml", "--model.encoder.init_args.name", "vit_tinny_patch16_224"],
            ["vit_tiny_patch16_224"],
        ),
        (
            ["--config", "quickstart/encoder.yaml", "--model.encoder.init_args.image_size", "30"],
            ["30", "not divisible"],
        ),
        (
            ["--config", "quickstart/encoder.yaml", "--model.encoder.init_args.image_size", "40"],
            ["(32, 32)", "(40, 40)"],
        ),
        (
            ["--config", "quickstart/encoder.yaml", "--trainer.accumulate_grad_batches", "3"],
            ["global_batch_size 32", "3"],
        ),
        (["--config", "quickstart/encoder.yaml", "--trainer.max_steps=-1", "--trainer.fast_dev_run=0"], ["never end"]),
        (
            [
                "--config",
                "quickstart/encoder.yaml",
                "--data.train",
                "aligntok.data.ImageFolder",
                "--data.train.root",
                "nowhere",
            ],
            ["nowhere"],
        ),
        (["--config", "quickstart/encoder.yaml", "--ckpt_path", "absent.ckpt"], ["absent.ckpt"]),
    ],
)
def test_a_mistake_is_one_line(args, words, fails):
    line = fails("fit", *args, *DEBUG)
    assert all(word in line for word in words), line


def test_a_required_argument_is_named(fails, in_folder):
    model = "{encoder: {init_args: {name: vit_tiny_patch16_224, downsampling: 8}}, num_classes: 10}"
    (in_folder / "mine.yaml").write_text(
        f"layers: [base.yaml, stage/encoder_pretraining.yaml]\noutput: x\nmodel: {{init_args: {model}}}\n"
        "data: {train: aligntok.data.Digits, image_size: 32}\n"
    )
    assert "LatentDataModule) needs global_batch_size" in fails("fit", "--config", "mine.yaml")


def test_unknown_key_in_yaml_is_named(fails, in_folder):
    (in_folder / "mine.yaml").write_text("model:\n  init_args:\n    learning_rat: 0.1\n")
    line = fails("fit", "--config", "quickstart/encoder.yaml", "--config", "mine.yaml", *DEBUG)
    assert "'learning_rat' in model" in line


def test_yaml_that_is_none(fails, in_folder):
    (in_folder / "mine.yaml").write_text("model: [")
    assert "mine.yaml is no YAML" in fails("fit", "--config", "mine.yaml")
    (in_folder / "mine.yaml").write_text("")
    assert "empty" in fails("fit", "--config", "mine.yaml")


def test_command_line_overrules_yaml_in_any_order():
    for name in "ab":
        Path(f"{name}.yaml").write_text(f"output: {name}\n{name}: 1\n")
    words = merge_layers(["fit", "--output", "x", "--config", "a.yaml", "--config=b.yaml", "--seed_everything", "3"])
    assert yaml.safe_load(words[2]) == {"output": "b", "a": 1, "b": 1}
    assert words[3:] == ["--output", "x", "--seed_everything", "3"]


def printed_config(capsys, *args: str) -> dict:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "stage1.yaml", *args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_callbacks_have_names(capsys, in_folder):
    """A later layer and the command line change one number of one of them, add one, and take one away."""
    named = printed_config(capsys)["callbacks"]
    assert {"checkpoint", "learning_rate", "ema", "reconstruction_grid", "quality", "probe", "rfid"} == named.keys()
    assert named["ema"]["init_args"]["decay"] == 0.999
    (in_folder / "mine.yaml").write_text(
        "callbacks:\n  ema: {init_args: {decay: 0.5}}\n  probe: null\n"
        "  early: {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/psnr}}\n"
    )
    for key in ("ema.decay", "ema.init_args.decay"):
        ours = printed_config(capsys, "--config", "mine.yaml", f"--callbacks.{key}", "0.9", "--callbacks.quality=null")
        changed = ours["callbacks"]
        assert changed["ema"] == {"class_path": "aligntok.callbacks.EMA", "init_args": {"decay": 0.9, "warmup": True}}
        assert changed["probe"] is changed["quality"] is None
        assert changed["early"]["init_args"]["monitor"] == "val/psnr"
        assert changed["checkpoint"] == named["checkpoint"]


def test_callbacks_arrive_beside_lightnings_list(in_folder):
    """Those with a name and those of ``trainer.callbacks``, as configs had them before, in one run; it is repeated."""
    (in_folder / "mine.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "      init_args: {monitor: val/accuracy}\n"
        "callbacks: {checkpoint: {init_args: {every_n_steps: 1}}, learning_rate: null}\n"
    )
    run = encoder_run("--config", "mine.yaml")
    callbacks = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert any("EarlyStopping" in key for key in callbacks)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["callbacks"]["checkpoint"]["init_args"]["every_n_steps"] == 1
    assert saved["callbacks"]["learning_rate"] is None
    assert main(["fit", "--config", str(run / "config.yaml"), "--output", "again"]) == 0
    again = yaml.safe_load(Path("again/config.yaml").read_text())
    assert {key: again[key] for key in ("callbacks", "model", "data")} == {
        key: saved[key] for key in ("callbacks", "model", "data")
    }


def test_a_run_is_not_written_over_and_resumes(fails):
    run = encoder_run()
    first = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert "--ckpt_path last" in fails("fit", "--config", "quickstart/encoder.yaml", *DEBUG)
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == first
    encoder_run("--ckpt_path", "last", "--trainer.max_steps", "4")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    steps = [int(line.split(",")[step_column(run)]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == sorted(steps)
    assert max(steps) == 3
    assert json.loads((run / "run.json").read_text())["steps"] == 4
    assert yaml.safe_load((run / "config.1.yaml").read_text())["trainer"]["max_steps"] == 2


@pytest.mark.parametrize("option", ["fast_dev_run=true", "logger=false", "enable_checkpointing=false"])
def test_a_run_without_logs_or_checkpoints(option):
    run = encoder_run(f"--trainer.{option}")
    assert (run / "metrics.csv").exists() == (option == "enable_checkpointing=false")
    assert (run / "checkpoints" / "last.ckpt").exists() == (option == "logger=false")


class CtrlC(pl.Callback):
    """Presses it when the third step begins."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_what_there_is_and_ends_with_130(capsys):
    stop = ["--callbacks.stop.class_path", f"{__name__}.CtrlC", "--trainer.max_steps", "5"]
    assert main(["fit", "--config", "quickstart/encoder.yaml", *DEBUG, *stop]) == 130
    run = Path("runs/quickstart/encoder")
    assert f"{run}/checkpoints/last.ckpt is of step 2: --ckpt_path last goes on" in capsys.readouterr().out
    encoder_run("--ckpt_path", "last", "--trainer.max_steps", "4")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_ctrl_c_before_the_first_step_ends_with_130(monkeypatch):
    monkeypatch.setattr(Digits, "__len__", lambda self: os.kill(os.getpid(), signal.SIGINT) or 1437)
    assert main(["fit", "--config", "quickstart/encoder.yaml", *DEBUG]) == 130


@pytest.mark.parametrize(
    ("error", "shown"), [(OSError(errno.ENOSPC, "no room"), []), (OSError(errno.EIO, "broken"), [5])]
)
def test_a_thread_that_finds_a_full_disk_says_nothing(error, shown):
    seen = []
    args = threading.ExceptHookArgs((type(error), error, None, None))
    report_of_thread(args, lambda args: seen.append(args.exc_value.errno))
    assert seen == shown


def test_a_disk_that_is_full_for_somebody_elses_writer_is_a_line(monkeypatch, fails):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Digits, "__len__", write)
    assert "the disk is full: free some space" in fails("fit", "--config", "quickstart/encoder.yaml", *DEBUG)


class Signal(pl.Callback):
    """Sends one while the second step runs."""

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_with_143_and_the_requeued_job_goes_on(capsys, monkeypatch, fails):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = ["fit", "--config", "quickstart/encoder.yaml", *DEBUG, "--trainer.max_steps", "4"]
    before = signal.getsignal(signal.SIGTERM)
    assert main([*command, "--callbacks.stop.class_path", f"{__name__}.Signal"]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "last.ckpt is of step 2: --ckpt_path last goes on" in capsys.readouterr().out
    assert "already holds a run" in fails(*command)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(command) == 0
    assert "from step 2" in capsys.readouterr().out


class SignalInValidation(pl.Callback):
    """Sends one while the last step is measured."""

    def on_validation_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_last_measurement_leaves_it_to_the_next_attempt(capsys):
    command = ["fit", "--config", "quickstart/encoder.yaml", *DEBUG, "--trainer.limit_val_batches", "2"]
    assert main([*command, "--callbacks.stop.class_path", f"{__name__}.SignalInValidation"]) == 143
    record = Path("runs/quickstart/encoder/run.json")
    assert not record.exists()
    assert main([*command, "--ckpt_path", "last"]) == 0
    assert "had reached its end before, at step 2 but for its last measurement" in capsys.readouterr().out
    assert json.loads(record.read_text())["steps"] == 2
    assert measured_steps(record.parent) == [1]
    alone = encoder_run("--output", "runs/alone", "--trainer.limit_val_batches", "2")
    values = [json.loads((run / "run.json").read_text())["metrics"]["val/accuracy"] for run in (record.parent, alone)]
    assert values[0] == values[1]


def test_a_signal_before_the_first_step_ends_with_143(monkeypatch):
    monkeypatch.setattr(Digits, "__len__", lambda self: os.kill(os.getpid(), signal.SIGUSR1) or 1437)
    assert main(["fit", "--config", "quickstart/encoder.yaml", *DEBUG]) == 143


def test_signals_are_noted_before_torch_is_imported():
    program = """
import os, signal, sys
import aligntok.__main__ as program
def check_configs(arguments):
    assert "torch" not in sys.modules
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print("lives on", flush=True)
    os._exit(3)
program.check_configs = check_configs
program.main(["fit"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "lives on\n")


def test_what_lightnings_own_requeueing_left_is_never_taken(fails):
    left = Path("runs/quickstart/encoder/hpc_ckpt_1.ckpt")
    left.parent.mkdir(parents=True)
    left.touch()
    assert f"{left} is of Lightning's own requeueing" in fails("fit", "--config", "quickstart/encoder.yaml", *DEBUG)


def test_a_second_run_in_the_same_folder_is_refused(fails):
    folder = Path("runs/quickstart/encoder")
    hold = f"from aligntok.files import locked\nwith locked('{folder}'): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        line = fails("fit", "--config", "quickstart/encoder.yaml", *DEBUG)
        assert f"{folder} is in use: process {process.pid}" in line
        assert [path.name for path in folder.iterdir()] == [".lock"]
        process.communicate(b"\n")
    encoder_run()


def test_a_run_ends_with_a_measurement_of_its_last_step(capsys):
    run = encoder_run(
        "--trainer.max_steps", "5", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"
    )
    assert measured_steps(run) == [1, 3, 4]
    encoder_run("--trainer.max_steps", "5", "--trainer.val_check_interval", "2", "--ckpt_path", "last")
    assert "had reached its end before, at step 5" in capsys.readouterr().out
    assert measured_steps(run) == [1, 3, 4]
    other = ["--output", "runs/other", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    encoder_run(*other, "--trainer.limit_val_batches", "1")
    assert measured_steps(Path("runs/other")) == [1, 3]


def measured_steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["val/accuracy"]]


def test_where_validate_writes_is_tried_before_it_measures(fails):
    run = encoder_run()
    (run / "validate.json").mkdir()
    last = str(run / "checkpoints" / "last.ckpt")
    line = fails("validate", "--config", str(run / "config.yaml"), "--ckpt_path", last)
    assert "validate.json: a folder of this name is in the way" in line


def step_column(run: Path) -> int:
    return (run / "metrics.csv").read_text().splitlines()[0].split(",").index("step")


def test_first_start_with_last_says_that_it_begins(capsys):
    encoder_run("--ckpt_path", "last")
    assert "starts from the beginning" in capsys.readouterr().out


def test_start_up_block_and_progress(capsys):
    encoder_run()
    out = capsys.readouterr().out
    for words in (
        "1,437 training images",
        "360 validation",
        "10 classes",
        "32 = devices x accumulated x batch = 1 x 1 x 32",
        "44 per epoch, ends at step 2 after 64 images",
        "precision 32-true",
        "images/s",
    ):
        assert words in out, words


def test_validate_without_weights_is_refused(fails):
    assert "--ckpt_path" in fails("validate", "--config", "quickstart/encoder.yaml")
    assert "last" in fails("validate", "--config", "quickstart/encoder.yaml", "--ckpt_path", "last")


def test_the_run_layer_switches_compiling_and_tf32(monkeypatch):
    compiled, precision = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    try:
        recomputed = []
        monkeypatch.setattr(
            "aligntok.networks.blocks.checkpoint", lambda call, *args, **_: recomputed.append(call) or call(*args)
        )
        encoder_run("--compile", "true", "--float32_matmul", "high", "--gradient_checkpointing", "true")
        assert torch.get_float32_matmul_precision() == "high"
        assert compiled == ["Block"] * 4  # of the quickstart's ViT
        assert len(set(recomputed)) == 4
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_logger_of_the_user_comes_beside_ours():
    run = encoder_run("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=theirs")
    assert "train/loss" in (run / "metrics.csv").read_text()
    assert list(run.glob("events.out.tfevents.*"))
    assert len(list(Path("theirs").rglob("metrics.csv"))) == 1


def test_every_verb_runs_from_the_saved_config():
    run = encoder_run()
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    for verb in ("validate", "test", "predict"):
        assert main([verb, "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint]) == 0
    assert "val/accuracy" in json.loads((run / "validate.json").read_text())["metrics"]
    assert "test/accuracy" in json.loads((run / "test.json").read_text())["metrics"]


def test_a_checkpoint_with_code_is_refused(fails, in_folder):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (in_folder / "sprung",))

    torch.save({"state_dict": {}, "trap": Trap()}, in_folder / "trap.ckpt")
    line = fails("fit", "--config", "quickstart/encoder.yaml", *DEBUG, "--ckpt_path", "trap.ckpt")
    assert "refused" in line
    assert not (in_folder / "sprung").exists()


def test_help_reads_like_a_manual(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for words in (*VERBS, "report.html", "--config stage1.yaml", "--init_from"):
        assert words in out


def test_no_verb(capsys, fails):
    assert "fit" in fails(capsys)
    assert "no verb 'fitt'" in fails("fitt", "--config", "stage1.yaml")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_takes_and_names_a_mistake_in_a_line(verb, fails):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    fails(verb, "--nonsense", "3")


def test_the_list_of_verbs_comes_without_waiting_for_torch():
    program = "import sys; from aligntok.__main__ import main; main(sys.argv[1:]); print(*sys.modules)"
    for words in (["--help"], ["--version"], ["report", "nowhere"], ["no verb"]):
        loaded = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
        assert not {"torch", "lightning", "jsonargparse"} & set(loaded.stdout.split()), words


def test_a_layer_in_the_users_folder_does_not_replace_a_shipped_one(capsys, in_folder):
    (in_folder / "base.yaml").write_text("trainer: {max_steps: 7}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart/encoder.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == -1
