"""How commands start and end: quick mistakes, the device, the nodes, the output folder."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from aligntok.__main__ import main
from aligntok.cli import RunCLI
from aligntok.errors import UserError
from aligntok.programs.fabric import make_fabric

pytestmark = pytest.mark.usefixtures("in_folder")

ENCODER = ("fit", "--config", "quickstart/encoder.yaml")
HEAVY = {"torch", "lightning", "jsonargparse", "omegaconf", "torchvision"}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["report", "nowhere"],
        ["fti"],
        ["fit", "--config", "stage1.yaml", "--config", "nosuch.yaml"],
        ["encode", "--config=nosuch.yaml"],
        ["sample", "-c", "twice.yaml"],
        ["chain", "nosuch.yaml"],
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(words, in_folder):
    (in_folder / "twice.yaml").write_text("output: a\noutput: b\n")
    program = "import sys; from aligntok.__main__ import main; code = main(sys.argv[1:]); print(code, *sys.modules)"
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    code, *loaded = result.stdout.splitlines()[-1].split()
    assert code == ("0" if words[0].startswith("--") else "2")
    assert not HEAVY & set(loaded)
    assert len(result.stderr.splitlines()) == int(code) // 2


def test_output_that_nobody_reads_is_no_error():
    words = [sys.executable, "-m", "aligntok", "chain", "chains/quickstart.yaml", "--dry_run"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_printed_config_builds_one_parser_and_leaves_the_garbage_collection_on(capsys):
    with pytest.raises(SystemExit):
        main([*ENCODER, "--print_config"])
    assert gc.isenabled()
    assert "num_nodes" in capsys.readouterr().out
    assert [*RunCLI.subcommands()] == ["fit"]


def test_without_a_gpu_a_line_says_what_to_add(fails, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # wherever the test runs
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    line = fails("fit", "--config", "stage2.yaml", "--init_from", "stage1.ckpt")
    assert "trainer.accelerator gpu: torch finds no GPU here. Add --config run/cpu.yaml" in line
    line = fails("fit", "--config", "stage2.yaml", "--config", "run/cpu.yaml", "--ckpt_path", "absent.ckpt")
    assert "absent.ckpt" in line  # one step further


def test_nodes_that_nothing_started_are_not_waited_for(fails, monkeypatch):
    for name in ("MASTER_ADDR", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    problem = "num_nodes 2: nothing started this command on the other nodes"
    assert problem in fails(*ENCODER, "--trainer.num_nodes", "2")
    with pytest.raises(UserError, match=problem):
        make_fabric("cpu", devices=1, num_nodes=2)


@pytest.mark.parametrize("words", [[*ENCODER, "--out"], ["encode", "--outpu"], ["evaluate", "a", "--ref"]])
def test_options_are_written_in_full(words, fails, in_folder):
    assert words[-1][2:] in fails(*words, "x")
    assert not list(in_folder.iterdir())


def test_processes_leave_their_group_at_the_end(in_folder):
    program = (
        "import atexit, torch.distributed as dist; atexit.register(lambda: print(dist.is_initialized()));"
        "import aligntok.cli; dist.init_process_group('gloo', init_method='file://' + __import__('sys').argv[1],"
        "rank=0, world_size=1); print(dist.is_initialized())"
    )
    words = [sys.executable, "-c", program, str(Path("store").resolve())]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.split() == ["True", "False"]


@pytest.mark.parametrize("output", ["file", "file/run", "/dev/null", "/proc/run", "x" * 300, '"a\\0b"', "''"])
def test_an_output_that_is_no_folder_is_named(output, fails, in_folder):
    (in_folder / "file").write_text("mine")
    (in_folder / "mine.yaml").write_text(f"output: {output}\n")
    line = fails(*ENCODER, "--config", "run/debug.yaml", "--config", "mine.yaml")
    assert output.strip("'\"")[:20].partition("\\")[0] in line
    assert (in_folder / "file").read_text() == "mine"
