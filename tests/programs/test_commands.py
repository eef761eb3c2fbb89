"""``aligntok encode``, and ``aligntok repair``: from the command line to a decoder trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligntok.__main__ import main
from aligntok.data import LatentShards
from aligntok.stages import load_generator

DEBUG = ("--config", "run/debug.yaml")


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
    val = ["--images.split", "val", "--accelerator", "cpu", "--min_psnr", "0", "--shard_size", "100"]
    encode = ["encode", "--config", "quickstart/cache.yaml", *val, "--tokenizer"]
    assert main([*encode, checkpoint, "--output", "latents"]) == 0
    out = capsys.readouterr().out
    assert "latents: 360 latents in 4 shards" in out
    assert "images/s" in out
    source = LatentShards("latents", verify=True)
    assert len(source) == 360
    assert len(source.opened.views) == 1  # the quickstart's digits are not to be mirrored

    broken = Path("latents/latents_rank00_shard001.safetensors")
    content = broken.read_bytes()
    broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    others = {path: path.stat().st_mtime_ns for path in Path("latents").glob("*.safetensors") if path != broken}
    assert main(["repair", "latents"]) == 0
    assert broken.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert f"{broken.name} is not what was written" in capsys.readouterr().out
    assert len(LatentShards("latents", verify=True)) == 360

    cached = ["--data.train", "aligntok.data.LatentShards", "--data.train.folder", "latents"]
    refine = ["fit", "--config", "quickstart/stage3.yaml", *DEBUG, "--init_from", checkpoint, *cached]
    assert main([*refine, "--output", "a"]) == 2
    assert "LatentShards(images=" in line(capsys)
    digits = ["--data.train.images", "aligntok.data.Digits", "--data.train.images.split"]
    assert main([*refine, *digits, "train", "--output", "b"]) == 2
    assert "name the same ones" in line(capsys)
    assert main([*refine, *digits, "val", "--output", "c"]) == 0

    stage1 = "runs/quickstart/stage1/checkpoints/last.ckpt"
    assert main([*encode, stage1, "--output", "d"]) == 2
    assert "never measured" in line(capsys)
    assert main([*encode, checkpoint, "--output", "e", "--ema", "0.5"]) == 2
    assert "no average of decay 0.5; it has 0.999; 0 means the raw weights" in line(capsys)
    for folder, *ema in (("f", "--ema", "0"), ("latents", "--ema=0.999")):  # the latter goes on with what is there
        assert main([*encode, checkpoint, "--output", folder, *ema]) == 0


def test_samples_of_a_checkpoint_alone_of_a_recipe_alone_and_of_numbers_said_by_reference(checkpoint):
    on_cpu = ["--accelerator", "cpu", "--num_samples", "4"]
    val = ["--images.split", "val", "--accelerator", "cpu", "--min_psnr", "0"]
    runs = "runs/quickstart"
    where = ["--config", "quickstart/cache.yaml", "--tokenizer", checkpoint, "--output", f"{runs}/latents"]
    assert main(["encode", *where, *val]) == 0
    Path("mine.yaml").write_text(
        "layers: [quickstart/dit.yaml, run/debug.yaml]\n"
        f"data: {{val: 0.1, train: {{init_args: {{folder: {runs}/latents}}}}}}\n"
        "model: {init_args: {seed: '${data.init_args.seed}'}}\n"
    )
    assert main(["fit", "--config", "mine.yaml", "--data.seed", "5", "--callbacks", "{}"]) == 0
    trained = ["--ckpt_path", f"{runs}/dit/checkpoints/last.ckpt"]
    assert main(["sample", *trained, *on_cpu, "--output", "alone"]) == 0
    saved = ["--config", f"{runs}/dit/config.yaml"]
    assert main(["sample", *saved, *trained, *on_cpu]) == 0
    ours, theirs = (sorted(Path(folder).iterdir()) for folder in ("alone/png", f"{runs}/dit/samples/png"))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert not Path(f"{runs}/dit/png").exists()
    Path("seed.yaml").write_text("layers: [mine.yaml]\ndata: {seed: 5}\n")
    assert main(["sample", "--config", "seed.yaml", f"--ckpt_path={trained[1]}", *on_cpu, "--output", "alone"]) == 0
    Path("seed.yaml").write_text("layers: [mine.yaml]\ndata: {seed: 6}\n")
    assert main(["sample", "--config", "seed.yaml", *trained, *on_cpu, "--output", "alone"]) == 2  # another seed
    generator = load_generator(trained[1])
    assert generator.seed == 5
    assert not generator.training


@pytest.mark.parametrize(
    ("args", "words"),
    [([], "FOLDER"), (["a", "b"], "unrecognized arguments: b"), (["a"], "no a/encode")],
)
def test_repair_of_nothing_is_one_line(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["repair", *args]) == 2
    assert words in line(capsys)


OLD = "trainer: {callbacks: [{class_path: aligntok.callbacks.LatentWriter}]}"


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["--config", "stage3.yaml", "--config", "cache.yaml"], "encode --config cache.yaml --tokenizer CHECKPOINT"),
        (
            ["--config", "alitok_stage2.yaml", "--config=token_cache.yaml", "--ckpt_path", "a.ckpt", "--output", "b"],
            "encode --config token_cache.yaml --tokenizer a.ckpt --output b",
        ),
        (["--config", "quickstart/cache.yaml"], "encode --config cache.yaml --tokenizer CHECKPOINT"),
        (["--config", "stage3.yaml", "--config", "mine.yaml"], "encode --config cache.yaml --tokenizer CHECKPOINT"),
        (
            ["--config", "dit.yaml", "--config", "sample.yaml", "--ckpt_path", "a.ckpt"],
            "sample --config dit.yaml --config sample.yaml --ckpt_path a.ckpt",
        ),
    ],
)
def test_the_old_commands_answer_with_the_new_one_in_a_line(args, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(OLD)
    assert main(["predict", *args]) == 2
    assert line(capsys).endswith(f"aligntok {command}")


def test_a_folder_of_earlier_versions_is_repaired_by_the_command_that_is_named(capsys, tmp_path):
    (tmp_path / "predict.yaml").write_text(f"ckpt_path: a.ckpt\n{OLD}")
    assert main(["repair", str(tmp_path)]) == 2
    assert line(capsys).endswith(f"aligntok encode --config cache.yaml --tokenizer a.ckpt --output {tmp_path}")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["encode"], "tokenizer, images is missing"),
        (["encode", "--tokenizer", "no.ckpt", "--images", "aligntok.data.Digits"], "no checkpoint no.ckpt"),
        (["encode", "--tokenizer", "no.ckpt", "--bogus", "1"], "'bogus'"),
        (["encode", "--config", "no.yaml"], "no shipped config"),
        (["sample", "--config", "lightningdit.yaml", "--config", "sample.yaml"], "needs the weights"),
        (
            ["sample", "--config", "lightningdit.yaml", "--config", "sample.yaml", "--init_from", "a.pt", "--ema", "0"],
            "leave it out",
        ),
        (["sample", "--num_samples", "2"], "model is missing"),
    ],
)
def test_what_is_mistyped_is_one_line(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--accelerator", "cpu"]) == 2
    assert words in line(capsys)
