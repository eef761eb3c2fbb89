"""Reading, writing and rebuilding checkpoints."""

import os
import sys
import types

import pytest
import torch
import yaml

from aligntok.__main__ import main
from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.callbacks.checkpoint_io import AtomicCheckpointIO
from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, VisionEncoder
from aligntok.stages import (
    DecoderRefinement,
    EncoderPretraining,
    LatentAlignment,
    PerceptualAlignment,
    load_generator,
)
from aligntok.weights.checkpoint import (
    build,
    load_strictly,
    load_tokenizer,
    read_checkpoint,
    without_encoder_weights,
    write_exported,
)
from aligntok.weights.migration import without_switches


class Touch:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def stage1(tiny, tmp_path_factory):
    """A checkpoint of stage 1 with an EMA."""
    folder = tmp_path_factory.mktemp("stage1")
    stage = tiny.stage(LatentAlignment, learning_rate=1e-2, adversarial=tiny.gan())
    tiny.trainer(folder, 2, [EMA(0.5), SaveCheckpoint()]).fit(stage, datamodule=tiny.data())
    return folder / "checkpoints/last.ckpt"


def all_equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


# init_from


@pytest.mark.parametrize("cls", [LatentAlignment, PerceptualAlignment, DecoderRefinement])
def test_stage_k_loads_into_the_next(tiny, stage1, cls):
    stage = tiny.stage(cls, seed=3)
    stage.init_from(stage1)
    state = torch.load(stage1, weights_only=True)["state_dict"]
    ours = {key: value for key, value in stage.state_dict().items() if key.startswith("tokenizer")}
    assert all_equal(ours, {key: value for key, value in state.items() if key.startswith("tokenizer")})
    if cls is PerceptualAlignment:
        for part, anchor in zip(("encoder", "adapter"), stage.anchor.network, strict=True):
            assert all_equal(anchor.state_dict(), getattr(stage.tokenizer, part).state_dict())
            first, second = next(anchor.parameters()), next(getattr(stage.tokenizer, part).parameters())
            assert first.data_ptr() != second.data_ptr()


def test_wrong_stage(tiny, stage1, tmp_path):
    checkpoint = torch.load(stage1, weights_only=True)
    del checkpoint["tokenizer_chain"]  # as earlier versions wrote it
    torch.save({**checkpoint, "aligntok_stage": "DecoderRefinement"}, tmp_path / "three.ckpt")
    message = r"three\.ckpt is of stage DecoderRefinement, whose encoder has learned already, but PerceptualAlignment"
    with pytest.raises(UserError, match=message):
        tiny.stage(PerceptualAlignment).init_from(tmp_path / "three.ckpt")
    pretraining = EncoderPretraining(tiny.encoder(), 10)
    with pytest.raises(UserError, match="EncoderPretraining starts from no checkpoint"):
        pretraining.init_from(stage1)


def test_wrong_shapes_are_named_and_nothing_is_loaded(tiny, stage1):
    stage = tiny.stage(PerceptualAlignment, tokenizer=tiny.tokenizer(5, latent_dim=6))
    before = tiny.copies(stage)
    with pytest.raises(UserError, match=r"(?s)last\.ckpt.*\(4, .*there and \(6, .*here"):
        stage.init_from(stage1)
    assert all(torch.equal(value, before[name]) for name, value in tiny.copies(stage).items())


