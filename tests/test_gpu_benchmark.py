"""benchmarks/gpu.py at toy size on the CPU: it runs, and counts FLOPs as a formula by hand says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_rows_at_toy_size():
    command = [sys.executable, "gpu.py", "--toy", "--only", "dit", "ar", "decode"]
    done = subprocess.run(
        command, cwd=FOLDER, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| dit", "| ar", "| decode"))]
    assert done.returncode == 0, done.stderr
    assert len(rows) == 3
    assert "failed" not in done.stdout
    counted = float(rows[0].split("|")[4])  # GFLOP / image
    assert counted == pytest.approx(training_gflop_of_matmuls(width=64, depth=2, channels=32, num_tokens=256), rel=1e-3)


def training_gflop_of_matmuls(width: int, depth: int, channels: int, num_tokens: int) -> float:
    """DiT's matmuls, without attention, which torch does not count on a CPU: forward, by input, by weight."""
    hidden, time_features = width * 8 // 3, 256
    inputs = num_tokens * channels * width + time_features * width  # no gradient to them
    blocks = depth * (num_tokens * (4 * width**2 + 3 * width * hidden) + 6 * width**2)
    rest = num_tokens * width * channels + 2 * width**2 + width**2
    return 2 * (2 * inputs + 3 * (blocks + rest)) / 1e9
