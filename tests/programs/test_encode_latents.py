"""The cache on disk: what is in it, and that no kill, rank or broken file changes it."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from aligntok import preemption
from aligntok.cache import Manifest, shard_name
from aligntok.data import LatentDataModule, LatentShards
from aligntok.data.sources import crop_id
from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.networks import Tokenizer
from aligntok.preemption import Preempted
from aligntok.programs.encode import Views, as_stored, encode
from aligntok.programs.fabric import make_fabric
from tests.programs.encode_worker import write_alone, write_as_rank
from tests.ranks import run_ranks

COUNT, SHARD, BATCH = 26, 8, 3  # shards of 8, 8, 8, 2 images, batches of 3, 3, 2


class Pictures(Dataset):
    """Noise that tells its index; ``bad`` ones cannot be read."""

    classes = ("a", "b")

    def __init__(self, count=COUNT, bad=(), seed=0):
        self.count, self.bad, self.seed = count, bad, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"picture {index} is broken")
        pixels = np.random.default_rng((self.seed, index)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 2


class Unshuffle(nn.Module):
    """A lossless encoder, so that every pixel is in the latent."""

    width, image_size, downsampling = 48, 8, 4

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, image):
        self.seen.append(image)
        return nn.functional.pixel_unshuffle(image, 4) * self.scale


class Shuffle(nn.Module):
    latent_dim, downsampling = 48, 4

    def forward(self, latent):
        return nn.functional.pixel_shuffle(latent, 4)


class Same(nn.Identity):
    width = latent_dim = 48


def lossless(mean=0.5):
    """A tokenizer; its encoder keeps what it saw."""
    tokenizer = Tokenizer(Unshuffle(), Same(), Shuffle())
    tokenizer.set_latent_statistics(torch.full((48,), mean), torch.full((48,), 0.25))
    return tokenizer


def write(folder, source=None, tokenizer=None, flips=True, **options):
    """Encode, and return the tokenizer."""
    tokenizer = tokenizer or lossless()
    fabric = make_fabric("cpu", 1)
    options = {"shard_size": SHARD, "batch_size": BATCH, **options}
    encode(tokenizer, source or Pictures(), folder, Views(flips=flips), fabric, **options)
    return tokenizer


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


def error(*args, **options):
    with pytest.raises(UserError) as caught:
        write(*args, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that was written without interruption."""
    folder = tmp_path_factory.mktemp("cache")
    write(folder)
    return folder


# --- what is in it


def test_shards_hold_normalised_latents_in_order_in_lightningdits_layout(cache):
    assert sorted(shards(cache)) == [f"latents_rank00_shard{k:03d}.safetensors" for k in range(4)]
    tokenizer, source = lossless(), Pictures()
    for k, count in enumerate((8, 8, 8, 2)):
        content = load_file(cache / shard_name(k))
        assert {key: (tuple(v.shape), v.dtype) for key, v in content.items()} == {
            "latents": ((count, 48, 2, 2), torch.float32),
            "latents_flip": ((count, 48, 2, 2), torch.float32),
            "labels": ((count,), torch.int64),
        }
        for row in range(count):
            image, label = source[k * SHARD + row]
            image = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
            assert torch.equal(content["latents"][row], tokenizer.encode(image)[0])
            assert torch.equal(content["latents_flip"][row], tokenizer.encode(image.flip(-1))[0])
            assert content["labels"][row] == label


def test_manifest_says_what_is_in_it_and_where_it_comes_from(cache):
    manifest = Manifest.read(cache)
    tokenizer = lossless()
    assert manifest.tokenizer == {
        "fingerprint": tokenizer.fingerprint(),
        "kind": "continuous",
        "latent_shape": [48, 2, 2],
        "image_size": [8, 8],
        "downsampling": 4,
    }
    assert manifest.images == {
        "source": crop_id(Pictures(), (8, 8)),
        "crop": "center",
        "count": COUNT,
        "classes": ["a", "b"],
    }
    assert (manifest.dtype, manifest.flips, manifest.shard_size) == ("float32", True, SHARD)
    latents = torch.cat([load_file(cache / shard_name(k))["latents"] for k in range(4)]).double()
    for key, value in (("mean", latents.mean((0, 2, 3))), ("std", latents.std((0, 2, 3)))):
        torch.testing.assert_close(torch.tensor(manifest.statistics[key]).double(), value, rtol=0, atol=1e-6)
    for k, record in enumerate(manifest.shards):
        assert (record.file, record.first, record.missing) == (shard_name(k), k * SHARD, [])
        assert record.sha256 == hash_file(cache / record.file)
    assert sorted(set(contents(cache)) - set(shards(cache))) == ["check.png", "manifest.json"]  # no records are left