def test_load_strictly_names_missing_and_unknown_keys():
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"the file .*bias is missing there; other is unknown here"):
        load_strictly(layer, {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, "the file")


# read_checkpoint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, good: None, "there is no checkpoint"),
        (lambda path, good: path.mkdir(), "it is a folder"),
        (lambda path, good: path.write_bytes(b""), "no checkpoint, or only half"),
        (lambda path, good: path.write_bytes(os.urandom(5000)), "no checkpoint, or only half"),
        (lambda path, good: path.write_bytes(good[: len(good) // 2]), "no checkpoint, or only half"),
        (lambda path, good: torch.save({"weights": torch.zeros(1)}, path), "no state_dict"),
        (lambda path, good: torch.save(torch.zeros(1), path), "no state_dict"),
        (lambda path, good: torch.save({"state_dict": {"weight": 3}}, path), r"state_dict\.weight is 3"),
        (lambda path, good: torch.save({"state_dict": {}, "hyper_parameters": 3}, path), "hyper_parameters is 3"),
        (lambda path, good: torch.save({"state_dict": {}, "averages": {"0.9": 3}}, path), r"averages is"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, stage1, make, message):
    path = tmp_path / "x.ckpt"
    make(path, stage1.read_bytes())
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


def test_an_altered_byte_is_found_or_changes_nothing(tiny, tmp_path):
    """Wherever it is: in a weight, in what names it, in the file's directory."""
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.arange(100.0), "b": torch.ones(2)}, "global_step": 3}, path)
    good, whole, found = path.read_bytes(), read_checkpoint(path), 0
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            checkpoint = read_checkpoint(path)
        except UserError:
            found += 1
        else:
            tiny.assert_same(checkpoint, whole)
    assert found > len(good) // 21  # the rest is padding, dates


def test_a_damaged_weight_is_found_where_it_is_used(stage1, tmp_path, tiny):
    content, path = bytearray(stage1.read_bytes()), tmp_path / "x.ckpt"
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert read_checkpoint(path, weights=False)["global_step"] == 2  # what is not read is not compared
    for use in (read_checkpoint, AtomicCheckpointIO().load_checkpoint, tiny.stage(PerceptualAlignment).init_from):
        with pytest.raises(UserError, match=r"x\.ckpt is damaged.*copy it again"):
            use(path)


def test_a_damaged_export_is_found(stage1, tmp_path):
    path, state = tmp_path / "x.safetensors", {"a": torch.ones(100)}
    write_exported(path, state, "LatentAlignment", {})
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], state["a"])
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors is damaged"):
        read_checkpoint(path)


