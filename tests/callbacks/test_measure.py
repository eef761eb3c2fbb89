"""Measurements through a real Trainer: what they say, what they keep, and that batches and ranks change nothing."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aligntok.callbacks import LinearProbe, ReconstructionFID, ReconstructionGrid, ReconstructionQuality
from aligntok.callbacks.grids import latent_colours
from aligntok.data import LatentDataModule, Shapes
from aligntok.errors import UserError
from aligntok.metrics import EncoderFeatures, FeatureStatistics

WORKER = """
import json, sys
from tests_conftest import Tiny
from aligntok.callbacks import LinearProbe, ReconstructionFID, ReconstructionQuality
from aligntok.metrics import EncoderFeatures
import torch
torch.set_num_threads(1)
folder, devices = sys.argv[1], int(sys.argv[2])
stage = Tiny.stage()
callbacks = [ReconstructionQuality(), LinearProbe(), ReconstructionFID(EncoderFeatures(Tiny.encoder(3), "tiny"))]
data = measured_data(8)
strategy = "ddp" if devices > 1 else "auto"
trainer = Tiny.trainer(folder, 1, callbacks, limit_val_batches=1.0, devices=devices, strategy=strategy)
values = trainer.validate(stage, data, verbose=False)[0]
if trainer.is_global_zero:
    print("VALUES", json.dumps(values))
"""


def measured_data(batch: int, **options) -> LatentDataModule:
    """37 images, so that neither batches nor ranks divide them."""
    options = {"crop": "center", "flip": False, **options}
    return LatentDataModule(Shapes(72, 16), 16, batch, val=Shapes(37, 16, seed=1), **options)


def judge(tiny):
    return EncoderFeatures(tiny.encoder(3), "tiny")


def measure(tiny, folder, batch=8, stage=None, data=None, **options):
    callbacks = [ReconstructionQuality(), LinearProbe(), ReconstructionFID(judge(tiny), **options)]
    trainer = tiny.trainer(folder, 1, callbacks, limit_val_batches=1.0)
    return trainer.validate(stage or tiny.stage(), data or measured_data(batch), verbose=False)[0]


def test_any_batch_size_gives_the_same_values(tiny, tmp_path):
    one, other = measure(tiny, tmp_path / "a", 8), measure(tiny, tmp_path / "b", 5)
    assert set(one) >= {"val/psnr", "val/ssim", "val/probe", "val/probe_pooled", "val/rfd_tiny", "val/l1"}
    assert "val/rfid" not in one
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_two_ranks_give_the_same_values(tiny, tmp_path):
    conftest = Path(__file__).parent.parent / "conftest.py"
    (tmp_path / "tests_conftest.py").write_text(conftest.read_text())
    source = inspect.getsource(measured_data)
    header = "from aligntok.data import LatentDataModule, Shapes\n"
    (tmp_path / "worker.py").write_text(header + source + WORKER)
    command = [sys.executable, "worker.py", str(tmp_path / "run"), "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("VALUES"))
    values = json.loads(line.removeprefix("VALUES "))
    assert values == pytest.approx(measure(tiny, tmp_path / "one"), rel=1e-4, abs=1e-6)


def test_perfect_reconstruction_has_distance_zero(tiny, tmp_path):
    stage = tiny.stage()
    stage.validation_step = lambda batch, batch_idx: {
        "latent": stage.tokenizer.encode(batch["image"]),
        "reconstruction": batch["image"],
    }
    values = measure(tiny, tmp_path, stage=stage)
    assert values["val/rfd_tiny"] == pytest.approx(0, abs=1e-6)
    assert values["val/ssim"] == pytest.approx(1, abs=1e-5)


def test_psnr_is_the_mean_over_images_of_8_bit_pixels(tiny, tmp_path):
    stage = tiny.stage()
    offset = 0.1  # 25.5 of 255: rounds up to 26 or down to 25 with the pixel, so compare within a tenth of a dB
    stage.validation_step = lambda batch, batch_idx: {
        "latent": stage.tokenizer.encode(batch["image"]),
        "reconstruction": (batch["image"] * 0.5 + offset).clamp(0, 1),
    }
    images = torch.stack([torch.from_numpy(np.array(Shapes(37, 16, seed=1)[i][0])) for i in range(37)])
    pixels = images.double() / 255
    reconstruction = ((pixels * 0.5 + offset) * 255).round() / 255
    expected = (-10 * (pixels - reconstruction).square().mean((1, 2, 3)).log10()).mean()
    assert measure(tiny, tmp_path, stage=stage)["val/psnr"] == pytest.approx(float(expected), abs=0.05)


def test_reference_is_kept_and_used_again(tiny, tmp_path):
    first = measure(tiny, tmp_path)["val/rfd_tiny"]
    (path,) = (tmp_path / "reference").glob("tiny_*.safetensors")
    statistics = FeatureStatistics.load(path)
    assert statistics.count == 37
    assert statistics.source == path.stem.removeprefix("tiny_")
    written = path.stat().st_mtime_ns
    assert measure(tiny, tmp_path)["val/rfd_tiny"] == pytest.approx(first, rel=1e-6)
    assert path.stat().st_mtime_ns == written


def test_reference_of_other_images_is_refused(tiny, tmp_path):
    file = str(tmp_path / "reference.safetensors")
    measure(tiny, tmp_path, reference=file)
    other = LatentDataModule(Shapes(72, 16), 16, 8, val=Shapes(37, 16, seed=2), crop="center", flip=False)
    with pytest.raises(UserError, match="other files or crop"):
        measure(tiny, tmp_path, data=other, reference=file)


def test_a_part_of_the_images_leaves_no_reference(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 1, [ReconstructionFID(judge(tiny))], limit_val_batches=2)
    trainer.validate(tiny.stage(), measured_data(8), verbose=False)
    assert not (tmp_path / "reference").exists()


def test_probe_is_deterministic(tiny, tmp_path):
    assert measure(tiny, tmp_path)["val/probe"] == measure(tiny, tmp_path)["val/probe"]


def test_grid_draws_three_rows(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 2, [ReconstructionGrid(every_n_steps=1, num_images=5)])
    trainer.fit(tiny.stage(), measured_data(8))
    pictures = sorted((tmp_path / "images").glob("*.png"))
    assert [path.name for path in pictures] == ["step_0000001.png", "step_0000002.png"]
    assert Image.open(pictures[-1]).size == (5 * 66 + 2, 3 * 66 + 2)


def test_latent_colours_span_the_range_and_survive_two_channels():
    colours = latent_colours(torch.randn(4, 8, 6, 5))
    assert colours.shape == (4, 3, 6, 5)
    assert colours.min() == 0
    assert colours.max() == 1
    assert latent_colours(torch.randn(4, 2, 6, 5)).shape == (4, 3, 6, 5)