def test_bfloat16_is_the_rounded_latent(cache, tmp_path):
    write(tmp_path, dtype="bfloat16")
    exact, rounded = (load_file(folder / shard_name(1))["latents_flip"] for folder in (cache, tmp_path))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(exact.bfloat16(), rounded)


def test_mirrored_images_are_encoded_where_they_are_asked_for(tmp_path):
    tokenizer = write(tmp_path, flips=False)
    assert "latents_flip" not in load_file(tmp_path / shard_name(0))
    assert sum(map(len, tokenizer.encoder.seen)) == COUNT + 16  # the last ones by the self-check


def test_a_batch_stays_within_its_shard_and_progress_is_told(tmp_path, capsys):
    tokenizer = write(tmp_path)
    assert [len(image) for image in tokenizer.encoder.seen[:-2:2]] == [3, 3, 2] * 3 + [2]
    out = capsys.readouterr().out
    assert "26/26  images/s " in out
    assert "26 latents in 4 shards, PSNR 100.00 dB and 100.00 dB mirrored on 16 images (check.png)" in out


def test_latents_in_channels_last_are_written_as_all_others(cache, tmp_path, monkeypatch):
    shuffle = nn.functional.pixel_unshuffle
    monkeypatch.setattr(nn.functional, "pixel_unshuffle", lambda *a: shuffle(*a).to(memory_format=torch.channels_last))
    write(tmp_path)
    assert shards(tmp_path) == shards(cache)


def test_the_tokenizer_learns_on(tmp_path):
    tokenizer = write(tmp_path)
    tokenizer.encode(torch.rand(1, 3, 8, 8)).sum().backward()
    assert tokenizer.encoder.scale.grad is not None


def test_an_unreadable_image_has_no_row_and_is_named_in_the_manifest(tmp_path, cache):
    source = Pictures(200, bad=(3, 4))
    write(tmp_path, source, shard_size=100)
    first = Manifest.read(tmp_path).shards[0]
    assert (first.first, first.count, first.missing) == (0, 98, [3, 4])
    served = LatentShards(str(tmp_path), images=source)
    assert len(served) == 198
    assert served.opened.image_ids[:6].tolist() == [0, 1, 2, 5, 6, 7]
    batch = served.batch(np.array([2, 3, 197]), np.array([False, True, False]))
    latent = lossless().encode(batch["image"] / 255)
    assert torch.equal(batch["latent"], latent)


# --- kill, resume, ranks


def copy_of(cache, folder):
    folder.mkdir(exist_ok=True)
    for name, content in contents(cache).items():
        (folder / name).write_bytes(content)


class Killed(Exception):
    pass


@pytest.mark.parametrize("bad", [(), (3, 4)])
def test_a_generator_is_validated_on_images_that_its_tokenizer_did_not_learn(tmp_path, bad):
    """Training on images with a hold-out, and on the cache of the same images, unreadable ones among them or not."""
    source = Pictures(200, bad=bad)
    write(tmp_path, source, shard_size=100)
    on_images = LatentDataModule(source, 4, 8, val=0.2)
    on_cache = LatentDataModule(LatentShards(str(tmp_path)), 4, val=0.2)
    for data in (on_images, on_cache):
        data.setup()
    held = on_images.sources["val"].indices
    ids = on_cache.sources["val"].source.opened.image_ids
    assert ids[on_cache.sources["val"].indices].tolist() == [i for i in held if i not in bad]
    trained = set(ids[on_cache.sources["train"].indices].tolist())
    assert not trained & set(held.tolist())
    assert len(trained) + len(on_cache.sources["val"]) == 200 - len(bad)


