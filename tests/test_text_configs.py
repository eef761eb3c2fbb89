"""The recipes of text to image: their sizes, that they differ in the tokenizer alone, and two steps of each."""

import pytest
import torch
import yaml
from PIL import Image

from aligntok.__main__ import main
from aligntok.layers import find_config, read_configs
from aligntok.networks import TextDiT
from aligntok.stages import TextDiffusion, load_generator

SMALL = [
    "--config",
    "size/dit_debug.yaml",
    "--config",
    "stage/wordllama.yaml",
    "--model.tokenizer",
    "tests.text_parts.tokenizer",
]
SMALL += [
    "--data.image_size",
    "16",
    "--data.global_batch_size",
    "4",
    "--data.val",
    "0.25",
    "--data.train",
    "aligntok.data.CaptionedFolder",
    "--data.train.root",
    "images",
]
RECIPES = ["t2i", "t2i_vavae", "t2i_flux_vae", "t2i_b", "t2i_from_lightningdit"]


@pytest.mark.parametrize(
    ("size", "text_width", "parameters"),
    [("tiny", 256, None), ("b", 2304, 174_095_648), ("xl", 2304, 857_446_592), ("2b", 2304, 2_071_136_504)],
)
def test_sizes(size, text_width, parameters):
    """2B is AlignTok's, counted as LightningDiT counts, with the fixed positions."""
    path = find_config(f"size/text_dit_{size}.yaml")
    sizes = yaml.safe_load(path.read_text())["model"]["init_args"]["network"]["init_args"]
    with torch.device("meta"):
        network = TextDiT((32, 16, 16), text_width, **sizes)
    count = sum(parameter.numel() for parameter in network.parameters())
    count, expected = (count, 1_974_172) if parameters is None else (count + network.positions.numel(), parameters)
    assert count == expected
    assert f" {expected:,} parameters" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("name", ["t2i_vavae", "t2i_flux_vae"])
def test_the_recipes_of_the_paper_differ_in_the_tokenizer_alone(name):
    ours, theirs = read_configs("t2i.yaml"), read_configs(f"{name}.yaml")
    assert ours["trainer"]["max_steps"] == 100_000
    assert theirs["model"]["init_args"]["network"]["init_args"].pop("patch_size", 1) == 1 + ("flux" in name)
    for recipe in (ours, theirs):
        del recipe["output"], recipe["model"]["init_args"]["tokenizer"]
    assert ours == theirs


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name, in_folder, capsys):
    (in_folder / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (20, 16), (10 * i, 99, 0)).save(in_folder / f"images/{i}.png")
        (in_folder / f"images/{i}.txt").write_text(f"a ground of red {i}")
    shape = ["--model.network.latent_shape", "[4,4,4]"]
    assert main(["fit", "--config", f"{name}.yaml", *SMALL, *shape, "--config", "run/debug.yaml"]) == 0
    checkpoint = in_folder / f"runs/{name}/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert (in_folder / f"runs/{name}/images/samples_0000002.png").is_file()
    if name != RECIPES[0]:
        return
    generator = load_generator(checkpoint)  # the checkpoint alone
    assert isinstance(generator, TextDiffusion)
    words = ["sample", "--ckpt_path", str(checkpoint), "--accelerator", "cpu", "--devices", "1", "--output", "drawn"]
    assert main([*words, "--prompts", "two foxes", "--samples_per_prompt", "2"]) == 0
    assert len(list((in_folder / "drawn/png").iterdir())) == 2
    for wrong, message in (
        ([], "--num_samples of a generator of classes, or --prompts FILE or a text"),
        (["--num_samples", "4", "--prompts", "two foxes"], "one of the two"),
        (["--num_samples", "4"], "TextDiffusion reads prompts and takes no classes: give --prompts"),
        (["--prompts", "nowhere.txt"], "there is no file of prompts nowhere.txt"),
    ):
        capsys.readouterr()
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
