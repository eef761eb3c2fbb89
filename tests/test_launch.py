"""Several processes by Lightning's own launcher: `--trainer.devices 2 --trainer.strategy ddp` with every recipe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAST = "checkpoints/last.ckpt"
IMAGES = ("--data.train", "aligntok.data.Digits", "--data.train.split", "train", "--data.image_size", "32")  # no cache
CHAIN = [
    ("quickstart/encoder.yaml", None, ()),
    ("quickstart/stage1.yaml", None, ()),
    ("quickstart/control.yaml", "quickstart/stage1", ()),
    ("quickstart/stage2.yaml", "quickstart/stage1", ()),
    ("quickstart/stage3.yaml", "quickstart/stage2", ()),
    ("quickstart/dit.yaml", None, IMAGES),
    ("quickstart_alitok/stage1.yaml", None, ()),
    ("quickstart_alitok/stage2.yaml", "quickstart_alitok/stage1", ()),
    ("quickstart_alitok/ar.yaml", None, IMAGES),
]


def fit(folder: Path, recipe: str, previous: str | None, options: tuple[str, ...]) -> str:
    """Run two steps; return what was printed on stderr."""
    start = ("--init_from", f"runs/{previous}/{LAST}") if previous else ()
    ddp = ("--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp")
    command = [sys.executable, "-m", "aligntok", "fit", "--config", recipe, *options, *start]
    result = subprocess.run(
        [*command, "--config", "run/debug.yaml", *ddp], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = torch.load(folder / "runs" / recipe.replace(".yaml", "") / LAST, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert "global batch:" in result.stdout
    assert " = 2 x " in result.stdout
    return result.stderr


def test_a_recipe_with_an_average_on_two_processes(tmp_path):
    """Copying the stage for the average reached, by jsonargparse's partials, the launcher's processes and locks."""
    fit(tmp_path, *CHAIN[0])
    assert "sync_dist" not in fit(tmp_path, *CHAIN[1])


@pytest.mark.slow
def test_all_recipes_on_two_processes(tmp_path):
    for recipe, previous, options in CHAIN:
        if recipe == "quickstart_alitok/stage1.yaml":
            (tmp_path / "runs/quickstart_alitok").mkdir()
            (tmp_path / "runs/quickstart_alitok/encoder").symlink_to(tmp_path / "runs/quickstart/encoder")
        assert "sync_dist" not in fit(tmp_path, recipe, previous, options)