def test_a_zip_of_something_else(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as file:
        file.writestr("letter.txt", "dear reader")
    with pytest.raises(UserError, match="no checkpoint that torch can read"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_pickled_code_is_refused_and_does_not_run(tmp_path, tiny):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "ran"
    evil = {"state_dict": {}, "aligntok_stage": "LatentAlignment", "x": Touch(str(trace))}
    torch.save(evil, path)
    for read in (read_checkpoint, load_tokenizer, tiny.stage(PerceptualAlignment).init_from):
        with pytest.raises(UserError, match=r"evil\.ckpt is refused"):
            read(path)
    torch.save(evil, path, _use_new_zipfile_serialization=False)  # the format before zip
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file would have run


# load_tokenizer

SMALL = {"name": "vit_tiny_patch16_224", "model_args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}}
LITE0 = {"name": "tf_efficientnet_lite0", "weights": "offline", "model_args": {}}


def command_line(folder, stage, encoder, width, *more):
    """Run two steps of a stage's shipped layers at a small size."""
    values = {"weights": None, "image_size": 32, "downsampling": 8, **encoder}
    decoder = {"latent_dim": 4, "width": 8, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "num_groups": 4}
    parts = {"encoder": values, "adapter": {"width": width, "latent_dim": 4}, "decoder": decoder}
    trainer = {"max_steps": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    config = {
        "layers": ["base.yaml", f"stage/{stage}.yaml", "stage/tokenizer.yaml", "data/digits.yaml"],
        "model": {
            "init_args": {"tokenizer": {"init_args": {part: {"init_args": args} for part, args in parts.items()}}}
        },
        "data": {"global_batch_size": 4, "calibration_images": 8, "image_size": 32},
        "trainer": {**trainer, "enable_progress_bar": False},
    }
    folder.mkdir()
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "small.yaml"), "--output", str(folder), *more]) == 0
    return folder / "checkpoints/last.ckpt"


@pytest.mark.parametrize(("encoder", "width"), [(SMALL, 16), pytest.param(LITE0, 40, marks=pytest.mark.slow)])
def test_a_checkpoint_rebuilds_its_tokenizer(tiny, tmp_path, monkeypatch, capsys, encoder, width):
    monkeypatch.chdir(tmp_path)
    one = command_line(tmp_path / "one", "latent_alignment", encoder, width)
    two = command_line(tmp_path / "two", "perceptual_alignment", encoder, width, "--init_from", str(one))
    validate = ["validate", "--config", str(tmp_path / "two/small.yaml"), "--ckpt_path", str(two), "--output", "two"]
    capsys.readouterr()
    assert main([*validate, "--ema", "0.5"]) == 2
    assert "last.ckpt has no average of decay 0.5; it has 0.999; 0 means the raw weights" in capsys.readouterr().err
    assert main([*validate, "--ema", "0"]) == 0
    for folder in ("one", "two"):
        (tmp_path / folder / "small.yaml").unlink()
        (tmp_path / folder / "config.yaml").unlink()
    tokenizer = load_tokenizer(two)
    assert not tokenizer.training
    state = torch.load(two, weights_only=True)
    average = {key: value for key, value in state["state_dict"].items() if key.startswith("tokenizer.")}
    assert all_equal({f"tokenizer.{key}": value for key, value in tokenizer.state_dict().items()}, average)
    raw = state["state_dict"] | state["current_model_state"]
    assert not all_equal(average, {key: raw[key] for key in average})
    unaveraged = load_tokenizer(two, ema=0).state_dict()
    assert all_equal(
        {f"tokenizer.{key}": value for key, value in unaveraged.items()}, {key: raw[key] for key in average}
    )
    assert not torch.equal(tokenizer.latent_std, torch.ones(4, 1, 1))
    assert tokenizer.spec.latent_shape == (4, 4, 4)
    assert tokenizer.fingerprint() == load_tokenizer(two).fingerprint() != load_tokenizer(one).fingerprint()
    # what no state dict shows: pixel statistics and size of the encoder's input
    from aligntok.networks import VisionEncoder

    values = {"image_size": 32, "downsampling": 8, "weights": None, **encoder}
    original = VisionEncoder(**values).eval()
    original.backbone.load_state_dict(tokenizer.encoder.backbone.state_dict())
    image = tiny.images(2, size=32)
    assert torch.equal(original(image), tokenizer.encoder(image))


class OwnEncoder(VisionEncoder):
    pass


def test_an_encoder_of_ones_own_is_rebuilt_without_fetching_its_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_encoders", types.SimpleNamespace(OwnEncoder=OwnEncoder))
    arguments = {**SMALL, "image_size": 32, "downsampling": 8, "weights": "nowhere.pth"}
    recipe = {"class_path": "own_encoders.OwnEncoder", "init_args": arguments}
    with pytest.raises(UserError, match=r"there is no file nowhere\.pth"):
        build(recipe, torch.nn.Module)
    encoder = build(without_encoder_weights(recipe), torch.nn.Module)
    assert type(encoder) is OwnEncoder
    assert encoder(torch.rand(1, 3, 32, 32)).shape == (1, 16, 4, 4)


def test_a_checkpoint_without_a_recipe(stage1):
    with pytest.raises(UserError, match=r"no recipe of the tokenizer.*aligntok fit"):
        load_tokenizer(stage1)


def test_a_recipe_with_arguments_of_earlier_versions_is_built():
    sizes = {"latent_dim": 4, "width": 8, "multipliers": [1], "num_blocks": 1, "num_groups": 4}
    for name in ("checkpoint_activations", "gradient_checkpointing", "compile_blocks"):
        recipe = {"class_path": "aligntok.networks.ConvDecoder", "init_args": {**sizes, name: True}}
        theirs = {"class_path": "theirs.Decoder", "init_args": {name: True}}
        assert without_switches([recipe, theirs]) == [recipe | {"init_args": sizes}, theirs]
    build(without_switches(recipe), ConvDecoder)


def test_a_generator_of_an_earlier_version_is_built_from_its_recipe(tiny, tmp_path):
    """Its learning rate, times of training and guide were arguments of the stage itself."""
    sizes = {"latent_shape": [4, 4, 4], "num_classes": 12, "width": 16, "depth": 2, "num_heads": 2}
    recipe = {
        "_class_path": "aligntok.stages.LatentDiffusion",
        "network": {"class_path": "aligntok.networks.DiT", "init_args": sizes},
        "tokenizer": None,
        "learning_rate": {"0": 0.0, "100": 0.001},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.1}},
        "time_sampling": {"class_path": "aligntok.flow.TimeSampling", "init_args": {"shift": 0.5}},
        "cosine_weight": 0.25,
        "guidance": {"class_path": "aligntok.flow.Guidance", "init_args": {"scale": 2.0}},
        "guide": {"class_path": "aligntok.networks.DiT", "init_args": sizes | {"depth": 1}},
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    state = {f"network.{key}": value for key, value in tiny.dit().state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": recipe}, tmp_path / "old.ckpt")
    generator = load_generator(tmp_path / "old.ckpt")
    assert all_equal(generator.network.state_dict(), tiny.dit().state_dict())
    assert generator.optimization.learning_rate == {0: 0.0, 100: 0.001}
    assert (generator.objective.time_sampling.shift, generator.objective.cosine_weight) == (0.5, 0.25)
    assert (generator.guidance.scale, len(generator.guide.network.blocks)) == (2.0, 1)


def test_lora_updates_are_merged(tiny, tmp_path):
    stage = tiny.stage(PerceptualAlignment, lora_rank=2, learning_rate=1e-1)
    tiny.trainer(tmp_path, 3, [SaveCheckpoint()]).fit(stage, datamodule=tiny.data())
    path = tmp_path / "checkpoints/last.ckpt"
    assert any("lora" in key for key in read_checkpoint(path)["state_dict"])
    third = tiny.stage(DecoderRefinement, seed=4)
    third.init_from(path)
    assert not any("lora" in key for key in third.state_dict())
    image = tiny.images(3)
    ours, theirs = third.tokenizer.eval().encode(image), stage.tokenizer.eval().encode(image)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    stage.tokenizer.encoder.backbone.blocks[0].attn.qkv.lora_up.data.zero_()
    assert (ours - stage.tokenizer.encode(image)).abs().max() > 1e-3  # the update matters


# A chain that others can extend


class MyStage2(PerceptualAlignment):
    """Somebody else's stage, whose name nobody here knows."""


def test_a_stage_of_ones_own_is_followed_by_ours(tiny, stage1, tmp_path):
    """Its encoder has learned, so the latents are measured; after a decoder's stage of one's own they stay."""

    class MyStage3(DecoderRefinement):
        pass

    path = stage1
    for name, cls, learned, measured in (
        ("two", MyStage2, {"encoder", "adapter", "decoder"}, False),
        ("three", MyStage3, {"encoder", "adapter", "decoder"}, True),
        ("four", DecoderRefinement, {"encoder", "adapter", "decoder"}, True),
    ):
        stage = tiny.stage(cls, seed=3)
        stage.init_from(path)
        before = stage.tokenizer.fingerprint()
        tiny.trainer(tmp_path / name, 2, [SaveCheckpoint()]).fit(stage, datamodule=tiny.data())
        path = tmp_path / name / "checkpoints/last.ckpt"
        chain = torch.load(path, weights_only=True)["tokenizer_chain"]
        assert (set(chain["learned"]), chain["measured"], chain["causal"]) == (learned, measured, False)
        assert (stage.tokenizer.fingerprint() == before) == (name == "four")
    with pytest.raises(UserError, match=r"holds no weights network\.\*, which LatentDiffusion needs"):
        tiny.generator().init_from(path)
    with pytest.raises(UserError, match="whose encoder has learned already, but MyStage2"):
        tiny.stage(MyStage2).init_from(path)
    torch.save({"state_dict": {"network.x": torch.zeros(1)}, "aligntok_stage": "Theirs"}, tmp_path / "generator.ckpt")
    with pytest.raises(UserError, match=r"of stage Theirs and holds no weights tokenizer\.\*, which DecoderRefinement"):
        tiny.stage(DecoderRefinement).init_from(tmp_path / "generator.ckpt")
