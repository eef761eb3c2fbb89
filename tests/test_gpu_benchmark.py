"""benchmarks/gpu.py at toy size on the CPU: it runs, and counts FLOPs as the formulas say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_rows_at_toy_size():
    command = [sys.executable, "gpu.py", "--toy", "--only", "dit", "ar", "decode"]
    done = subprocess.run(
        command, cwd=FOLDER, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| dit", "| ar", "| decode"))]
    assert done.returncode == 0, done.stderr
    assert len(rows) == 3
    assert "failed" not in done.stdout
