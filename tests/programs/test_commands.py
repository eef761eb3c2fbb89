"""``aligntok predict`` with a cache, and ``aligntok repair``: from the command line to a decoder trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligntok.__main__ import main
from aligntok.data import LatentShards

DEBUG = ("--config", "run/debug.yaml")
LAYER = """
data: {predict: val}
trainer:
  callbacks+:
    - class_path: aligntok.callbacks.LatentWriter
      init_args: {shard_size: 100, min_psnr: 0.0}
"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Two steps of the quickstart's encoder, stage 1 and stage 3."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "quickstart/encoder.yaml", *DEBUG]) == 0
    previous = []
    for stage in ("stage1", "stage3"):
        assert main(["fit", "--config", f"quickstart/{stage}.yaml", *DEBUG, *previous]) == 0
        previous = ["--init_from", f"runs/quickstart/{stage}/checkpoints/last.ckpt"]
    return previous[1]


def line(capsys) -> str:
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("aligntok: error:")]
    assert len(errors) == 1
    return errors[0]


def test_cache_repair_and_training_on_it(checkpoint, capsys):
    Path("mine.yaml").write_text(LAYER)
    predict = ["predict", "--config", "quickstart/stage3.yaml", "--config", "mine.yaml", "--output", "latents"]
    assert main([*predict, "--ckpt_path", checkpoint]) == 0
    out = capsys.readouterr().out
    assert "latents: 360 latents in 4 shards" in out
    assert "images/s" in out
    source = LatentShards("latents")
    source.verify()
    assert len(source) == 360
    assert not source.has_mirrored  # the quickstart's digits are not to be mirrored

    broken = Path("latents/latents_rank00_shard001.safetensors")
    content = broken.read_bytes()
    broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    others = {path: path.stat().st_mtime_ns for path in Path("latents").glob("*.safetensors") if path != broken}
    assert main(["repair", "latents"]) == 0
    assert broken.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert f"{broken.name} is not what was written" in capsys.readouterr().out
    source.verify()

    cached = ["--data.train", "aligntok.data.LatentShards", "--data.train.folder", "latents"]
    refine = ["fit", "--config", "quickstart/stage3.yaml", *DEBUG, "--init_from", checkpoint, *cached]
    assert main([*refine, "--output", "a"]) == 2
    assert "data.train.init_args.images" in line(capsys)
    digits = ["--data.train.images", "aligntok.data.Digits", "--data.train.images.split"]
    assert main([*refine, *digits, "train", "--output", "b"]) == 2
    assert "name the same ones" in line(capsys)
    assert main([*refine, *digits, "val", "--output", "c"]) == 0

    stage1 = "runs/quickstart/stage1/checkpoints/last.ckpt"
    again = ["predict", "--config", "quickstart/stage1.yaml", "--config", "mine.yaml", "--ckpt_path", stage1]
    assert main([*again, "--output", "d"]) == 2
    assert "never measured" in line(capsys)


@pytest.mark.parametrize(
    ("args", "words"),
    [([], "one folder"), (["a", "b"], "one folder"), (["--help"], "one folder"), (["a"], "no a/predict")],
)
def test_repair_of_nothing_is_one_line(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["repair", *args]) == 2
    assert words in line(capsys)
