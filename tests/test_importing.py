"""``aligntok import``: a published file becomes a checkpoint and a config that run."""

import pytest
import torch

from aligntok.__main__ import main
from aligntok.networks import (
    AutoregressiveTransformer,
    LinearAdapter,
    QueryEncoder,
    TokenDecoder,
    Tokenizer,
    VectorQuantizer,
)
from aligntok.weights import alitok, load_tokenizer, read_checkpoint


@pytest.fixture
def published(tmp_path):
    """Write tiny files with the published names and return what they hold."""
    encoder, decoder = QueryEncoder(64, 4, 64, 1, 1, 17), TokenDecoder(8, 64, 4, 64, 1, 1, 17, num_buffer=2)
    tokenizer = Tokenizer(encoder, LinearAdapter(64, 8), decoder, VectorQuantizer(32, 8)).eval()
    state = alitok.to_alitok(tokenizer)
    del state[alitok.USAGE]
    torch.save(state, tmp_path / "AliTok.pth")
    network = AutoregressiveTransformer(32, (16, 16), 17, 12, width=64, depth=1, num_heads=16, hidden=192)
    torch.nn.init.normal_(network.head.weight)
    torch.save(alitok.to_alitok(network), tmp_path / "AliTok_B.bin")
    return tokenizer, network.eval()


def run(*words):
    return main([str(word) for word in words])


def test_the_tokenizer_is_that_of_the_file(published, tmp_path, capsys):
    tokenizer, _ = published
    assert run("import", "alitok", tmp_path / "AliTok.pth", "--output", tmp_path / "w") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "w" / "tokenizer.yaml")
    again = load_tokenizer(tmp_path / "w" / "tokenizer.safetensors")
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.encode(image), tokenizer.encode(image))
    assert torch.equal(again(image), tokenizer(image))
    assert again.spec == tokenizer.spec


def test_validate_takes_the_config(published, tmp_path):
    run("import", "alitok", tmp_path / "AliTok.pth", "--output", tmp_path / "w")
    config = tmp_path / "w" / "tokenizer.yaml"
    shapes = ["--data.train", "aligntok.data.Shapes", "--data.train.init_args.num_images", 64]
    shapes += ["--data.val", "aligntok.data.Shapes", "--data.val.init_args.num_images", 8]
    size = ["--data.image_size", 64, "--data.num_workers", 0, "--data.global_batch_size", 8]
    size += ["--callbacks.rfid", "null"]  # Inception's weights are elsewhere
    assert run("validate", "--config", config, "--output", tmp_path / "out", *shapes, *size) == 0
    assert "val/psnr" in (tmp_path / "out" / "validate.json").read_text()


def test_a_generator_draws_with_the_imported_tokenizer(published, tmp_path):
    for name in ("AliTok.pth", "AliTok_B.bin"):
        assert run("import", "alitok", tmp_path / name, "--output", tmp_path / "w") == 0
    words = ["--output", tmp_path / "out", "--num_samples", 4, "--accelerator", "cpu"]
    assert run("sample", "--config", tmp_path / "w" / "ar.yaml", "--config", "sample.yaml", *words) == 0
    assert len(list((tmp_path / "out" / "png").iterdir())) == 4
    state = read_checkpoint(tmp_path / "w" / "ar.safetensors")["state_dict"]
    for key, value in published[1].state_dict().items():
        assert torch.equal(state[f"network.{key}"], value), key


def test_other_files_are_refused(tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert run("import", "alitok", tmp_path / "other.pth", "--output", tmp_path / "w") == 2
    assert "neither the names of AliTok's tokenizer nor of its generators" in capsys.readouterr().err
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    assert run("import", "alitok", tmp_path / "code.pth") == 2
    assert "loading it would run code" in capsys.readouterr().err
    assert run("import", "alitok", tmp_path / "missing.pth") == 2
    assert not (tmp_path / "w").exists()


def test_weights_without_recipe_are_no_checkpoint(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert (
        run(
            "validate", "--config", "stage3.yaml", "--config", "run/cpu.yaml", "--ckpt_path", tmp_path / "a.safetensors"
        )
        == 2
    )
    assert "no recipe" in capsys.readouterr().err
