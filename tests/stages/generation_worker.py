"""Trains, validates and samples a generator in processes of its own; test_diffusion.py starts two and compares.

Usage: generation_worker.py FOLDER, with Lightning's LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from aligntok.callbacks import EMA, GenerationQuality, SampleGrid
from aligntok.data import ClassLabels
from aligntok.flow import Euler, Guidance
from aligntok.metrics import GenerationMetrics
from aligntok.programs.fabric import make_fabric
from aligntok.programs.sample import sample
from aligntok.stages import EncoderPretraining

COUNT = 43  # odd: the ranks have shares of different sizes


def load_tiny():
    spec = importlib.util.spec_from_file_location("tiny_conftest", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tiny


def stage(tiny, **options):
    return tiny.generator(sampler=Euler(4), guidance=Guidance(2.0, start=0.3), label_dropout=0.5, **options)


def run(tiny, folder, world):
    """Return what must be the same on any number of ranks, and what must be the same on all."""
    torch.set_num_threads(1)  # a number of threads of its own would round in a way of its own
    cache = str(folder.parent / "cache")
    metrics = GenerationMetrics(tiny.Pixels(), precision_recall=True, kid=True)
    classifier = EncoderPretraining(tiny.encoder(8), 12)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    quality = GenerationQuality(metrics, COUNT, 5, classifier=classifier, sweep=[2])

    def data():
        return tiny.cached(cache, images=tiny.data().train, val=0.2)

    def trainer(*callbacks, **options):
        parallel = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": world} if world > 1 else {}
        options = {"limit_val_batches": 1.0, "enable_checkpointing": False, **parallel, **options}
        return tiny.trainer(folder, 4, callbacks, **options)

    validating = trainer(quality, SampleGrid(num_classes=5, per_class=3))  # 15, more than a batch of quality
    validated, decoded = stage(tiny), []
    validated.tokenizer.decoder.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
    validating.validate(validated, datamodule=data(), verbose=False)
    fabric = make_fabric("cpu", world)
    sample(stage(tiny), ClassLabels(COUNT, 12).labels, folder, fabric, block_size=10, batch_size=4)
    trained = stage(tiny)
    training = trainer(EMA(0.5), val_check_interval=2, log_every_n_steps=2)
    training.fit(trained, datamodule=data())
    weights = {name: value.detach().clone() for name, value in trained.named_parameters()}
    logs = {name: float(value) for name, value in training.callback_metrics.items()}
    values = {name: float(value) for name, value in validating.callback_metrics.items()}
    results = {"values": values, "weights": weights, "logs": logs, "global_step": training.global_step}
    return {**results, "decoded": max(decoded)}


def main(folder):
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    torch.save(run(load_tiny(), folder, world), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
