"""What other libraries say of a user's mistake arrives as a line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from aligntok import cli
from aligntok.__main__ import main

ENCODER = ("fit", "--config", "quickstart/encoder.yaml", "--config", "run/debug.yaml")
COSINE = "{class_path: aligntok.schedule.CosineDecay, init_args: {peak: 1, end: 0, warmup_steps: 9, num_steps: 4}}"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)
    return tmp_path


def line_of(capsys, *args: str) -> str:
    assert main([*ENCODER, *args]) == 2
    text = capsys.readouterr().err.partition("aligntok: error: ")[2].strip()
    assert len(text) <= 400
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.devices=0", "trainer.devices=0"),
        ("trainer.strategy=foo", "trainer.strategy=foo"),
        ("trainer.max_time=abc", "trainer.max_time=abc"),
        ("trainer.val_check_interval=0.5", "trainer.val_check_interval=0.5"),
        ("trainer.val_check_interval=0", "val_check_interval=0: give"),
        ("trainer.limit_val_batches=2.5", "trainer.limit_val_batches=2.5"),
        ("trainer.profiler=abc", "trainer.profiler=abc"),
        ("trainer.max_steps=null", "trainer.max_steps is null: give int"),
        ("trainer.callbacks={a: 1}", "unknown key 'a' in trainer.callbacks"),
        ("trainer.gradient_clip_val=-1", "gradient_clip_val=-1: give"),
        ("trainer.accumulate_grad_batches=-2", "accumulate_grad_batches=-2: give"),
        ("seed_everything=-1", "seed_everything=-1: give"),
        ("ckpt_path=", "--ckpt_path is empty"),
        ("data.image_size=-1", "model.encoder: image_size=-1: give"),
        ("data.augmentation.crop_scale=[1.0,0.2]", "data.augmentation: crop_scale (1.0, 0.2): give"),
        ("data.augmentation.crop_scale=[0.0,3.0]", "data.augmentation: crop_scale (0.0, 3.0): give"),
        ("model.optimization.learning_rate=-0.1", "model.optimization: learning_rate=-0.1: give"),
        ("model.optimization.learning_rate=.nan", "model.optimization: learning_rate=nan: give"),
        ("model.optimization.learning_rate={0.5: 1.0}", "step 0.5, give a whole number"),
        ("model.optimization.learning_rate=abc", "model.optimization.learning_rate is abc: give float or dict"),
        ("model.optimization.optimizer.eps=-1", "eps=-1.0"),
        ("model.optimization.optimizer.weight_decay=.nan", "weight_decay=nan"),
        ("model.optimization.max_nonfinite_steps=null", "model.optimization.max_nonfinite_steps is null: give int"),
        ("callbacks.ema=aligntok.callbacks.EMA", None),
        ("model.encoder.model_args.num_heads=7", "num_heads"),
        ("model.encoder.image_size=[32,a]", "model.encoder.image_size"),
    ],
)
def test_the_key_is_named(argument, words, capsys):
    if words is None:
        assert main([*ENCODER, f"--{argument}"]) == 0
    else:
        assert words in line_of(capsys, f"--{argument}")


def test_a_message_is_short_and_says_where_however_long_the_config(capsys):
    """As in an edited ``config.yaml``: the Union's dump, with the whole config in it, is not shown."""
    built = cli.run([*ENCODER])
    saved = yaml.safe_load(built._parser("fit").dump(built.config.fit, skip_unset=False))
    saved["callbacks"]["ema"] = {"class_path": "aligntok.callbacks.EMA", "init_args": {"decay": None}}
    Path("saved.yaml").write_text(yaml.safe_dump(saved))
    assert "callbacks.ema.decay is null: give float or list" in line_of(capsys, "--config", "saved.yaml")
    saved["callbacks"]["ema"]["init_args"] = {"decay": -1.0}
    Path("saved.yaml").write_text(yaml.safe_dump(saved))
    assert line_of(capsys, "--config", "saved.yaml").startswith("callbacks.ema: EMA: decay -1.0, give")
    saved["callbacks"]["ema"] = None
    saved["model"]["init_args"]["optimization"]["learning_rate"] = yaml.safe_load(COSINE)
    Path("saved.yaml").write_text(yaml.safe_dump(saved))
    assert "warmup_steps 9, num_steps 4: give" in line_of(capsys, "--config", "saved.yaml")


OWN = """
from aligntok.networks import VisionEncoder
from aligntok.stages import EncoderPretraining

class Mine(EncoderPretraining):
    def __init__(self, encoder: VisionEncoder, num_classes: int, width: int, **kwargs):
        super().__init__(encoder, num_classes, **kwargs)
        if width > 9:
            raise ValueError("width must be below 10")
        self.nothing.here
"""


def test_a_bug_in_a_users_own_class_keeps_its_traceback(in_folder, monkeypatch, capsys):
    (in_folder / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(in_folder)
    Path("mine.yaml").write_text("model: {class_path: mine.Mine, init_args: {width: 3}}\n")
    with pytest.raises(AttributeError, match="nothing"):
        main([*ENCODER, "--config", "mine.yaml"])
    assert "width must be below 10" in line_of(capsys, "--config", "mine.yaml", "--model.width=10")
