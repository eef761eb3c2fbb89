"""Every stage and generator on a GPU: in bf16, compiled, with accumulation, resumed; and a step waits for nothing.

``make test-gpu`` runs what is marked. ``ALIGNTOK_TEST_DEVICE=cpu pytest -m gpu tests/test_gpu.py`` runs the same tests
on the CPU, where a GPU is not at hand.
"""

import os
import warnings
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from aligntok.callbacks import EMA, CodebookHealth, ProgressBar, SaveCheckpoint
from aligntok.data import LatentDataModule
from aligntok.data.shapes import Shapes
from aligntok.networks import AutoregressiveTransformer, TextDiT, codebook, compile_blocks, quantizers
from aligntok.networks.text import TextEncoder
from aligntok.stages import (
    CausalTokenization,
    DecoderRefinement,
    EncoderPretraining,
    LatentAlignment,
    Optimization,
    PerceptualAlignment,
    TextDiffusion,
)

pytestmark = pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")  # on purpose
DEVICE = os.environ.get("ALIGNTOK_TEST_DEVICE", "cuda")
BF16 = 4 * torch.finfo(torch.bfloat16).eps  # 3 %: eight roundings, each of at most half of eps
FUSED = partial(torch.optim.AdamW, fused=True)  # as in every shipped recipe
STAGES = ("encoder", "stage1", "stage2", "stage3", "alitok1", "alitok2", "dit", "ar", "text")


class Captioned(Shapes):
    """Shapes whose caption is the number of their class, in letters."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, "one" * (1 + label)


class Letters(TextEncoder):
    """Features of each letter, some way."""

    def token_ids(self, captions, cut):
        return [[*caption.encode()][: self.max_tokens] for caption in captions]

    def features(self, ids, mask):
        waves = torch.arange(1, 1 + self.width, device=ids.device)
        return (ids[..., None] * waves).sin() * mask[..., None]

    def fingerprint(self):
        return "letters"


def stage_of(tiny, name, perceptual=None):
    """Return a stage of about the parts of the recipe of that name, a function of the name."""
    judged = {"perceptual": perceptual or tiny.judge(), "adversarial": tiny.gan(weight=0.5), "optimizer": FUSED}
    causal, refined = tiny.causal(), tiny.causal(causal=False, prefix_head=False, num_buffer=3)
    make = {
        "encoder": lambda: EncoderPretraining(tiny.encoder(), 12, optimization=Optimization(1e-3, FUSED)),
        "stage1": lambda: tiny.stage(LatentAlignment, **judged),
        "stage2": lambda: tiny.stage(PerceptualAlignment, **judged),
        "stage3": lambda: tiny.stage(DecoderRefinement, **judged),
        "alitok1": lambda: tiny.stage(CausalTokenization, tokenizer=causal, auxiliary="perceptual", **judged),
        "alitok2": lambda: tiny.stage(DecoderRefinement, tokenizer=refined, **judged),
        "dit": lambda: tiny.generator(label_dropout=0.5, optimizer=FUSED),
        "text": lambda: text_stage(tiny),
        "ar": lambda: tiny.autoregressive(tiny.ar(dropout=0.0), label_dropout=0.5, optimizer=FUSED),
    }
    return make[name]()


def text_stage(tiny):
    torch.manual_seed(0)
    network = tiny.shaken(TextDiT((4, 4, 4), text_width=8, width=16, depth=2, num_heads=2))
    optimization = Optimization(1e-3, FUSED)
    return TextDiffusion(network, Letters(8, 48), tiny.measured(), text_dropout=0.5, optimization=optimization)


class Losses(pl.Callback):
    """Keeps the loss of each batch where it is."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].detach().clone())


def fit(tiny, folder, stage, steps=2, device=DEVICE, callbacks=(), ckpt_path=None, **options):
    """Train; return the losses of the batches."""
    losses, data = Losses(), tiny.data()
    if isinstance(stage, TextDiffusion):
        data = LatentDataModule(Captioned(64, 16), 8, 16, val=Captioned(8, 16, seed=1), augmentation=data.augmentation)
    trainer = tiny.trainer(
        folder, steps, [losses, *callbacks], accelerator="gpu" if device == "cuda" else device, **options
    )
    trainer.fit(stage, datamodule=data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return torch.stack(losses.values).float().cpu()


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory):
    """Return the losses on the CPU in float32, of a stage and so many accumulated batches."""
    kept = {}

    def of(name, accumulate=1):
        if (name, accumulate) not in kept:
            folder = tmp_path_factory.mktemp(name)
            stage, options = stage_of(tiny, name), {"accumulate_grad_batches": accumulate}
            kept[name, accumulate] = fit(tiny, folder, stage, device="cpu", enable_checkpointing=False, **options)
        return kept[name, accumulate]

    return of


