"""What CodebookHealth says of a codebook, in training windows and in validation."""

import math
import warnings

import pytest
import torch

from aligntok.callbacks import CodebookHealth
from aligntok.data import Augmentation, LatentDataModule, Shapes
from aligntok.errors import UserError
from aligntok.stages import CausalTokenization


def stage_of(tiny, learning_rate=1e-3, **quantizer):
    return tiny.stage(
        CausalTokenization, tokenizer=tiny.causal(**quantizer), auxiliary="mse", learning_rate=learning_rate
    )


def collapses(caught):
    return [str(w.message) for w in caught if "the codebook has collapsed" in str(w.message)]


def test_windows_of_training_are_what_the_tokens_of_their_batches_say(tiny, tmp_path):
    stage, tokens, logged = stage_of(tiny), [], []
    stage.tokenizer.quantizer.register_forward_hook(lambda _, inputs, output: tokens.append(output.tokens))

    class Watch(CodebookHealth):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/codebook_")})

    tiny.trainer(tmp_path, 5, [Watch(window=2, min_usage=0.0)], enable_checkpointing=False).fit(
        stage, datamodule=tiny.data()
    )
    assert logged[0] == {}
    for last in (2, 4):
        counts = torch.cat(tokens[last - 2 : last]).flatten().bincount(minlength=32)
        share = counts[counts > 0] / counts.sum()
        wanted = {
            "train/codebook_usage": int((counts > 0).sum()) / 32,
            "train/codebook_perplexity": math.exp(-float((share * share.log()).sum())),
            "train/codebook_dead": int((counts == 0).sum()),
        }
        for step in (last, last + 1):  # stays until the next window is full
            assert logged[step - 1] == pytest.approx(wanted, rel=1e-5)
    assert logged[1] != logged[3]


def test_validation_counts_each_image_once_at_any_batch_size(tiny, tmp_path):
    stage = stage_of(tiny)
    images = Shapes(37, 16, seed=1)
    found, tokens = [], []

    class Watch(CodebookHealth):
        def update(self, batch, outputs):
            super().update(batch, outputs)
            tokens.append(outputs["tokens"])

    for batch in (8, 5):
        data = LatentDataModule(Shapes(72, 16), batch, 16, val=images, augmentation=Augmentation("center", flip=False))
        trainer = tiny.trainer(tmp_path, 1, [Watch()], limit_val_batches=1.0, enable_checkpointing=False)
        found.append(trainer.validate(stage, data, verbose=False)[0])
    tokens = torch.cat(tokens[-8:])  # 37 images in batches of 5
    counts = tokens.flatten().bincount(minlength=32)
    share = counts[counts > 0].double() / counts.sum()
    entropy = -float((share * share.log2()).sum())
    assert tokens.shape == (37, 20)
    for values in found:
        assert values["val/codebook_usage"] == pytest.approx(int((counts > 0).sum()) / 32)
        assert values["val/codebook_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert values["val/codebook_perplexity"] == pytest.approx(2**entropy, rel=1e-5)


def test_a_collapse_is_told_once_with_the_switches_that_are_not_on(tiny, tmp_path):
    stage = stage_of(tiny, learning_rate=0.0, update="gradient", gradient="rotation")
    with torch.no_grad():
        stage.tokenizer.quantizer.codebook[1:] += 1e3  # out of reach of any vector
    trainer = tiny.trainer(tmp_path, 7, [CodebookHealth(window=2)], enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(stage, datamodule=tiny.data())
    (message,) = collapses(caught)  # three windows, one warning
    assert message.startswith("step 2: the codebook has collapsed, 3.1% of its 32 codes")
    assert "update clustering" in message
    assert "kmeans_start true" in message
    assert "lower learning_rate" in message
    assert "rotation" not in message


def test_a_codebook_in_use_is_no_collapse(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 4, [CodebookHealth(window=2, min_usage=0.03)], enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(stage_of(tiny, kmeans_start=True), datamodule=tiny.data())
    assert collapses(caught) == []


def test_without_a_quantizer_or_with_a_window_of_nothing_it_is_refused(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 1, [CodebookHealth()], enable_checkpointing=False)
    with pytest.raises(UserError, match="CodebookHealth needs a tokenizer with a quantizer: remove the callback"):
        trainer.fit(tiny.stage(), datamodule=tiny.data())
    with pytest.raises(UserError, match=r"window 0, min_usage 0\.1"):
        CodebookHealth(window=0)