@pytest.mark.parametrize("name", ["manifest.json", "latents_rank00_shard001.safetensors", "check.png"])
def test_a_full_disk_is_one_line_and_the_same_call_goes_on(cache, tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert f"{name}: the disk is full" in error(tmp_path)
    assert not list(tmp_path.glob(".*"))
    write(tmp_path)
    assert contents(tmp_path) == contents(cache)


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        assert "cannot write" in error(folder)


@pytest.mark.parametrize("batches", range(10))
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(cache, tmp_path, batches):
    class Kill(Unshuffle):
        def forward(self, image):
            if len(self.seen) == 2 * batches:
                raise Killed
            return super().forward(image)

    tokenizer = lossless()
    tokenizer.encoder = Kill()
    with pytest.raises(Killed):
        write(tmp_path, tokenizer=tokenizer)
    there = {name: (tmp_path / name).stat().st_mtime_ns for name in shards(tmp_path)}
    assert len(there) == batches // 3
    with pytest.raises(UserError, match="is unfinished"):
        len(LatentShards(str(tmp_path)))
    tokenizer = write(tmp_path)
    assert contents(tmp_path) == contents(cache)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in there} == there
    encoded = {bytes(image.numpy()) for images in tokenizer.encoder.seen[:-2] for image in images}
    assert len(encoded) == 2 * (COUNT - SHARD * len(there))


def test_a_signal_ends_after_the_batch_and_the_same_call_goes_on(cache, tmp_path):
    class Asked(Unshuffle):
        def forward(self, image):
            if len(self.seen) == 2 * 4:  # batches with their mirrored images
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(image)

    tokenizer = lossless()
    tokenizer.encoder = Asked()
    with preemption.listening(), pytest.raises(Preempted, match="143"):
        write(tmp_path, tokenizer=tokenizer)
    assert len(tokenizer.encoder.seen) == 2 * 5
    assert len(shards(tmp_path)) == 1
    write(tmp_path)
    assert contents(tmp_path) == contents(cache)


def test_what_is_half_there_is_written_again(cache, tmp_path):
    copy_of(cache, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"], manifest["statistics"] = manifest["shards"][:1], None  # the shard is there, its record is not
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / f".{shard_name(2)}.partial").write_bytes(b"half")
    (tmp_path / shard_name(3)).write_bytes((cache / shard_name(3)).read_bytes()[:-1])
    write(tmp_path)
    assert contents(tmp_path) == contents(cache)


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """Folders that separate processes wrote with a small ViT: killed by SIGKILL at each write, on 1 and on 2 ranks."""
    root = tmp_path_factory.mktemp("worked")
    run_ranks(1, write_alone, root)
    return root, run_ranks(2, write_as_rank, root)


def test_two_ranks_write_the_bytes_of_one(worked):
    root, _ = worked
    one, two = contents(root / "one"), contents(root / "two")
    assert one == two
    assert len(shards(root / "one")) == 5


def test_two_ranks_share_what_is_left_even_if_one_gets_nothing(worked):
    root, _ = worked
    assert contents(root / "two_resumed") == contents(root / "one")


def test_killed_at_any_write_it_goes_on_and_ends_with_the_same_bytes(worked):
    root, _ = worked
    folders = sorted(root.glob("killed_*"))
    assert len(folders) == 13  # begin and end of the manifest, 5 shards, their records, the picture
    for folder in folders:
        assert contents(folder) == contents(root / "one"), folder.name


def test_all_ranks_stop_where_the_folder_holds_something_else(worked):
    _, errors = worked
    assert all("tokenizer fingerprint" in error for error in errors)


# --- what is broken is done again, and only that


@pytest.mark.parametrize("damage", ["altered", "missing", "truncated", "header"])
def test_a_broken_shard_alone_is_encoded_again(cache, tmp_path, damage, capsys):
    copy_of(cache, tmp_path)
    path = tmp_path / shard_name(1)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[12 if damage == "header" else len(content) // 2] ^= 1
        path.write_bytes(content[: -100 if damage == "truncated" else None])
    others = {name: (tmp_path / name).stat().st_mtime_ns for name in shards(cache) if name != shard_name(1)}
    tokenizer = write(tmp_path)
    assert contents(tmp_path) == contents(cache)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in others} == others
    seen = tokenizer.encoder.seen[:6]  # three batches and their mirror images; the rest is the self-check
    expected = [Pictures()[index][0] for index in range(SHARD, 2 * SHARD)]
    assert np.array_equal(
        (torch.cat(seen[::2]) * 255).round().byte().permute(0, 2, 3, 1).numpy(),
        np.stack(list(map(np.asarray, expected))),
    )
    assert len(tokenizer.encoder.seen) == 8
    out = capsys.readouterr().out
    assert "3 of 4 shards are finished" in out
    assert (f"{shard_name(1)} is not what was written" in out) == (damage == "altered")


