"""The token cache on disk: whose codes are in it, and that no kill, rank or broken file changes it."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from aligntok.cache import TOKEN_LAYOUT, Manifest, shard_name
from aligntok.data import LatentShards, TokenShards
from aligntok.data.images import center_crop
from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.networks import Tokenizer
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.programs.encode import Views, as_stored, encode
from aligntok.programs.fabric import make_fabric
from tests.ranks import run_ranks

COUNT, SHARD, BATCH = 11, 4, 3  # shards of 4, 4, 3 images
SIDE, PATCH = 20, 4  # 22 px at 1.1 times the size: the five crops begin at 0, 1 and 2
PALETTE = torch.tensor([[r, g, b] for r in (0.0, 0.4, 0.8) for g in (0.1, 0.6, 1.0) for b in (0.2, 0.9)])


class Tiles(Dataset):
    """Pictures of coloured tiles: the tokens of the centre crop are their colours, exactly."""

    classes = ("a", "b")

    def __init__(self, count=COUNT, side=SIDE, bad=()):
        self.count, self.side, self.bad = count, side, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"picture {index} is broken")
        colours = np.random.default_rng(index).integers(0, len(PALETTE), (5, 5))
        tiles = (PALETTE.numpy()[colours] * 255).round().astype(np.uint8)
        image = Image.fromarray(tiles.repeat(PATCH, 0).repeat(PATCH, 1))
        return image.resize((self.side, self.side), Image.Resampling.BICUBIC), index % 2


class Colours(nn.Module):
    """The mean colour of the image, then of each patch."""

    width, image_size, downsampling, grid = 3, SIDE, PATCH, (1, 26)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image):
        patches = nn.functional.avg_pool2d(image, PATCH).flatten(2) * self.scale
        return torch.cat((image.mean((2, 3))[:, :, None], patches), 2)[:, :, None]


class Paint(nn.Module):
    latent_dim, downsampling = 3, PATCH

    def forward(self, latent):
        return nn.functional.interpolate(latent[:, :, 0, 1:].unflatten(2, (5, 5)), scale_factor=PATCH)


class Same(nn.Identity):
    width = latent_dim = 3


def painter(codebook_size=18):
    quantizer = VectorQuantizer(codebook_size, 3)
    quantizer.codebook.data[: len(PALETTE)] = PALETTE
    return Tokenizer(Colours(), Same(), Paint(), quantizer)


def write(folder, source=None, tokenizer=None, crops="center", flips=True, devices=1, **options):
    options = {"shard_size": SHARD, "batch_size": BATCH, **options}
    fabric = make_fabric("cpu", devices)
    encode(tokenizer or painter(), source or Tiles(), folder, Views(crops, flips), fabric, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(*args, **options):
    with pytest.raises(UserError) as caught:
        write(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    write(folder, crops="ten")
    return folder


# --- what is in it


def test_tokens_of_an_image_and_of_the_flipped_image_itself(plain):
    tokenizer = painter()
    for k, count in enumerate((4, 4, 3)):
        content = load_file(plain / shard_name(k, TOKEN_LAYOUT))
        assert {key: (tuple(v.shape), v.dtype) for key, v in content.items()} == {
            "tokens": ((count, 2, 26), torch.uint16),
            "labels": ((count,), torch.int64),
        }
        for row in range(count):
            image, label = Tiles()[k * SHARD + row]
            tokens = content["tokens"][row].long()
            assert torch.equal(tokens[0], tokenizer.encode(pixels(image))[0])
            assert torch.equal(tokens[1], tokenizer.encode(pixels(image).flip(-1))[0])
            assert torch.equal(tokens[1, 1:].view(5, 5), tokens[0, 1:].view(5, 5).flip(1))  # other codes, not the same
            assert not torch.equal(tokens[0], tokens[1])
            assert content["labels"][row] == label


def test_ten_crops_are_the_centre_and_corners_of_the_enlarged_image_then_mirrored(ten):
    tokenizer = painter()
    for row in range(SHARD):
        large = center_crop(Tiles()[row][0], (22, 22))
        tokens = load_file(ten / shard_name(0, TOKEN_LAYOUT))["tokens"][row].long()
        assert tokens.shape == (10, 26)
        for view, (top, left) in enumerate(((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))):
            crop = pixels(large.crop((left, top, left + SIDE, top + SIDE)))
            assert torch.equal(tokens[view], tokenizer.encode(crop)[0])
            assert torch.equal(tokens[view + 5], tokenizer.encode(crop.flip(-1))[0])


def test_manifest(plain, ten):
    manifest, tokenizer = Manifest.read(plain), painter()
    assert manifest.tokenizer == {
        "fingerprint": tokenizer.fingerprint(),
        "kind": "discrete",
        "latent_shape": [3, 1, 26],
        "image_size": [SIDE, SIDE],
        "downsampling": PATCH,
        "codebook_size": len(PALETTE),
    }
    assert (manifest.dtype, manifest.flips, manifest.shard_size) == ("uint16", True, SHARD)
    assert (manifest.images["crop"], manifest.images["count"], manifest.images["classes"]) == (
        "center",
        COUNT,
        ["a", "b"],
    )
    tokens = torch.cat([load_file(plain / shard_name(k, TOKEN_LAYOUT))["tokens"][:, 0].long() for k in range(3)])
    counts = torch.bincount(tokens.flatten(), minlength=len(PALETTE)) / tokens.numel()
    perplexity = torch.special.entr(counts.double()).sum().exp()
    assert manifest.statistics["usage"] == [round(float((counts > 0).sum()) / len(PALETTE), 6)]
    assert manifest.statistics["perplexity"] == [pytest.approx(float(perplexity), abs=1e-5)]
    for record in manifest.shards:
        assert record.sha256 == hash_file(plain / record.file)
    other = Manifest.read(ten)
    assert other.images["crop"] == "ten"
    assert other.images["source"] != manifest.images["source"]  # other pixels


def test_without_flips_there_are_half_as_many(tmp_path):
    write(tmp_path, crops="ten", flips=False)
    assert load_file(tmp_path / shard_name(0, TOKEN_LAYOUT))["tokens"].shape == (4, 5, 26)


def test_an_unreadable_image_has_no_row(tmp_path):
    write(tmp_path, Tiles(200, bad=(3,)), shard_size=100, crops="ten")
    assert Manifest.read(tmp_path).shards[0].missing == [3]
    source = TokenShards(str(tmp_path))
    assert len(source) == 199
    tokens = source.batch(np.array([3]), np.array([0]))["tokens"]
    expected = painter().encode(pixels(center_crop(Tiles(200)[4][0], (22, 22)).crop((1, 1, 21, 21))))
    assert torch.equal(tokens, expected)


# --- kill, ranks, repair


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(ten, tmp_path, batches):
    class Killed(Exception):
        pass

    tokenizer, calls = painter(), []
    encode_ = tokenizer.encode
    tokenizer.encode = lambda image: encode_(image) if calls.append(1) or len(calls) <= 10 * batches else kill()

    def kill():
        raise Killed

    with pytest.raises(Killed):
        write(tmp_path, crops="ten", tokenizer=tokenizer)
    assert not (tmp_path / "check.png").exists()
    write(tmp_path, crops="ten")
    assert contents(tmp_path) == contents(ten)


def test_two_ranks_write_the_bytes_of_one(ten, tmp_path):
    run_ranks(2, partial(write, crops="ten", devices=2), tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(ten)


def test_a_broken_shard_alone_is_encoded_again(plain, tmp_path):
    for name, content in contents(plain).items():
        (tmp_path / name).write_bytes(content)
    broken = tmp_path / shard_name(1, TOKEN_LAYOUT)
    content = bytearray(broken.read_bytes())
    content[-100] ^= 1  # a token
    broken.write_bytes(content)
    with pytest.raises(UserError, match=broken.name):
        len(TokenShards(str(tmp_path), verify=True))
    others = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if path != broken}
    write(tmp_path)
    assert contents(tmp_path) == contents(plain)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    len(TokenShards(str(tmp_path), verify=True))


# --- the self-check


def unflipped(codes, manifest):
    """Store the codes of the image as it is in place of those of the flipped one: the bug of the published script."""
    return as_stored([codes[0], codes[0]], manifest)


def shifted(codes, manifest):
    return as_stored([code.roll(1, 0) for code in codes], manifest)


@pytest.mark.parametrize(("wrong", "name"), [(unflipped, "tokens (centre, mirrored)"), (shifted, "tokens (centre)")])
def test_the_self_check_finds_tokens_that_are_not_those_of_their_images(tmp_path, monkeypatch, wrong, name):
    monkeypatch.setattr("aligntok.programs.encode.as_stored", wrong)
    message = refused(tmp_path, min_psnr=0.0)
    assert message.startswith(f"{name} in ")
    assert (tmp_path / "check.png").is_file()
    assert Manifest.read(tmp_path).statistics is None


def test_the_picture_and_the_line_at_the_end(ten, tmp_path, capsys):
    write(tmp_path, crops="ten")
    out = capsys.readouterr().out
    assert "tokens of 11 images in 3 shards, PSNR " in out
    assert " mirrored on 11 images (check.png)" in out
    assert f"of {len(PALETTE)} codes used, perplexity " in out
    with Image.open(ten / "check.png") as picture:  # 20 px are shown as 60, with 2 between: 11 columns, 4 rows
        assert picture.size == (2 + 11 * 62, 2 + 4 * 62)


def test_a_floor_that_is_not_reached(tmp_path):
    assert "less than min_psnr 101.0" in refused(tmp_path, min_psnr=101.0)


# --- what is refused


def test_a_codebook_beyond_16_bits_is_refused(tmp_path):
    message = refused(tmp_path, tokenizer=painter(65_537))
    assert "65537" in message
    assert "65,536" in message
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_greatest_code_of_16_bits_survives(tmp_path):
    tokenizer = painter(65_536)
    tokenizer.quantizer.codebook.data[:] = 100.0
    tokenizer.quantizer.codebook.data[-1] = 0.5
    write(tmp_path, tokenizer=tokenizer, min_psnr=0.0)
    batch = TokenShards(str(tmp_path)).batch(np.array([0]), np.array([1]))
    assert batch["tokens"].dtype == torch.int64
    assert batch["tokens"].unique().tolist() == [65_535]


def test_the_other_kind_of_folder_and_a_dtype_are_refused(plain, tmp_path):
    assert "dtype bfloat16 has no effect on tokens" in refused(tmp_path, dtype="bfloat16")
    with pytest.raises(UserError, match="holds tokens, not latents"):
        len(LatentShards(str(plain)))


def test_another_folder_is_refused_by_both_values(plain):
    before = contents(plain)
    other = painter()
    other.quantizer.codebook.data[0] += 0.01
    message = refused(plain, tokenizer=other)
    assert painter().fingerprint() in message
    assert other.fingerprint() in message
    assert "images crop center, but this run's images crop is ten" in refused(plain, crops="ten")
    assert contents(plain) == before


def test_the_manifest_of_latents_is_as_it_was(tmp_path, tiny):
    tiny.cache(tmp_path, tiny.measured(), num_images=16)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert set(content) == {
        "format", "tokenizer", "images", "dtype", "flips", "shard_size", "statistics", "shards"
    }  # fmt: skip
    assert set(content["tokenizer"]) == {"fingerprint", "kind", "latent_shape", "image_size", "downsampling"}
