"""Pictures of prompts: the same at any batch size and number of ranks, with the prompts beside them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from aligntok.data.prompts import Prompt, PromptSamples
from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.networks import StaticTextEncoder, TextDiT
from aligntok.programs.fabric import make_fabric
from aligntok.programs.sample import sample
from aligntok.stages import TextDiffusion
from tests.conftest import Tiny
from tests.ranks import run_ranks

PROMPTS = [Prompt("two foxes on a blue ground"), Prompt("a pizza"), Prompt("a pizza above a car, and a sheep")]


def generator(max_tokens=8):
    torch.manual_seed(0)
    network = TextDiT((4, 4, 4), 256, width=16, depth=2, num_heads=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    parts = {"sampler": Euler(3), "guidance": Guidance(2.0)}
    return TextDiffusion(network, StaticTextEncoder(max_tokens), Tiny.measured(), **parts)


def draw(folder, stage=None, samples=None, **options):
    samples = samples or PromptSamples(PROMPTS, samples_per_prompt=4)
    sample(
        stage or generator(), samples, folder, make_fabric("cpu", 1), **{"block_size": 8, "batch_size": 5, **options}
    )


def pixels(folder):
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in folder.rglob("*.png")}


def on_two_ranks(folder):
    sample(generator(), PromptSamples(PROMPTS, 4), folder, make_fabric("cpu", 2), block_size=8, batch_size=5)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    draw(folder, batch_size=64, block_size=64)
    return folder


def test_each_picture_has_its_prompt(drawn):
    lines = [json.loads(line) for line in (drawn / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt.text for prompt in PROMPTS for _ in range(4)]
    ours = pixels(drawn)
    assert sorted(ours) == [line["file"] for line in lines] == [f"png/{id:06d}.png" for id in range(12)]
    archive = np.load(drawn / "samples_12x16x16x3.npz")
    assert archive.files == ["arr_0"]
    assert np.array_equal(archive["arr_0"], np.stack([ours[name] for name in sorted(ours)]))
    stage = generator()
    image = stage.tokenizer.decode(stage.sample(torch.tensor([6]), stage.text(["a pizza"])))
    wanted = (image[0].permute(1, 2, 0) * 255).round().numpy()
    assert abs(ours["png/000006.png"] - wanted).max() <= 1
    record = json.loads((drawn / "samples.json").read_text())
    assert record["text_encoder"] == stage.text_encoder.fingerprint()


@pytest.mark.parametrize("size", [1, 7])
def test_any_batch_size_draws_the_same(drawn, tmp_path, size):
    draw(tmp_path, batch_size=size, npz=False)
    ours, theirs = pixels(drawn), pixels(tmp_path)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) <= 1


def test_two_ranks_write_the_bytes_of_one(tmp_path):
    draw(tmp_path / "one", npz=False)
    run_ranks(2, on_two_ranks, tmp_path / "two")
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one.keys() <= two.keys()
    assert all(np.array_equal(value, two[name]) for name, value in one.items())


def test_geneval_finds_its_folders(drawn, tmp_path):
    prompts = [Prompt(prompt.text, {"tag": "two_object"}) for prompt in PROMPTS]
    draw(tmp_path, samples=PromptSamples(prompts, 4, "geneval"), npz=False)
    theirs = pixels(tmp_path)
    assert sorted(theirs) == [f"{prompt:05d}/samples/{i:04d}.png" for prompt in range(3) for i in range(4)]
    assert abs(theirs["00001/samples/0002.png"] - pixels(drawn)["png/000006.png"]).max() <= 1
    assert json.loads((tmp_path / "00002/metadata.jsonl").read_text()) == {
        "tag": "two_object",
        "prompt": PROMPTS[2].text,
    }


def test_other_prompts_or_another_text_encoder_are_refused(drawn):
    before = pixels(drawn)
    with pytest.raises(UserError, match="holds samples of prompts"):
        draw(drawn, samples=PromptSamples([Prompt("a sheep")] * 3, 4))
    with pytest.raises(UserError, match="holds samples of text_encoder"):
        draw(drawn, stage=generator(max_tokens=9))
    assert all(np.array_equal(value, before[name]) for name, value in pixels(drawn).items())


def test_prompts_need_a_generator_that_reads_and_the_reverse(tmp_path, tiny):
    with pytest.raises(UserError, match="LatentDiffusion takes classes and reads no prompts"):
        draw(tmp_path, stage=tiny.generator())
    with pytest.raises(UserError, match="TextDiffusion reads prompts and takes no classes: give --prompts"):
        sample(generator(), [1, 2], tmp_path, make_fabric("cpu", 1))