def test_running_a_finished_cache_again_changes_nothing(cache, tmp_path):
    copy_of(cache, tmp_path)
    tokenizer = write(tmp_path)
    assert contents(tmp_path) == contents(cache)
    assert len(tokenizer.encoder.seen) == 2  # the self-check alone


# --- what is refused


def test_another_tokenizer_source_or_format_is_refused_by_both_values(cache, tmp_path):
    copy_of(cache, tmp_path)
    ours, theirs = lossless(0.4).fingerprint(), lossless().fingerprint()
    message = error(tmp_path, tokenizer=lossless(0.4))
    assert ours in message
    assert theirs in message
    message = error(tmp_path, Pictures(seed=1))
    assert Manifest.read(cache).images["source"] in message
    assert "images source" in message
    message = error(tmp_path, dtype="bfloat16")
    assert "dtype float32, but this run's dtype is bfloat16" in message
    assert "flips True, but this run's flips is False" in error(tmp_path, flips=False)
    assert "shard_size 8, but this run's shard_size is 5" in error(tmp_path, shard_size=5)
    assert contents(tmp_path) == contents(cache)


def test_a_cache_of_earlier_versions_that_names_its_split_goes_on(cache, tmp_path):
    copy_of(cache, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["images"]["split"] = "train"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / shard_name(1)).unlink()
    write(tmp_path)
    assert contents(tmp_path) == contents(cache)


def test_latents_without_measured_statistics_are_refused(tmp_path):
    assert "never measured" in error(tmp_path, tokenizer=Tokenizer(Unshuffle(), Same(), Shuffle()))
    assert not shards(tmp_path)


def test_a_precision_that_rounds_the_weights_is_refused():
    with pytest.raises(UserError, match="bf16-true rounds the weights"):
        make_fabric("cpu", 1, precision="bf16-true")


def test_latents_that_are_not_finite_are_refused(tmp_path):
    tokenizer = lossless()
    tokenizer.encoder.scale.data.fill_(float("nan"))
    assert "images 0 to 7 are not finite" in error(tmp_path, tokenizer=tokenizer)


def test_sources_without_images_and_options_without_effect_are_refused(cache, tmp_path):
    assert "gives no images" in error(tmp_path, LatentShards(str(cache)))
    assert "batch_size=0" in error(tmp_path, batch_size=0)
    assert "no image can be read" in error(tmp_path, Pictures(2, bad=(0, 1)))
    with pytest.raises(UserError, match=r"views\.crops ten is for tokens"):
        encode(lossless(), Pictures(), tmp_path, Views("ten"), make_fabric("cpu", 1))
    assert not shards(tmp_path)


def test_a_floor_that_is_not_reached_leaves_the_cache_unfinished_and_the_shards_for_another_try(cache, tmp_path):
    message = error(tmp_path, min_psnr=101.0)
    assert "decode to 100.00 dB, less than min_psnr 101.0" in message
    assert Manifest.read(tmp_path).statistics is None
    there = {name: (tmp_path / name).stat().st_mtime_ns for name in shards(tmp_path)}
    write(tmp_path)
    assert contents(tmp_path) == contents(cache)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in there} == there


def unmirrored(codes, manifest):
    """Forget to mirror."""
    return as_stored([codes[0], codes[0]], manifest)


def shifted(codes, manifest):
    """Store each latent one row too late."""
    return as_stored([code.roll(1, 0) for code in codes], manifest)


@pytest.mark.parametrize(("wrong", "key"), [(unmirrored, "latents_flip"), (shifted, "latents")])
def test_the_self_check_finds_latents_that_are_not_those_of_their_images(tmp_path, monkeypatch, wrong, key):
    monkeypatch.setattr("aligntok.programs.encode.as_stored", wrong)
    message = error(tmp_path, min_psnr=0.0)
    assert message.startswith(f"{key} in ")
    assert "the tokenizer reaches 100.00 dB" in message
    assert (tmp_path / "check.png").is_file()


def test_the_picture_shows_images_above_reconstructions(cache):
    picture = np.asarray(Image.open(cache / "check.png"))
    rows = [picture[2 + 66 * row : 66 * (row + 1), 2:66] for row in range(4)]  # 8 px are shown as 64, with 2 between
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[2], rows[0][:, ::-1])
    assert np.array_equal(rows[2], rows[3])
    assert np.array_equal(rows[0][::8, ::8], np.asarray(Pictures()[0][0]))
