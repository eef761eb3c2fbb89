"""Trains, validates and samples a generator on one process, or on each of two; test_diffusion.py compares."""

import torch
from lightning.pytorch.strategies import DDPStrategy

from aligntok.callbacks import EMA, GenerationQuality, SampleGrid
from aligntok.data import ClassLabels
from aligntok.flow import Euler, Guidance
from aligntok.metrics import GenerationMetrics
from aligntok.programs.fabric import make_fabric
from aligntok.programs.sample import sample
from aligntok.stages import EncoderPretraining
from tests.conftest import Tiny

COUNT = 43  # odd: the ranks have shares of different sizes


def stage(**options):
    return Tiny.generator(sampler=Euler(4), guidance=Guidance(2.0, start=0.3), label_dropout=0.5, **options)


def generate(folder, world):
    """Return what must be the same on any number of ranks, and what must be the same on all."""
    cache = str(folder.parent / "cache")
    metrics = GenerationMetrics(Tiny.Pixels(), precision_recall=True, kid=True)
    classifier = EncoderPretraining(Tiny.encoder(8), 12)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    quality = GenerationQuality(metrics, COUNT, 5, classifier=classifier, sweep=[2])

    def data():
        return Tiny.cached(cache, images=Tiny.data().train, val=0.2)

    def trainer(*callbacks, **options):
        parallel = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": world} if world > 1 else {}
        options = {"limit_val_batches": 1.0, "enable_checkpointing": False, **parallel, **options}
        return Tiny.trainer(folder, 4, callbacks, **options)

    validating = trainer(quality, SampleGrid(num_classes=5, per_class=3))  # 15, more than a batch of quality
    validated, decoded = stage(), []
    validated.tokenizer.decoder.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
    validating.validate(validated, datamodule=data(), verbose=False)
    fabric = make_fabric("cpu", world)
    sample(stage(), ClassLabels(COUNT, 12).labels, folder, fabric, block_size=10, batch_size=4)
    trained = stage()
    training = trainer(EMA(0.5), val_check_interval=2, log_every_n_steps=2)
    training.fit(trained, datamodule=data())
    weights = {name: value.detach().clone() for name, value in trained.named_parameters()}
    logs = {name: float(value) for name, value in training.callback_metrics.items()}
    values = {name: float(value) for name, value in validating.callback_metrics.items()}
    results = {"values": values, "weights": weights, "logs": logs, "global_step": training.global_step}
    return {**results, "decoded": max(decoded)}
