"""What an import brings with it."""

import subprocess
import sys

HEAVY = ("lightning", "pytorch_lightning", "jsonargparse", "tensorboard")  # others import scikit-learn for themselves


ALONE = ("aligntok.schedule", "aligntok.networks", "aligntok.flow", "aligntok.losses", "aligntok.metrics")


def test_lifts_out_without_lightning():
    code = f"import sys, {', '.join(ALONE)}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
