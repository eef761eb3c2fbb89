"""Measurements through a real Trainer: what they say, what they keep, and that batches and ranks change nothing."""

import os
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from aligntok.callbacks import (
    GenerationQuality,
    LinearProbe,
    ReconstructionFID,
    ReconstructionGrid,
    ReconstructionQuality,
    SampleGrid,
    SaveCheckpoint,
)
from aligntok.callbacks import measure as measure_module
from aligntok.callbacks.grids import latent_colours
from aligntok.callbacks.measurement import Measurement
from aligntok.callbacks.progress import MetricsCSV
from aligntok.data import Augmentation, LatentDataModule, Shapes
from aligntok.errors import UserError, check
from aligntok.flow import Euler
from aligntok.losses import LPIPS, AdversarialLoss, PerceptualTerm, ReconstructionLoss
from aligntok.metrics import EncoderFeatures, GenerationMetrics, InceptionFeatures, Reference
from aligntok.metrics.collected import Collected
from aligntok.networks import PatchDiscriminator
from aligntok.stages import EncoderPretraining
from tests.conftest import Tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")  # runs without validation


def measured_data(batch: int, **options) -> LatentDataModule:
    """37 images, so that neither batches nor ranks divide them."""
    options = {"augmentation": Augmentation("center", flip=False), **options}
    return LatentDataModule(Shapes(72, 16), batch, 16, val=Shapes(37, 16, seed=1), **options)


def judge(tiny):
    return EncoderFeatures(tiny.encoder(3), "tiny")


def measure(tiny, folder, batch=8, stage=None, data=None, **options):
    callbacks = [ReconstructionQuality(), LinearProbe(), ReconstructionFID(judge(tiny), **options)]
    trainer = tiny.trainer(folder, 1, callbacks, limit_val_batches=1.0)
    return trainer.validate(stage or tiny.stage(), data or measured_data(batch), verbose=False)[0]


def test_any_batch_size_gives_the_same_values(tiny, tmp_path):
    one, other = measure(tiny, tmp_path / "a", 8), measure(tiny, tmp_path / "b", 5)
    assert set(one) >= {"val/psnr", "val/ssim", "val/probe", "val/probe_pooled", "val/rfd_tiny", "val/l1"}
    assert 0 < one["val/knn"] < 1
    assert 1 < one["val/rankme"] < 4  # channels
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def measure_on_rank(folder):
    folder = f"{folder}{os.environ['LOCAL_RANK']}"  # as on nodes with disks of their own
    values = []
    for _ in range(2):  # the second finds the reference, but on the first rank alone
        callbacks = [ReconstructionQuality(), LinearProbe(), ReconstructionFID(judge(Tiny))]
        trainer = Tiny.trainer(folder, 1, callbacks, limit_val_batches=1.0, devices=2, strategy="ddp")
        values += trainer.validate(Tiny.stage(), measured_data(8), verbose=False)
    return values


def test_two_ranks_give_the_same_values(tiny, tmp_path, capsys):
    expected = measure(tiny, tmp_path / "one")
    for values in run_ranks(2, measure_on_rank, tmp_path / "run"):
        assert values == [pytest.approx(expected, rel=1e-4, abs=1e-6)] * 2
    assert [path.name for path in tmp_path.glob("run*/reference")] == ["reference"]
    assert "sync_dist" not in capsys.readouterr().out


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
    statistics = Reference.load(path)
    assert statistics.count == 37
    assert statistics.source == path.stem.removeprefix("tiny_")
    written = path.stat().st_mtime_ns
    assert measure(tiny, tmp_path)["val/rfd_tiny"] == pytest.approx(first, rel=1e-6)
    assert path.stat().st_mtime_ns == written


def test_reference_of_other_images_is_refused(tiny, tmp_path):
    file = str(tmp_path / "reference.safetensors")
    measure(tiny, tmp_path, reference=file)
    other = LatentDataModule(Shapes(72, 16), 8, 16, val=Shapes(37, 16, seed=2))
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
    with Image.open(pictures[-1]) as picture:
        assert picture.size == (5 * 66 + 2, 3 * 66 + 2)


