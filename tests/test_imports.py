"""What an import brings with it."""

import subprocess
import sys

import pytest

HEAVY = ("lightning", "pytorch_lightning", "jsonargparse", "tensorboard", "sklearn")


@pytest.mark.parametrize(
    "module",
    ["aligntok", "aligntok.networks", "aligntok.losses", "aligntok.metrics", "aligntok.flow", "aligntok.schedule"],
)
def test_lifts_out_without_lightning(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
