"""benchmarks/sampling.py at toy size: its rows, the work in them counted by hand, and that a row may fail."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import AutoregressiveTransformer

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "sampling.py"


def test_rows_at_toy_size(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("sampling_benchmark", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, program)
    spec.loader.exec_module(program)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--toy", "--batch", "1"])
    monkeypatch.setattr(program, "decoder_row", broken)
    with pytest.raises(SystemExit, match="1"):
        program.main()
    header, ar, dit, *failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert failed == ["| tokens | 1 | failed: no room |", "| latents | 1 | failed: no room |"]
    assert len(header.split(" | ")) == len(ar.split(" | ")) == len(dit.split(" | "))

    width, depth = 32, 2
    with torch.device("meta"):
        network = AutoregressiveTransformer(4096, (16, 16), 16, 1000, width, depth, 2)
    weights = sum(parameter.numel() for parameter in network.parameters()) - network.embed.weight.numel()
    cached = 2 * 2 * depth * width * 273 / 2  # keys and values, class and null class, of half the sequence
    assert ar.split(" | ")[0] == "| AR-toy"
    assert ar.split(" | ")[4] == f"{272 * 2 * (weights + cached) / 1e9:.3g} GB"

    block = 256 * (4 * width**2 + 3 * width * (width * 8 // 3) + 2 * 256 * width) + 6 * width**2  # products
    ends = 256 * 2 * 32 * width + 256 * width + 3 * width**2  # patches in and out, time, last modulation
    assert dit.split(" | ")[0] == "| DiT-toy, 249 guided steps"
    assert float(dit.split(" | ")[4].split()[0]) == pytest.approx(2 * 249 * 2 * (depth * block + ends) / 1e12, rel=5e-3)


def broken(*args):
    raise UserError("no room")
