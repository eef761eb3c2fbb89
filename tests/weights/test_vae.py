"""The VAEs of Stable Diffusion and FLUX.1 give what diffusers gives of the same files; every key is used."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from aligntok.errors import UserError
from aligntok.networks import ConvDecoder, ConvEncoder, GaussianAdapter, Tokenizer
from aligntok.weights import load_vae, vae

SIZES = {  # as the published ones, narrow
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}
WITHOUT_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def blocks(levels):
    return {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}


def theirs(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the many packages that diffusers looks for
        from diffusers import AutoencoderKL

        sizes = {"block_out_channels": (16, 32, 32), "norm_num_groups": 8, "layers_per_block": 1, **blocks(3)}
        return AutoencoderKL(**{**sizes, **options}).eval()


@torch.no_grad()
def compare(model, tokenizer):
    """Latents to 1e-5, images to 1e-4, of an image that is no square."""
    image = torch.rand(2, 3, 32, 48)
    shift = model.config.shift_factor or 0.0
    latent = (model.encode(2 * image - 1).latent_dist.mode() - shift) * model.config.scaling_factor
    ours = tokenizer.encode(image)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, latent, atol=1e-5, rtol=1e-5)
    picture = (model.decode(latent / model.config.scaling_factor + shift).sample + 1) / 2
    torch.testing.assert_close(tokenizer.decode(latent, clamp=False), picture, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
@pytest.mark.parametrize("quant", [True, False])
def test_a_folder_gives_what_diffusers_gives(kind, quant, tmp_path):
    model = theirs(**SIZES[kind], **({} if quant else WITHOUT_QUANT))
    model.save_pretrained(tmp_path)
    tokenizer = load_vae(tmp_path, image_size=32)
    assert tokenizer.spec.latent_shape == (SIZES[kind]["latent_channels"], 8, 8)
    compare(model, tokenizer)


@pytest.fixture
def narrow(monkeypatch):
    """The published kinds with an eighth of their width."""
    monkeypatch.setattr(vae, "WIDTH", 16)
    monkeypatch.setattr(vae, "NUM_GROUPS", 8)
    return {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8, **blocks(4)}


def ldm_state(latent_dim, quant):
    """Random weights under latent diffusion's names, which our networks have."""
    encoder = ConvEncoder(latent_dim, 16, (1, 2, 4, 4), 2, 32, (), 8)
    decoder = ConvDecoder(latent_dim, 16, (1, 2, 4, 4), 3, (), 8)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {
        key if key.startswith("post_quant_conv") else f"decoder.{key}": value
        for key, value in decoder.state_dict().items()
        if quant or not key.startswith("post_quant_conv")
    }
    both = torch.nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1).state_dict()
    state |= {f"quant_conv.{key}": value for key, value in both.items()} if quant else {}
    return {key: value.contiguous() for key, value in state.items()}  # ours are channels_last


@pytest.mark.parametrize(
    ("kind", "prefix", "suffix", "quant"),
    [
        ("sd", "first_stage_model.", ".ckpt", True),
        ("sdxl", "vae.", ".safetensors", True),
        ("sd3", "first_stage_model.", ".safetensors", False),
        ("flux", "", ".safetensors", False),
    ],
)
def test_a_single_file_gives_what_diffusers_gives(kind, prefix, suffix, quant, narrow, tmp_path):
    sizes = {**narrow, **SIZES[kind], **({} if quant else WITHOUT_QUANT)}
    theirs(**sizes).save_pretrained(tmp_path / "config")  # where diffusers finds the sizes
    state = ldm_state(SIZES[kind]["latent_channels"], quant)
    save_file(state, tmp_path / "alone.safetensors")
    named = {prefix + key: value for key, value in state.items()}
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4)} if prefix else {}
    path = tmp_path / f"file{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": named | others, "global_step": 3}, path)
    else:
        save_file(named | others, path)
    model = type(theirs(**sizes)).from_single_file(
        str(tmp_path / "alone.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    compare(model.eval(), load_vae(path, kind, image_size=32))


def test_names_of_older_folders(narrow, tmp_path):
    """Those of sd-vae-ft-mse: diffusers renames them as it reads."""
    model = theirs(**narrow, **SIZES["sd"])
    model.save_pretrained(tmp_path)
    state, old = load_file(tmp_path / vae.WEIGHTS), {"to_q": "query", "to_k": "key", "to_v": "value"}
    for new, name in {**old, "to_out.0": "proj_attn"}.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, tmp_path / vae.WEIGHTS, {"format": "pt"})
    compare(type(model).from_pretrained(tmp_path).eval(), load_vae(tmp_path, "sd", image_size=32))


@pytest.mark.parametrize("kind", SIZES)
def test_published_sizes(kind):
    quant = kind in ("sd", "sdxl")
    channels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32, **blocks(4)}
    with torch.device("meta"):
        tokenizer = load_vae("not there", kind)
        model = theirs(**channels, **SIZES[kind], **({} if quant else WITHOUT_QUANT))
    count = sum(p.numel() for p in model.parameters())
    assert count == {4: 83_653_863, 16: 83_819_683}[SIZES[kind]["latent_channels"]]
    identities = 0 if quant else (32 * 32 + 32) + (16 * 16 + 16)  # quant convolutions that do nothing
    assert sum(p.numel() for p in tokenizer.parameters()) == count + identities
    assert tokenizer.spec.latent_shape == (SIZES[kind]["latent_channels"], 32, 32)


