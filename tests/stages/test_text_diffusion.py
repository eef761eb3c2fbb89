"""A generator that reads: what it takes of a batch, what it can start from, what it refuses."""

import pytest
import torch
from PIL import Image

from aligntok.callbacks import EMA, PromptGrid, SaveCheckpoint
from aligntok.data import CaptionedFolder, LatentDataModule
from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.networks import DiT, StaticTextEncoder, Text, TextDiT
from aligntok.stages import LatentDiffusion, Optimization, TextDiffusion
from aligntok.weights.lightningdit import to_lightningdit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),  # steps are called without a trainer
    pytest.mark.filterwarnings("ignore:.*overridden `on_before_batch_transfer`"),  # stage and data both have a say
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),  # runs without validation
]
SIZES = {"latent_shape": (4, 4, 4), "width": 16, "depth": 2, "num_heads": 2}
PROMPTS = ["two foxes on a blue ground", "a pizza", ""]


def alive(network, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


@pytest.fixture(scope="module")
def encoder():
    return StaticTextEncoder(max_tokens=8)


@pytest.fixture
def make(tiny, encoder):
    def make(network=None, **options):
        network = network or alive(TextDiT(**SIZES, text_width=256))
        options = {"text_encoder": encoder, "tokenizer": tiny.measured(), "sampler": Euler(3), **options}
        return TextDiffusion(network, **options)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("captioned")
    for i in range(24):
        Image.new("RGB", (16, 16), (10 * i, 255 - 10 * i, 99)).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"a ground of green {i}" if i else "")
    return str(path)


def batch(**others):
    generator = torch.Generator().manual_seed(3)
    return {"latent": torch.randn(3, 4, 4, 4, generator=generator), "id": torch.arange(3), **others}


def test_captions_ids_and_features_are_the_same_condition(make, encoder):
    stage = make()
    ids = encoder.tokenize(PROMPTS)
    text = encoder(ids)
    batches = ({"caption": PROMPTS}, {"text_ids": ids}, {"text_ids": ids.int(), "text_features": text.features})
    losses = [stage.training_step(batch(**each), 0) for each in batches]
    assert losses[0] == losses[1] == losses[2]
    for each in batches:
        condition = stage.condition(each)
        assert torch.equal(condition.features, text.features)
        assert torch.equal(condition.mask, text.mask)
    assert torch.equal(stage.on_before_batch_transfer(batch(caption=PROMPTS), 0)["text_ids"], ids)


def test_dropped_captions_are_the_null_text_and_an_empty_one_is_too(make):
    stage = make(text_dropout=0.4)
    dropped = stage.drop({"caption": ["a pizza"] * 2000, "id": torch.arange(2000)})
    assert 0.36 < (~dropped.mask.any(1)).float().mean() < 0.44
    latent, t = batch()["latent"], torch.full((3,), 0.5)
    text = stage.text(PROMPTS)
    with torch.no_grad():
        velocity, null = stage.network(latent, t, text), stage.network(latent, t, stage.network.null(text))
    assert (velocity[:2] != null[:2]).flatten(1).any(1).all()
    assert torch.equal(velocity[2], null[2])


def test_it_learns_from_captioned_images_and_a_checkpoint_is_its_own(make, folder, tmp_path, tiny):
    data = LatentDataModule(CaptionedFolder(folder), 8, 16, val=0.25)
    stage = make(optimization=Optimization(1e-3), guidance=Guidance(2.0))
    callbacks = [SaveCheckpoint(), EMA(0.5), PromptGrid(PROMPTS[:2], per_prompt=2)]
    tiny.trainer(tmp_path, 3, callbacks, limit_val_batches=1, val_check_interval=3, check_val_every_n_epoch=None).fit(
        stage, datamodule=data
    )
    assert (tmp_path / "images/samples_0000003.png").is_file()
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"network"}
    assert checkpoint["text_encoder_fingerprint"] == stage.text_encoder.fingerprint()
    again = make()
    again.load(tmp_path / "checkpoints/last.ckpt", 0)
    raw = checkpoint["current_model_state"]
    assert all(torch.equal(value, raw[f"network.{key}"]) for key, value in again.network.state_dict().items())
    stage = make(TextDiT(**SIZES, text_width=256), text_encoder=StaticTextEncoder(max_tokens=9))
    with pytest.raises(UserError, match=r"learned to read with text encoder \w+, but text_encoder is \w+"):
        stage.load(tmp_path / "checkpoints/last.ckpt")


