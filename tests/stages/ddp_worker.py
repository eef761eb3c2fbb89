"""The real training on one of two ranks, or on a single one; test_distributed.py compares."""

import os
from contextlib import contextmanager
from unittest import mock

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import aligntok.data.dataset
import aligntok.networks.quantizers
import aligntok.stages.stage
from aligntok.callbacks import CodebookHealth, SaveCheckpoint
from aligntok.data import Augmentation, LatentDataModule, Shapes
from aligntok.networks import GaussianAdapter
from aligntok.stages import CausalTokenization, DecoderRefinement, LatentAlignment, PerceptualAlignment
from tests.conftest import Tiny

WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # of the rank that imports this; Lightning takes it away
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Recorder(SaveCheckpoint):
    """Keeps the loss terms of each batch, of this rank."""

    def __init__(self):
        super().__init__()
        self.scales = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        scale = trainer.callback_metrics.get("train/gan_adaptive_weight")
        self.scales.append(None if scale is None else float(scale))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def parallel():
    return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": WORLD} if WORLD > 1 else {}


def health(folder):
    """Return the use of the codes by 37 images: neither batches nor ranks divide them."""
    stage = Tiny.stage(CausalTokenization, tokenizer=Tiny.causal(), auxiliary="mse")
    images = {"val": Shapes(37, 16, seed=1), "augmentation": Augmentation("center", flip=False)}
    data = LatentDataModule(Shapes(72, 16), 8, 16, **images)
    options = {"limit_val_batches": 1.0, "enable_checkpointing": False, **parallel()}
    return Tiny.trainer(folder, 1, [CodebookHealth()], **options).validate(stage, data, verbose=False)[0]


def train(folder, cls, steps=5, **options):
    return fitted(folder, Tiny.stage(cls, **{"learning_rate": 0.1, "optimizer": Tiny.sgd, **options}), steps)


def fitted(folder, stage, steps=5):
    recorder = Recorder()
    trainer = Tiny.trainer(folder, steps, [recorder], log_every_n_steps=1, **parallel())
    start = Tiny.copies(stage)
    data = Tiny.data(
        augmentation=Augmentation("random_resized"), calibration_images=37
    )  # odd: shares of different sizes
    trainer.fit(stage, datamodule=data)
    weights = {name: value.detach().clone() for name, value in [*stage.named_parameters(), *stage.named_buffers()]}
    change = {name: float((weights[name] - start[name]).abs().max()) for name in weights}
    loss = float(trainer.callback_metrics["train/loss"])
    steps = {"global_step": trainer.global_step, "scales": recorder.scales, "loss": loss}
    return {"weights": weights, "change": change, **steps}


def stages():
    """Return stages by name; each draws numbers of its own, or none."""
    refined = Tiny.causal(causal=False, prefix_head=False, num_buffer=3)
    gaussian = Tiny.tokenizer(adapter=GaussianAdapter)
    sgd = {"learning_rate": 0.1, "optimizer": Tiny.sgd}
    started = {"tokenizer": Tiny.causal(decay=0.5, kmeans_start=True), "auxiliary": "mse", "pixel_loss": "mse"}
    return {
        "stage3": Tiny.stage(DecoderRefinement, **sgd),
        "kl": Tiny.stage(LatentAlignment, tokenizer=gaussian, kl_weight=1e-3, **sgd),
        "alitok2": Tiny.stage(DecoderRefinement, tokenizer=refined, pixel_loss="mse", **sgd),
        "kmeans": Tiny.stage(CausalTokenization, **started, **{**sgd, "learning_rate": 0.02}),
        "dit": Tiny.generator(label_dropout=0.5, **{**sgd, "learning_rate": 0.01}),
        "ar": Tiny.autoregressive(Tiny.ar(dropout=0.0), label_dropout=0.5, **sgd),  # dropout is drawn by rank
    }


WRONG = {  # a draw, and the run of `stages` that makes it
    "augmentation": "stage3",
    "latent": "kl",
    "kmeans": "kmeans",
    "noise": "dit",
    "time": "dit",
    "label": "dit",
    "label of ar": "ar",
}


@contextmanager
def drawn_by_place(draw):
    """Key a draw by the place in the batch of a rank, of two, instead of by the image's id."""

    def keyed_by_place(function, streams):
        def wrong(ids, seed, step, stream, *shape):
            return function(places(ids) if stream in streams else ids, seed, step, stream, *shape)

        return wrong

    def places(ids):
        return torch.arange(len(ids)) % (len(ids) // 2)

    stage, quantizers, dataset = aligntok.stages.stage, aligntok.networks.quantizers, aligntok.data.dataset
    numbers_of, image_generator = quantizers.numbers_of, dataset.image_generator
    streams = draw.split()[:1]
    with mock.patch.multiple(
        stage, normal=keyed_by_place(stage.normal, streams), uniform=keyed_by_place(stage.uniform, streams)
    ):
        if draw == "kmeans":
            with mock.patch.object(quantizers, "numbers_of", lambda ids, *sizes: numbers_of(places(ids), *sizes)):
                yield
        elif draw == "augmentation":
            with mock.patch.object(dataset, "image_generator", lambda *key: image_generator(*key[:2], key[2] % 4)):
                yield
        else:
            yield


def smooth(adversarial):
    """Return the loss without its discriminator's kinks, at which rounding decides on a whole gradient."""
    layers = adversarial.discriminator.main
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.LeakyReLU):
            layers[index] = nn.GELU()
    return adversarial


def train_all(output):
    """Return what each training learned, by its name."""
    results = {name: fitted(output / name, stage) for name, stage in stages().items()}
    for draw, name in WRONG.items() if WORLD == 1 else ():
        with drawn_by_place(draw):
            results[f"wrong {draw}"] = fitted(output / f"wrong {draw}", stages()[name])
    gan = {"perceptual": Tiny.judge(), "adversarial": smooth(Tiny.gan(weight=0.5, adaptive=False))}
    results["stage1"] = train(output / "stage1", LatentAlignment, **gan)
    late = Tiny.gan(weight={2: 0.0, 3: 0.5}, adaptive=True, discriminator_start=2)  # idle, then alone, then both
    results["stage2"] = train(output / "stage2", PerceptualAlignment, adversarial=smooth(late))

    causal = {"tokenizer": Tiny.causal(decay=0.5), "auxiliary": "mse", "pixel_loss": "mse"}
    # a higher rate turns differences of rounding into another code for a vector
    results["causal"] = train(output / "causal", CausalTokenization, learning_rate=0.02, **causal)
    results["health"] = health(output / "health")

    bad = Tiny.NaNAt(1) if RANK == WORLD - 1 else Tiny.NaNAt()  # not finite on one rank only
    results["nonfinite"] = train(output / "nonfinite", LatentAlignment, steps=2, perceptual=bad)
    return results
