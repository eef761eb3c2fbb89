"""Measures of samples: of the set that was promised, with the averaged weights, against the right reference."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from aligntok.callbacks import EMA, GenerationQuality, SaveCheckpoint
from aligntok.data import Shapes
from aligntok.errors import UserError
from aligntok.flow import Adaptive, Euler, Guidance
from aligntok.metrics import GenerationMetrics, Protocol, Reference

COUNT = 30
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*overridden `on_before_batch_transfer`"
)  # stage and data both have a say


class Parity(nn.Module):
    """A classifier: even classes where the image is bright, odd ones where it is not."""

    def forward(self, image):
        bright = image.mean((1, 2, 3)) > 0.5
        return torch.stack([bright.float(), 1 - bright.float()], 1)


def metrics(tiny, **options):
    return GenerationMetrics(tiny.Pixels(), **options)


def quality(tiny, **options):
    return GenerationQuality(options.pop("metrics", None) or metrics(tiny), **{"num_samples": COUNT, **options})


def generator(tiny, **options):
    return tiny.generator(**{"sampler": Euler(3), "guidance": Guidance(2.0), **options})


def validate(tiny, folder, callback, stage=None, data=None, **options):
    trainer = tiny.trainer(folder, 1, [callback], enable_checkpointing=False, **{"limit_val_batches": 1, **options})
    trainer.validate(stage or generator(tiny), datamodule=data or tiny.data(), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def images_of(source):
    return torch.stack([torch.from_numpy(np.array(source[i][0])) for i in range(len(source))]).permute(0, 3, 1, 2) / 255


@pytest.fixture
def samples(tiny):
    stage = generator(tiny)
    ids = torch.arange(COUNT)
    return ids % 12, stage.tokenizer.decode(stage.sample(ids, ids % 12))


def test_the_distance_is_that_of_the_promised_samples_and_the_training_images(tiny, tmp_path, samples):
    label, image = samples
    distance = metrics(tiny)
    distance.update(images_of(Shapes(64, 16)), real=True)
    distance.update(image, real=False)
    values = validate(tiny, tmp_path, quality(tiny, classifier=Parity(), batch_size=7))
    assert values["val/gfd_tiny"] == pytest.approx(distance.compute()["fd_tiny"], rel=1e-4)
    agreement = (Parity()(image).argmax(1) == label).float().mean()
    assert values["val/class_agreement"] == pytest.approx(float(agreement))


def test_no_measure_depends_on_the_batch_size(tiny, tmp_path):
    values = [
        validate(
            tiny, tmp_path / str(size), quality(tiny, metrics=metrics(tiny, precision_recall=True), batch_size=size)
        )
        for size in (7, 64)
    ]
    assert {"val/gfd_tiny", "val/precision_tiny", "val/recall_tiny"} <= values[0].keys()
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_the_training_images_are_measured_once(tiny, tmp_path):
    first = validate(tiny, tmp_path, quality(tiny))
    (path,) = (tmp_path / "reference").iterdir()
    reference = Reference.load(path)
    assert reference.count == 64
    assert path.name == f"tiny_{reference.source}.safetensors"
    Reference(reference.mean + 100, reference.cov, 64, reference.source, "tiny").save(path)
    second = validate(tiny, tmp_path, quality(tiny))
    assert second["val/gfd_tiny"] > first["val/gfd_tiny"] + 48 * 80**2  # the file was read
    other = validate(tiny, tmp_path, quality(tiny, reference=Shapes(20, 16, seed=3)))
    assert len(list((tmp_path / "reference").iterdir())) == 2
    named = validate(tiny, tmp_path / "x", quality(tiny, reference=str(path)))
    assert named["val/gfd_tiny"] == pytest.approx(second["val/gfd_tiny"])
    assert other["val/gfd_tiny"] != pytest.approx(first["val/gfd_tiny"], rel=1e-3)
    more = validate(tiny, tmp_path, quality(tiny, metrics=metrics(tiny, precision_recall=True)))  # wants features too
    assert more["val/gfd_tiny"] == pytest.approx(first["val/gfd_tiny"], rel=1e-5)
    assert len(list((tmp_path / "reference").iterdir())) == 3


def test_cached_latents_are_compared_with_their_images(tiny, tmp_path):
    cache = tiny.cache(tmp_path / "cache", tiny.measured())
    with pytest.raises(UserError, match="train gives latents alone: name the images"):
        validate(tiny, tmp_path / "a", quality(tiny), data=tiny.cached(cache))
    data = tiny.cached(cache, images=Shapes(64, 16))
    values = validate(tiny, tmp_path / "b", quality(tiny), data=data)
    assert values["val/gfd_tiny"] == pytest.approx(validate(tiny, tmp_path / "c", quality(tiny))["val/gfd_tiny"])
    assert "val/mse" in values


def test_the_average_is_measured_and_steps_are_swept_in_validation_alone(tiny, tmp_path):
    stage, callback = generator(tiny, learning_rate=0.05), quality(tiny, sweep=[1, 5])
    callbacks = [SaveCheckpoint(), EMA(0.9), callback]
    options = {"limit_val_batches": 1, "val_check_interval": 4}
    trainer = tiny.trainer(tmp_path, 4, callbacks, **options)
    trainer.fit(stage, datamodule=tiny.data())
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items() if "gfd" in name}
    assert list(fitted) == ["val/gfd_tiny"]
    trainer = tiny.trainer(tmp_path, 1, [quality(tiny, sweep=[1, 5])], enable_checkpointing=False, limit_val_batches=1)
    path = tmp_path / "checkpoints/last.ckpt"
    trainer.validate(generator(tiny), datamodule=tiny.data(), ckpt_path=path, verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if "gfd" in name}
    assert values["val/gfd_tiny"] == pytest.approx(fitted["val/gfd_tiny"], rel=1e-5)
    assert values.keys() == {"val/gfd_tiny", "val/gfd_tiny_steps1", "val/gfd_tiny_steps5"}
    few = generator(tiny, sampler=Euler(1))
    few.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    alone = validate(tiny, tmp_path, quality(tiny), few)
    assert values["val/gfd_tiny_steps1"] == pytest.approx(alone["val/gfd_tiny"], rel=1e-5)
    assert values["val/gfd_tiny_steps1"] != pytest.approx(values["val/gfd_tiny_steps5"], rel=1e-4)


def test_measuring_changes_nothing_in_training_and_the_sanity_check_tries_one_batch(tiny, tmp_path):
    def fit(*callbacks, **options):
        stage = generator(tiny)
        trainer = tiny.trainer(tmp_path, 4, callbacks, enable_checkpointing=False, val_check_interval=2, **options)
        trainer.fit(stage, datamodule=tiny.data())
        return stage.state_dict()

    callback, drawn = quality(tiny, batch_size=7), []
    samples = callback.samples

    def counted(trainer, module, sampler):
        for ids, label, image in samples(trainer, module, sampler):
            drawn.append((trainer.global_step, len(ids)))
            yield ids, label, image

    callback.samples = counted
    measured = fit(callback, limit_val_batches=1, num_sanity_val_steps=1)
    assert drawn == [(0, 7)] + [(step, count) for step in (2, 4) for count in (7, 7, 7, 7, 2)]
    torch.testing.assert_close(measured, fit(), rtol=0, atol=0)


def test_the_conditions_are_told(tiny, tmp_path, capsys):
    callback = quality(tiny, reference=Shapes(20, 16, seed=3))
    validate(tiny, tmp_path, callback)
    out = capsys.readouterr().out
    for words in ("30 images of 16x16 px", "(20 images", "num_steps=3", "scale=2.0", "features tiny"):
        assert words in callback.conditions
        assert words in out


def test_bf16(tiny, tmp_path):
    exact = validate(tiny, tmp_path / "a", quality(tiny))
    coarse = validate(tiny, tmp_path / "b", quality(tiny), precision="bf16-mixed")
    assert coarse["val/gfd_tiny"] != exact["val/gfd_tiny"]
    assert coarse["val/gfd_tiny"] == pytest.approx(exact["val/gfd_tiny"], rel=0.2)


# --- errors


def message(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def statistics(tmp_path, name="tiny", width=48, **options):
    path = tmp_path / "reference.safetensors"
    Reference(torch.zeros(width), torch.eye(width), 50, "theirs", name, **options).save(path)
    return str(path)


def test_what_cannot_be_measured_is_said_before_the_first_step(tiny, tmp_path):
    def fit(callback, stage=None):
        trainer = tiny.trainer(tmp_path, 1, [callback], enable_checkpointing=False, limit_val_batches=1)
        text = message(trainer.fit, stage or generator(tiny), datamodule=tiny.data())
        assert trainer.global_step == 0
        return text

    assert "with a tokenizer" in fit(quality(tiny), generator(tiny, tokenizer=None))
    assert "needs a generator" in fit(quality(tiny), tiny.stage())
    assert "num_steps" in fit(quality(tiny, sweep=[2]), generator(tiny, sampler=Adaptive()))
    assert "there is no reference nowhere.npz" in fit(quality(tiny, reference="nowhere.npz"))
    other = statistics(tmp_path, "others")
    text = fit(quality(tiny, reference=other))
    assert "'others'" in text
    assert "'tiny'" in text
    wide = statistics(tmp_path, width=8)
    assert "with 8 dimensions" in fit(quality(tiny, reference=wide))
    large = statistics(tmp_path, image_size=(32, 32))
    text = fit(quality(tiny, reference=large))
    assert "32x32" in text
    assert "16x16" in text
    plain = statistics(tmp_path)
    text = fit(quality(tiny, metrics=metrics(tiny, precision_recall=True), reference=plain))
    assert "no features for precision" in text
    protocol = Protocol("p", count=40)
    text = fit(quality(tiny, metrics=metrics(tiny, protocol=protocol), reference=plain))
    assert "wants 40 images, 30" in text
    protocol = Protocol("p", reference_count=60)
    text = fit(quality(tiny, metrics=metrics(tiny, protocol=protocol), reference=plain))
    assert "a reference of 60 images" in text
    assert "has 50" in text


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"batch_size": 0}])
def test_numbers_out_of_range(tiny, options):
    assert "give at least 2 and 1" in message(quality, tiny, **options)


def test_sweeps_of_no_steps_are_refused(tiny):
    assert "sweep=0: give at least 1" in message(quality, tiny, sweep=[0])


def test_somebody_elses_loader_needs_a_reference_file(tiny, tmp_path):
    rows = [{"latent": torch.randn(4, 4, 4), "label": 1, "id": i} for i in range(4)]
    loader = DataLoader(rows, batch_size=2)

    def run(callback):
        trainer = tiny.trainer(tmp_path, 1, [callback], enable_checkpointing=False, limit_val_batches=1.0)
        trainer.validate(generator(tiny), loader, verbose=False)
        return trainer.callback_metrics

    assert "reference_images(); or name a file as its `reference`" in message(run, quality(tiny))
    assert run(quality(tiny, reference=statistics(tmp_path)))["val/gfd_tiny"] > 0


def test_prediction_is_left_alone(tiny, tmp_path):
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    quality(tiny, reference="nowhere.npz").setup(trainer, tiny.stage(), "predict")