def test_latent_colours_span_the_range_and_survive_two_channels():
    colours = latent_colours(torch.randn(4, 8, 6, 5))
    assert colours.shape == (4, 3, 6, 5)
    assert colours.min() == 0
    assert colours.max() == 1
    assert latent_colours(torch.randn(4, 2, 6, 5)).shape == (4, 3, 6, 5)


# Precision


@pytest.fixture
def dtypes(tiny):
    """A stage, and the dtypes that come out of its decoder."""
    stage, seen = tiny.stage(), set()
    stage.tokenizer.decoder.conv_out.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    return stage, seen


def test_grids_are_drawn_in_the_precision_of_the_run(tiny, tmp_path, dtypes):
    stage, seen = dtypes
    trainer = tiny.trainer(tmp_path, 1, [ReconstructionGrid(every_n_steps=1)], precision="bf16-mixed")
    trainer.fit(stage, measured_data(8))
    assert seen == {torch.bfloat16}
    generator = tiny.generator(sampler=Euler(1))
    generator.tokenizer.decoder.conv_out.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    seen.clear()
    generator.train()
    picture = SampleGrid(per_class=1).picture(trainer, generator)
    assert seen == {torch.bfloat16}
    assert picture.dtype == torch.float32
    assert not picture.requires_grad
    assert generator.training


def test_the_probe_sees_latents_of_training_and_validation_images_made_alike(tiny, tmp_path, monkeypatch):
    same = LatentDataModule(Shapes(24, 16), 8, 16, val=Shapes(24, 16), augmentation=Augmentation("center", flip=False))
    seen = []
    monkeypatch.setattr(
        measure_module, "linear_probe", lambda *args, **_: seen.append(args) or SimpleNamespace(accuracy=1.0)
    )
    callback = LinearProbe()
    trainer = tiny.trainer(tmp_path, 1, [callback], limit_val_batches=1.0, precision="bf16-mixed")
    trainer.validate(tiny.stage(), same, verbose=False)
    for latents, labels, test_latents, test_labels in seen:
        assert torch.equal(latents, test_latents)
        assert torch.equal(labels, test_labels)
    assert len(seen) == 2
    assert not any(isinstance(value, Collected) for value in vars(callback).values())  # nothing is kept


# What is missing is said before the first step


def refused(tiny, folder, callback, stage=None, data=None):
    trainer = tiny.trainer(folder, 1, [callback], limit_val_batches=1, enable_checkpointing=False)
    with pytest.raises(UserError) as caught:
        trainer.fit(stage or tiny.stage(), data or measured_data(8))
    assert trainer.global_step == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_inception_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert InceptionFeatures.FILE in refused(tiny, tmp_path, ReconstructionFID())
    quality = GenerationQuality(GenerationMetrics(sfid=True), 10, 10)
    assert InceptionFeatures.FILE in refused(tiny, tmp_path, quality, tiny.generator(sampler=Euler(1)))


class Broken(Measurement):
    """Fails on the first batch that it sees."""

    def update(self, batch, outputs):
        raise UserError("it cannot measure images of this size")


class OfLarge(torch.nn.Module):
    """A judge of images of 32 pixels."""

    def forward(self, image, reference):
        check(image.shape[-1] == 32, "too small for the judge")


class Steps(pl.Callback):
    """Counts the steps that a run takes."""

    count = 0

    def on_train_batch_end(self, *args):
        self.count += 1


def test_every_measure_is_tried_on_a_batch_before_the_first_step(tiny, tmp_path):
    steps = Steps()
    trainer = tiny.trainer(tmp_path, 2, [Broken(), steps], limit_val_batches=1.0, num_sanity_val_steps=1)
    with pytest.raises(UserError, match="cannot measure images of this size"):
        trainer.fit(tiny.stage(), measured_data(8))
    assert steps.count == 0