def test_channel_statistics_of_a_config(tmp_path):
    """diffusers' pipelines take (latent - mean) * scaling / std."""
    model = theirs(
        latent_channels=4, scaling_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0]
    )
    model.save_pretrained(tmp_path)
    tokenizer = load_vae(tmp_path, image_size=32)
    assert tokenizer.latent_mean.flatten().tolist() == [0, 1, 2, 3]
    assert tokenizer.latent_std.flatten().tolist() == [2, 4, 8, 16]


@pytest.fixture
def folder(tmp_path):
    theirs(**SIZES["sd"]).save_pretrained(tmp_path)
    return tmp_path


def spoiled(folder, wrong):
    """Break a folder, and return what is given to ``load_vae`` then."""
    path, config = folder / vae.WEIGHTS, json.loads((folder / vae.CONFIG).read_text())
    state = load_file(path)
    if wrong == "class":
        config["_class_name"] = "AutoencoderDC"
    elif wrong == "factor":
        config["scaling_factor"] = "large"
    elif wrong == "channels":
        config |= {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}
    elif wrong == "missing":
        del state["decoder.mid_block.resnets.0.conv1.bias"]
    elif wrong == "empty":
        state = {"weight": torch.zeros(2)}
    elif wrong == "unknown":
        state["encoder.extra"] = torch.zeros(1)
    save_file(state, path)
    (folder / vae.CONFIG).write_text(json.dumps(config))
    if wrong == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    elif wrong in ("no config", "pipeline"):
        (folder / vae.CONFIG).unlink()
        if wrong == "pipeline":
            (folder / "vae").mkdir()
    elif wrong == "no weights":
        path.unlink()
    if wrong in ("single", "pickle"):
        torch.save({"model": torch.nn.Linear(1, 1) if wrong == "pickle" else {}}, folder / "vae.pt")
        return folder / "vae.pt" if wrong == "pickle" else path
    return folder / "nothing.safetensors" if wrong == "nowhere" else folder


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("class", "is of class AutoencoderDC, but load_vae takes an AutoencoderKL"),
        ("factor", "it.scaling_factor is 'large'"),
        ("channels", "of other than 4 channels"),
        ("missing", "decoder.mid.block_1.conv1.bias is missing there"),
        ("empty", "holds no VAE of an encoder and a decoder"),
        ("unknown", "encoder.extra is unknown here"),
        ("damaged", "is no safetensors file, or only a part of one"),
        ("no config", "has no config.json: give a folder of diffusers"),
        ("pipeline", "has no config.json: give the folder of the VAE alone"),
        ("no weights", "give a folder with config.json and diffusion_pytorch_model.safetensors"),
        ("single", "does not say its scale: give kind, one of sd, sdxl, sd3, flux"),
        ("pickle", "would run code"),
        ("nowhere", "there is no"),
    ],
)
def test_another_file_is_refused(wrong, words, folder):
    with pytest.raises(UserError) as error:
        load_vae(spoiled(folder, wrong))
    assert words in str(error.value)
    assert len(str(error.value)) < 400


def test_another_kind_is_refused(narrow, tmp_path):
    theirs(**narrow, **SIZES["sdxl"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"scaling_factor 0\.13025 .* but kind sd has \(0\.18215, 0\.0\)"):
        load_vae(tmp_path, "sd")
    with pytest.raises(UserError, match=r"is \(8, 64, 3, 3\) there and \(32, 64, 3, 3\) here"):
        load_vae(tmp_path, "flux")
    with pytest.raises(UserError, match="kind sd2: give one of sd"):
        load_vae(tmp_path, "sd2")


def test_the_tokenizer_is_any_other(narrow, tmp_path):
    """It has what generators look at, and its parts are ours."""
    theirs(**narrow, **SIZES["flux"], **WITHOUT_QUANT).save_pretrained(tmp_path)
    tokenizer = load_vae(tmp_path, "flux", image_size=(32, 64))
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(tokenizer.adapter, GaussianAdapter)
    assert tokenizer.is_measured
    assert not tokenizer.training
    assert tokenizer.spec.latent_shape == (16, 4, 8)
    assert tokenizer.spec.downsampling == 8