@pytest.mark.parametrize("size", [1, 7])
def test_a_sample_is_a_function_of_seed_id_and_prompt(make, size):
    stage = make(guidance=Guidance(3.0))
    ids = torch.arange(64)
    prompts = [PROMPTS[i % 3] for i in range(64)]
    whole = stage.sample(ids, stage.text(prompts))
    parts = [slice(i, i + size) for i in range(0, 14, size)]
    alone = torch.cat([stage.sample(ids[part], stage.text(prompts[part])) for part in parts])
    torch.testing.assert_close(alone, whole[:14], rtol=1e-4, atol=1e-4)
    other = stage.sample(ids[:2], stage.text([PROMPTS[1]] * 2))
    assert (other[0] - whole[0]).abs().max() > 0.01  # another prompt
    assert (stage.sample(ids[3:4], stage.text(PROMPTS[:1])) - whole[:1]).abs().max() > 0.1  # another id


# --- a class-conditional start


@pytest.mark.parametrize("theirs", [False, True])
def test_a_class_conditional_checkpoint_is_the_start(make, tiny, tmp_path, capsys, theirs):
    before = alive(DiT(**SIZES, num_classes=12, qk_norm=True), seed=4)
    path = tmp_path / "dit.ckpt"
    if theirs:
        torch.save({"ema": to_lightningdit(before)}, path)
    else:
        stage = LatentDiffusion(before, tiny.measured())
        torch.save({"state_dict": stage.state_dict(), "aligntok_stage": "LatentDiffusion"}, path)
    stage = make(TextDiT(**SIZES, text_width=256))
    stage.init_from(path)
    said = "is of 12 classes: their table is dropped, the null class is the start for all texts"
    assert said in capsys.readouterr().out
    latent, t = batch()["latent"], torch.rand(3)
    with torch.no_grad():
        expected = before(latent, t, torch.full((3,), 12))
        assert torch.equal(stage.network(latent, t, stage.text(PROMPTS)), expected)
    assert expected.any()
    stage = make(TextDiT(**{**SIZES, "width": 32}, text_width=256))
    with pytest.raises(UserError, match="does not fit this network"):
        stage.init_from(path)


def test_a_reading_checkpoint_goes_on(make, tmp_path):
    before, path = make(), tmp_path / "t2i.ckpt"
    torch.save({"state_dict": before.state_dict(), "aligntok_stage": "TextDiffusion"}, path)
    stage = make(TextDiT(**SIZES, text_width=256))
    stage.init_from(path)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in stage.state_dict().items())


# --- what does not fit


def test_parts_that_do_not_fit_are_named(make, tiny):
    for options, words in (
        (
            {"network": TextDiT(**SIZES, text_width=384)},
            "network.text_width 384 differs from the width of text_encoder 256",
        ),
        ({"text_dropout": 0.0, "guidance": Guidance(2.0)}, r"guidance.scale 2.0 needs the null text"),
        ({"text_dropout": 1.5}, r"text_dropout 1.5 is a share of the texts"),
        ({"guidance": Guidance(2.0, guide=TextDiT(**SIZES, text_width=12))}, "guide.text_width 12 differs"),
        ({"guidance": Guidance(2.0, guide=tiny.dit())}, "guide.num_classes 12 differs"),
    ):
        with pytest.raises(UserError, match=words):
            make(**options)


def test_data_that_do_not_fit_are_named(make, tiny):
    stage = make()
    with pytest.raises(UserError, match="TextDiffusion reads captions, and the data have none"):
        stage.on_before_batch_transfer(batch(label=torch.arange(3)), 0)
    with pytest.raises(UserError, match="LatentDiffusion needs classes, and the data have captions"):
        tiny.generator().on_before_batch_transfer(batch(caption=PROMPTS), 0)
    with pytest.raises(UserError, match="set text_encoder, or train on a cache"):
        make(text_encoder=None).with_ids(batch(caption=PROMPTS))
    with pytest.raises(UserError, match="set text_encoder, or cache features"):
        make(text_encoder=None).condition(batch(text_ids=torch.zeros(3, 8).long()))
    with pytest.raises(UserError, match="the network reads text and labels were given"):
        stage.sample(torch.arange(3), torch.arange(3))
    features = Text(torch.zeros(3, 8, 256), torch.ones(3, 8) > 0)
    assert make(text_encoder=None).sample(torch.arange(3), features).shape == (3, 4, 4, 4)
    with pytest.raises(UserError, match="PromptGrid: this LatentDiffusion has no text_encoder"):
        PromptGrid(["a fox"]).prepare(None, tiny.generator())