@pytest.fixture
def float32():
    """Compute float32 in float32: convolutions are in TF32 by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is changing the name of this switch
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        yield
        torch.backends.cudnn.allow_tf32 = before


def on_gpu(function):
    """Mark a test."""
    missing = DEVICE == "cuda" and not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="no CUDA device")(function))


@on_gpu
@pytest.mark.parametrize("name", STAGES)
def test_float32_equals_the_cpu(tiny, tmp_path, expected, float32, name):
    torch.testing.assert_close(fit(tiny, tmp_path, stage_of(tiny, name)), expected(name), rtol=1e-3, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("name", STAGES)
def test_bf16_mixed(tiny, tmp_path, expected, name):
    losses = fit(tiny, tmp_path, stage_of(tiny, name), precision="bf16-mixed")
    torch.testing.assert_close(losses, expected(name), rtol=BF16, atol=BF16)


@on_gpu
@pytest.mark.parametrize("name", STAGES)
def test_compiled(tiny, tmp_path, expected, name):
    torch.compiler.reset()
    stage = stage_of(tiny, name)
    assert compile_blocks(stage)
    losses = fit(tiny, tmp_path, stage, precision="bf16-mixed")
    torch.testing.assert_close(losses, expected(name), rtol=BF16, atol=BF16)


@on_gpu
@pytest.mark.parametrize("name", STAGES)
def test_accumulated(tiny, tmp_path, expected, float32, name):
    losses = fit(tiny, tmp_path, stage_of(tiny, name), accumulate_grad_batches=2)
    assert len(losses) == 4
    torch.testing.assert_close(losses, expected(name, 2), rtol=1e-3, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("name", STAGES)
def test_resumed_equals_uninterrupted(tiny, tmp_path, float32, name):
    """Up to the order in which a GPU adds."""
    straight = fit(tiny, tmp_path / "straight", stage_of(tiny, name), 3, callbacks=[SaveCheckpoint(), EMA(0.5)])
    fit(tiny, tmp_path / "cut", stage_of(tiny, name), 2, callbacks=[SaveCheckpoint(), EMA(0.5)])
    last = str(tmp_path / "cut/checkpoints/last.ckpt")
    (again,) = fit(
        tiny, tmp_path / "cut", stage_of(tiny, name), 3, callbacks=[SaveCheckpoint(), EMA(0.5)], ckpt_path=last
    )
    torch.testing.assert_close(again, straight[2], rtol=1e-4, atol=1e-4)
    one, two = (
        torch.load(tmp_path / f"{run}/checkpoints/last.ckpt", map_location="cpu") for run in ("straight", "cut")
    )
    for key in ("state_dict", "current_model_state"):
        for weight, value in one[key].items():
            # a gradient that is zero but for rounding moves a weight by its sign: by the learning rate, one step
            torch.testing.assert_close(two[key][weight], value, rtol=1e-3, atol=3e-3, msg=f"{key} {weight}")


@on_gpu
def test_a_gradient_that_is_not_finite_is_skipped_on_the_device_and_reported_later(tiny, tmp_path):
    kept = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    stage = stage_of(tiny, "stage1", tiny.NaNAt(1, 4))
    fit(tiny, tmp_path, stage, 5, callbacks=[Weights()])
    same = [all(torch.equal(b[n], a[n]) for n in a) for a, b in pairwise(kept)]
    assert same == [True, False, False, True]
    assert all(bool(value.isfinite().all()) for value in kept[-1].values())
    lines = (tmp_path / "nonfinite_steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1", "4"]
    assert all(len(line.split(",")[2].split()) == 8 for line in lines)
    assert not stage.guard.pending


# The host waits for nothing


class Waits(TorchDispatchMode):
    """Counts calls that make the host of a GPU wait for it."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "bincount", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.NAMES:
            self.seen.append(str(func))
        indexed = func._schema.name.startswith("aten::index") and isinstance(args[1], (list, tuple))
        if indexed and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append(f"{func} by bool")
        return func(*args, **(kwargs or {}))


class Begin(pl.Callback):
    """From the third batch of five on, before all other callbacks, the host must wait for nothing."""

    def __init__(self, begin):
        self.begin = begin

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in (2, 3):
            self.begin()


class End(Checkpoint):
    """After all other callbacks, it may."""

    def __init__(self, end):
        self.end = end

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in (2, 3):
            self.end()


def watched(tiny, folder, name, begin, end, **options):
    """Train for five steps with the callbacks of the recipes; the last one is logged."""
    callbacks = [Begin(begin), EMA([0.9, 0.5]), ProgressBar(), SaveCheckpoint(), End(end)]
    callbacks += [CodebookHealth()] if name == "alitok1" else []
    options = {"log_every_n_steps": 5, "enable_progress_bar": True, "gradient_clip_val": 1.0, **options}
    fit(tiny, folder, stage_of(tiny, name), 5, callbacks=callbacks, **options)


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_logged_asks_for_no_value(tiny, tmp_path, name, monkeypatch):
    """On a CPU that goes the way of a GPU: no operation that would make a host wait."""
    for module in (codebook, quantizers):
        monkeypatch.setattr(module, "HOST_DEVICES", set())
    monkeypatch.setattr(AutoregressiveTransformer, "_check_tokens", lambda *_: None)  # looks at values on a CPU alone
    waits = Waits()
    watched(tiny, tmp_path, name, waits.__enter__, lambda: waits.__exit__(None, None, None), device="cpu")
    assert waits.seen == []


@on_gpu
@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_logged_waits_for_nothing(tiny, tmp_path, name):
    mode = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else lambda mode: None
    try:
        watched(tiny, tmp_path, name, lambda: mode("error"), lambda: mode("default"), precision="bf16-mixed")
    finally:
        mode("default")