@pytest.mark.parametrize("part", ["perceptual", "discriminator"])
def test_what_counts_later_in_a_run_is_tried_before_the_first_step(tiny, tmp_path, part):
    """Judges whose weight is still 0, a discriminator that starts later: here too large for the images."""
    if part == "perceptual":
        loss = ReconstructionLoss("l1", {"late": PerceptualTerm(OfLarge(), {1000: 0.0, 2000: 1.0})})
    else:
        large = PatchDiscriminator(width=8, num_layers=3)
        loss = ReconstructionLoss("l1", {}, AdversarialLoss(large, discriminator_start=1000))
    steps = Steps()
    trainer = tiny.trainer(tmp_path, 2, [steps], limit_val_batches=1, num_sanity_val_steps=1)
    with pytest.raises(UserError, match=r"16x16 pixels, the discriminator needs|too small for the judge"):
        trainer.fit(tiny.stage(loss=loss), measured_data(8))
    assert steps.count == 0


def test_trying_the_measures_leaves_no_trace(tiny, tmp_path):
    """Neither in what is trained, nor in what is measured, logged, drawn or kept."""

    def fit(folder, sanity):
        callbacks = [
            ReconstructionQuality(),
            LinearProbe(),
            ReconstructionFID(judge(tiny)),
            ReconstructionGrid(None, 4),
        ]
        logger = MetricsCSV(folder)
        options = {"limit_val_batches": 1.0, "num_sanity_val_steps": sanity, "log_every_n_steps": 1}
        options |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "logger": logger}
        stage = tiny.stage(adversarial=tiny.gan(norm="batch"))
        trainer = tiny.trainer(folder, 2, [*callbacks, SaveCheckpoint()], **options)
        trainer.fit(stage, measured_data(8))
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        return files, logger.path.read_text(), {key: state[key] for key in ("state_dict", "optimizer_states", "loops")}

    tiny.assert_same(fit(tmp_path / "a", 1), fit(tmp_path / "b", 0))


def test_what_callbacks_ask_of_stage_and_data(tiny, tmp_path):
    rows = [{"image": torch.rand(3, 16, 16), "label": 1, "id": i} for i in range(4)]
    loader = DataLoader(rows, batch_size=2)
    for callback, method in ((LinearProbe(), "calibration_dataloader()"), (ReconstructionGrid(), "preview()")):
        text = refused(tiny, tmp_path, callback, data=loader)
        assert f"{type(callback).__name__} needs a data module with {method}; or remove the callback" in text
    file = ReconstructionFID(judge(tiny), reference="x.safetensors")
    assert "needs a data module with fingerprint()" in refused(tiny, tmp_path, file, data=loader)
    pretraining = EncoderPretraining(tiny.encoder(), 12)
    assert "needs a stage with a tokenizer" in refused(tiny, tmp_path, LinearProbe(), pretraining)
    assert "needs a generator" in refused(tiny, tmp_path, SampleGrid())


def test_a_stage_that_returns_no_reconstruction_is_named(tiny, tmp_path):
    stage = tiny.stage()
    stage.validation_step = lambda batch, batch_idx: None
    trainer = tiny.trainer(tmp_path, 1, [ReconstructionQuality()], limit_val_batches=1)
    with pytest.raises(UserError, match="validation_step of LatentAlignment returns no reconstruction"):
        trainer.validate(stage, measured_data(8), verbose=False)


def test_lpips_of_the_loss_is_measured_once_and_logged_once(tiny, tmp_path, judge_weights, monkeypatch):
    calls = []
    forward = LPIPS.forward
    monkeypatch.setattr(LPIPS, "forward", lambda self, *images: calls.append(self) or forward(self, *images))
    callback, distance = ReconstructionQuality(), LPIPS()
    stage = tiny.stage()
    stage.loss = ReconstructionLoss(perceptual={"lpips": PerceptualTerm(distance)})
    trainer = tiny.trainer(tmp_path, 1, [callback], limit_val_batches=2)
    trainer.validate(stage, measured_data(8), verbose=False)
    assert calls == [distance, distance]
    assert {"val/lpips", "val/l1"} <= trainer.callback_metrics.keys()
