"""Cached latents served: which rows, in which order, in which units, and what is refused."""

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from aligntok.cache import Manifest, Record, shard_name
from aligntok.data import Augmentation, BatchSource, LatentDataModule, LatentShards, Shapes
from aligntok.data.images import center_crop
from aligntok.data.order import shuffled
from aligntok.data.sources import crop_id
from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.networks import Tokenizer
from aligntok.randomness import choices
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `validation_step`")  # modules of these tests only train

SHAPE = (3, 4, 2)  # not square
COUNTS = (7, 7, 7, 5)  # rows of the shards
TOTAL = sum(COUNTS)


def rows(count=TOTAL, mirrored=False):
    """Return latents that tell their id and whether they are mirrored."""
    values = torch.arange(count)[:, None, None, None] + torch.arange(24).view(SHAPE) / 64
    return -values - 1000 if mirrored else values


def labels(count=TOTAL):
    return torch.arange(count) % 5


def write(folder, counts=COUNTS, dtype=torch.float32, flips=True, **changes):
    """Write a cache of our layout without the writer."""
    folder.mkdir(exist_ok=True, parents=True)
    records, first = [], 0
    for k, count in enumerate(counts):
        part = slice(first, first + count)
        content = {"latents": rows().to(dtype)[part].contiguous(), "labels": labels()[part].contiguous()}
        if flips:
            content["latents_flip"] = rows(mirrored=True).to(dtype)[part].contiguous()
        path = folder / shard_name(k)
        save_file(content, path)
        records.append(Record(path.name, first, count, [], hash_file(path)))
        first += count
    manifest = Manifest(
        **{
            "tokenizer": {"fingerprint": "f" * 16, "kind": "continuous", "latent_shape": list(SHAPE),
                          "image_size": [16, 8], "downsampling": 4},
            "images": {"source": "s" * 16, "split": "train", "crop": "center", "count": TOTAL,
                       "classes": list("abcde")},
            "dtype": str(dtype).removeprefix("torch."),
            "flips": flips,
            "shard_size": counts[0],
            "statistics": {"mean": [0.0] * 3, "std": [1.0] * 3},
            "shards": records,
            **changes,
        }
    )  # fmt: skip
    manifest.write(folder)
    return folder


def write_lightningdit(folder, ranks=((4, 4, 3), (4, 4, 2)), statistics=True):
    """Write what its extract_features.py writes: shards of each rank with a rest, metadata, no manifest."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(sum(map(sum, ranks)), *SHAPE, generator=generator) * 3 + 1
    first = 0
    for rank, counts in enumerate(ranks):
        for k, count in enumerate(counts):
            part = slice(first, first + count)
            content = {"latents": latents[part].contiguous(), "latents_flip": -latents[part], "labels": labels()[part]}
            metadata = {"total_size": str(count), "dtype": "torch.float32", "device": "cuda:0"}
            save_file(content, folder / f"latents_rank{rank:02d}_shard{k:03d}.safetensors", metadata)
            first += count
    if statistics:
        content = {"mean": torch.full((1, 3, 1, 1), 0.5), "std": torch.full((1, 3, 1, 1), 2.0)}
        torch.save(content, folder / "latents_stats.pt")
    return latents


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents") / "cache")


def module(folder, global_batch_size=8, **options):
    source = folder if isinstance(folder, Dataset) else LatentShards(str(folder))
    return LatentDataModule(source, global_batch_size, **{"val": source, **options})


def opened(*args, **options):
    data = module(*args, **options)
    data.setup()
    return data


def epochs(data, count=1):
    """Return the batches of some epochs, as the device gets them."""
    loader = data.train_dataloader()
    return [[data.on_after_batch_transfer(batch, 0) for batch in loader] for _ in range(count)]


def check_rows(batch):
    """Check that latents and labels are those of the ids; return which are mirrored."""
    assert batch["latent"].dtype == torch.float32
    mirrored = batch["latent"][:, 0, 0, 0] < 0
    expected = torch.where(mirrored[:, None, None, None], rows(mirrored=True)[batch["id"]], rows()[batch["id"]])
    assert torch.equal(batch["latent"], expected)
    assert torch.equal(batch["label"], labels()[batch["id"]])
    return mirrored


# --- rows


@pytest.mark.parametrize("workers", [0, 2])
def test_each_id_once_in_an_epoch_with_its_own_row_mixed_over_all_shards(cache, workers):
    data = opened(cache, 6, num_workers=workers)
    shards = np.repeat(range(4), COUNTS)
    orders = []
    for epoch, batches in enumerate(epochs(data, 3)):
        mirrored = torch.cat([check_rows(batch) for batch in batches])
        ids = torch.cat([batch["id"] for batch in batches]).tolist()
        assert ids == shuffled(TOTAL, 0, epoch)[:24].tolist()
        assert all(len(set(shards[batch["id"]])) > 1 for batch in batches)
        assert 4 <= mirrored.sum() <= 20
        orders.append(ids)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_each_row_in_order_and_none_mirrored(cache, workers):
    data = opened(cache, 4, num_workers=workers)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert torch.cat([batch["id"] for batch in batches]).tolist() == list(range(TOTAL))
    assert not any(check_rows(batch).any() for batch in batches)
    calibration = torch.cat([batch["id"] for batch in data.calibration_dataloader()])
    assert len(set(calibration.tolist())) == TOTAL


def test_bfloat16_is_served_as_it_is_and_becomes_float_on_the_device(tmp_path):
    data = opened(write(tmp_path / "cache", dtype=torch.bfloat16), augmentation=Augmentation(flip=False))
    batch = next(iter(data.val_dataloader()))
    assert batch["latent"].dtype == torch.bfloat16
    batch = data.on_after_batch_transfer(batch, 0)
    assert batch["latent"].dtype == torch.float32
    assert torch.equal(batch["latent"], rows().bfloat16().float()[batch["id"]])


def test_classes_count_and_shape_come_from_the_cache(cache):
    data = opened(cache)
    assert data.classes == list("abcde")
    assert data.num_images("train") == TOTAL
    assert data.fingerprint("val") == "s" * 16  # of the images, so references of the same images are found again
    assert data.sources["train"].size("latent_shape") == SHAPE
    assert data.has_latents
    assert not data.has_images


def test_holdout_is_a_part_of_the_rows(cache):
    data = opened(cache, 8, val=0.25)
    assert (data.num_images("train"), data.num_images("val")) == (20, 6)
    indices = {split: torch.from_numpy(data.sources[split].indices) for split in ("train", "val")}
    assert not set(indices["train"].tolist()) & set(indices["val"].tolist())
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        for batch in loader:
            check_rows({**batch, "id": indices[split][batch["id"]]})


# --- flips


def test_a_flip_is_a_function_of_seed_epoch_and_id_alone(cache):
    def flips(batch_size, seed=0, **options):
        data = opened(cache, batch_size, seed=seed, **options)
        found = {}
        for epoch, batches in enumerate(epochs(data, 2)):
            for batch in batches:
                found |= {(epoch, i): bool(f) for i, f in zip(batch["id"].tolist(), check_rows(batch), strict=True)}
        return found

    first, other = flips(2), flips(13, num_workers=2)
    assert len(first) == 2 * TOTAL
    assert all(first[key] == value for key, value in other.items())
    assert 10 <= sum(first[0, i] != first[1, i] for i in range(TOTAL)) <= 18
    seeded = flips(2, seed=1)
    assert sum(seeded[key] != first[key] for key in first) >= 10
    assert not any(flips(2, augmentation=Augmentation(flip=False)).values())


def test_coins_are_fair_and_independent():
    ids = np.arange(20_000)
    heads = {key: choices(2, key[0], np.full_like(ids, key[1]), ids) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    for flags in heads.values():
        assert abs(flags.mean() - 0.5) < 0.015
        assert abs((flags[1:] ^ flags[:-1]).mean() - 0.5) < 0.015
    first, *others = heads.values()
    assert all(abs((first ^ flags).mean() - 0.5) < 0.015 for flags in others)


# --- resume and ranks


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["id"].tolist(), check_rows(batch).tolist()))
        return self.network(batch["latent"].mean().view(1, 1)).mean() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, recorder, *args):
        trainer.save_checkpoint(self.folder / f"{len(recorder.seen):02d}.ckpt")


def fit(data, ckpt_path=None, callbacks=(), max_steps=9, **options):
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        max_steps=max_steps,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **{"devices": 1, **options},
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_anywhere_sees_the_very_next_rows(cache, tmp_path, workers):
    whole = fit(module(cache, num_workers=workers), callbacks=[Save(tmp_path)])
    for path in sorted(tmp_path.iterdir()):
        assert fit(module(cache, num_workers=workers), ckpt_path=path) == whole[int(path.stem) :], path.name


def fit_on_rank(cache):
    return fit(module(cache), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))


def test_two_ranks_see_the_steps_of_one_with_the_same_flips(cache):
    ranks = run_ranks(2, fit_on_rank, cache)
    alone = fit(module(cache))
    for (ids, flips), *shares in zip(alone, *ranks, strict=True):
        together = [pair for share in shares for pair in zip(*share, strict=True)]
        assert sorted(together) == sorted(zip(ids, flips, strict=True))
        assert all(len(share[0]) == 4 for share in shares)


def test_a_spawned_process_gets_paths_and_maps_the_shards_itself(cache):
    source = LatentShards(str(cache))
    before = source.batch(np.array([25, 0]), np.array([True, False]))
    packed = pickle.dumps(source)
    assert len(packed) < 500
    after = pickle.loads(packed).batch(np.array([25, 0]), np.array([True, False]))
    assert torch.equal(before["latent"], after["latent"])


def test_an_error_while_threads_prefetch_reaches_the_training_process(cache):
    class Broken(LatentShards):
        def batch(self, ids, mirrored):
            raise UserError("the disk is gone")

    data = opened(Broken(str(cache)), num_workers=2)
    with pytest.raises(UserError, match="the disk is gone"):
        next(iter(data.train_dataloader()))


# --- LightningDiT's folders


def test_lightningdits_folder_is_served_normalised_by_its_statistics(tmp_path):
    latents = write_lightningdit(tmp_path)
    data = opened(tmp_path, 7)
    assert data.num_images("train") == 21
    assert data.classes == [str(label) for label in range(5)]
    batch = data.read("val", range(21))
    torch.testing.assert_close(batch["latent"], (latents - 0.5) / 2)
    assert torch.equal(batch["label"], labels()[:21])
    mirrored = data.sources["train"].batch(np.arange(21), np.ones(21, bool))["latent"]
    torch.testing.assert_close(mirrored, (-latents - 0.5) / 2)


def test_without_its_statistics_they_are_measured(tmp_path):
    latents = write_lightningdit(tmp_path, statistics=False)
    latent = opened(tmp_path, 7).read("val", range(21))["latent"]
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(latent, (latents - mean) / std)


@pytest.mark.parametrize("content", ["pickle", "keys", "channels", "zero"])
def test_bad_statistics_are_refused(tmp_path, content):
    write_lightningdit(tmp_path)
    good = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    bad = {
        "pickle": {**good, "more": Path},
        "keys": {"mean": good["mean"]},
        "channels": {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)},
        "zero": {**good, "std": torch.zeros(1, 3, 1, 1)},
    }
    torch.save(bad[content], tmp_path / "latents_stats.pt")
    with pytest.raises(UserError, match=r"latents_stats\.pt"):
        opened(tmp_path, 7).read("val", [0])


@pytest.mark.parametrize("name", ["rank00_shard001", "rank00_shard000", "rank01_shard000"])
def test_a_gap_in_the_numbers_is_named(tmp_path, name):
    write_lightningdit(tmp_path)
    (tmp_path / f"latents_{name}.safetensors").unlink()
    assert f"{name}.safetensors is missing" in refused(tmp_path)


def test_a_shard_of_another_shape_is_named(tmp_path):
    write_lightningdit(tmp_path)
    content = {"latents": torch.zeros(2, 5, 4, 2), "latents_flip": torch.zeros(2, 5, 4, 2), "labels": labels(2)}
    save_file(content, tmp_path / "latents_rank01_shard001.safetensors")
    assert "rank01_shard001.safetensors is altered" in refused(tmp_path)


# --- broken caches


def refused(folder, **options):
    with pytest.raises(UserError) as caught:
        opened(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def damage(folder, number, kind):
    path = folder / shard_name(number)
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    elif kind == "extended":
        path.write_bytes(content + b"x")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(b"\xff" * len(content))
    elif kind == "header":
        path.write_bytes(bytes(content).replace(b'"latents"', b'"latentz"'))
    elif kind == "dtype":
        path.write_bytes(bytes(content).replace(b'"F32"', b'"I32"'))
    elif kind == "counts":
        content = {key: value[:-1].contiguous() for key, value in load_file(path).items()}
        save_file(content, path)
    elif kind == "altered":
        content[-5] ^= 4
        path.write_bytes(content)


KINDS = ("missing", "truncated", "extended", "empty", "garbage", "header", "dtype", "counts")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_shard_is_named_when_the_cache_is_opened(tmp_path, kind):
    damage(write(tmp_path / "cache"), 2, kind)
    message = refused(tmp_path / "cache")
    assert shard_name(2) in message
    assert not any(shard_name(k) in message for k in (0, 1, 3))
    assert f"aligntok repair {tmp_path / 'cache'}" in message


@pytest.mark.parametrize("kind", [*KINDS, "altered"])
def test_verify_names_it_too(tmp_path, kind):
    folder = write(tmp_path / "cache")
    len(LatentShards(str(folder), verify=True))
    damage(folder, 1, kind)
    damage(folder, 3, "altered")
    with pytest.raises(UserError) as caught:
        len(LatentShards(str(folder), verify=True))
    assert all((shard_name(k) in str(caught.value)) == (k in (1, 3)) for k in range(4))


def test_the_other_shards_stay_usable(tmp_path, capsys):
    folder = write(tmp_path / "cache")
    damage(folder, 1, "truncated")
    data = opened(LatentShards(str(folder), on_bad_shard="skip"))
    assert data.num_images("train") == TOTAL - 7
    left = [*range(7), *range(14, TOTAL)]
    batch = data.read("val", range(TOTAL - 7))
    check_rows({**batch, "id": torch.tensor(left)})
    assert data.sources["val"].opened.image_ids.tolist() == left
    assert shard_name(1) in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_cut_off_under_a_training_is_named(tmp_path, num_workers):
    """To touch mapped memory that is gone ends the process (SIGBUS)."""
    folder = write(tmp_path / "cache")
    loader = opened(folder, num_workers=num_workers).train_dataloader()
    next(iter(loader))
    for k in range(len(COUNTS)):
        os.truncate(folder / shard_name(k), 300)
    with pytest.raises(UserError, match=r"shard00\d\.safetensors was cut off while it was in use: `aligntok repair"):
        [list(loader) for _ in range(5)]


def test_labels_that_are_none_are_named(tmp_path):
    folder = tmp_path / "there"
    write_lightningdit(folder)
    content = load_file(folder / shard_name(1))
    for label in (-1, 1 << 60):
        content["labels"][2] = label
        save_file(content, folder / shard_name(1))
        assert "shard001.safetensors is altered: its labels are in" in refused(folder)


def test_a_folder_that_is_none_an_empty_one_and_an_unfinished_one(tmp_path):
    assert "there is no latent cache" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no latents" in refused(tmp_path / "empty")
    message = refused(write(tmp_path / "begun", statistics=None))
    assert "unfinished" in message
    assert "aligntok encode" in message


def test_a_damaged_manifest(cache, tmp_path):
    folder = write(tmp_path / "cache")
    good = json.loads((folder / "manifest.json").read_text())
    for text, words in (
        ("{", "is broken (no JSON"),
        ("[]", "is broken"),
        (json.dumps({**good, "format": 2}), "format 2"),
        (json.dumps({key: value for key, value in good.items() if key != "tokenizer"}), "tokenizer"),
        (json.dumps({**good, "images": {}}), "source is None"),
        (json.dumps({**good, "images": {**good["images"], "classes": None}}), "classes is None"),
        (json.dumps({**good, "shards": []}), "names no shards"),
        (json.dumps({**good, "shards": [{**good["shards"][0], "missing": [99]}]}), "cannot be"),
        (json.dumps({**good, "shards": [{**good["shards"][0], "file": "../x"}]}), "cannot be"),
        (json.dumps({**good, "surprise": 3}), "surprise"),
        (json.dumps({**good, "dtype": "bfloat16"}), "altered"),
    ):
        (folder / "manifest.json").write_text(text)
        assert words in refused(folder), text
    assert asdict(Manifest.read(cache)) | {"format": 1} == good | {"text": None}


def test_flips_that_are_not_there_are_refused_and_can_be_switched_off(tmp_path):
    folder = write(tmp_path / "cache", flips=False)
    message = refused(folder)
    assert "augmentation.flip" in message
    assert str(folder) in message
    assert not check_rows(next(iter(opened(folder, augmentation=Augmentation(flip=False)).train_dataloader()))).any()


def test_images_need_a_size_and_every_run_a_batch():
    with pytest.raises(UserError, match=r"image_size is missing"):
        LatentDataModule(Shapes(8, 8), 4, val=Shapes(8, 8)).setup()
    with pytest.raises(UserError, match="global_batch_size=0"):
        LatentDataModule(Shapes(8, 8), 0)


# --- the tokenizer


class Part(nn.Module):
    width, latent_dim, downsampling, image_size = 3, 3, 4, (16, 8)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def tokenizer(mean=0.5, std=2.0):
    network = Tokenizer(Part(), Part(), Part())
    network.set_latent_statistics(torch.full((3,), mean), torch.full((3,), std))
    return network


def test_latents_of_the_tokenizer_are_accepted(tmp_path):
    ours = tokenizer()
    entry = {"fingerprint": ours.fingerprint(), "kind": "continuous", "latent_shape": list(SHAPE),
             "image_size": [16, 8],
             "downsampling": 4}  # fmt: skip
    data = opened(write(tmp_path / "cache", tokenizer=entry))
    data.check_latents(SHAPE, ours)
    data.check_latents(SHAPE, None)


def test_latents_of_another_shape_kind_or_tokenizer_are_refused_by_both_values_and_keys(cache, tmp_path):
    ours = tokenizer()

    def refuse(data, *args):
        with pytest.raises(UserError) as caught:
            data.check_latents(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    message = refuse(opened(cache), (4, 4, 2), None)
    for words in ("train", str(cache), "(3, 4, 2)", "network.latent_shape", "(4, 4, 2)"):
        assert words in message
    message = refuse(opened(cache), SHAPE, ours)
    for words in ("train", str(cache), "f" * 16, ours.fingerprint()):
        assert words in message
    entry = {**Manifest.read(cache).tokenizer, "kind": "discrete"}
    message = refuse(opened(write(tmp_path / "discrete", tokenizer=entry)), SHAPE, ours)
    assert "discrete" in message
    assert "the tokenizer makes continuous" in message


def test_latents_of_validation_are_checked_too(cache, tmp_path):
    ours = tokenizer()
    entry = {**Manifest.read(cache).tokenizer, "fingerprint": ours.fingerprint()}
    good = LatentShards(str(write(tmp_path / "good", tokenizer=entry)))
    with pytest.raises(UserError, match=r"val .* was written by tokenizer ffff"):
        opened(good, val=LatentShards(str(cache))).check_latents(SHAPE, ours)


def test_lightningdits_statistics_must_be_those_of_the_tokenizer(tmp_path):
    write_lightningdit(tmp_path)
    data = opened(tmp_path, 7)
    data.check_latents(SHAPE, tokenizer(mean=0.55, std=2.1))
    for values in ((0.5, 1.0), (1.5, 2.0)):
        with pytest.raises(UserError, match="other statistics"):
            data.check_latents(SHAPE, tokenizer(*values))


# --- images beside the latents


class Noise(Dataset):
    classes = tuple("abcde")

    def __init__(self, seed=0):
        self.seed = seed

    def __len__(self):
        return TOTAL

    def __getitem__(self, index):
        pixels = np.random.default_rng((self.seed, index)).integers(0, 256, (20, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 5


def with_images(folder, seed=0, written=0):
    entry = {
        "source": crop_id(Noise(written), (16, 8)),
        "split": "train",
        "crop": "center",
        "count": TOTAL,
        "classes": [],
    }
    return LatentShards(str(write(folder, images=entry)), images=Noise(seed))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_those_of_the_latents_cropped_and_mirrored_alike(tmp_path, workers):
    data = opened(with_images(tmp_path / "cache"), num_workers=workers)
    assert data.has_images
    flips = []
    for batch in epochs(data)[0]:
        for index, image, flip in zip(batch["id"].tolist(), batch["image"], check_rows(batch), strict=True):
            crop = np.asarray(center_crop(Noise()[index][0], (16, 8))).transpose(2, 0, 1)
            expected = torch.from_numpy(crop[..., ::-1].copy() if flip else crop.copy())
            assert torch.equal((image * 255).round().byte(), expected)
            flips.append(bool(flip))
    assert 0 < sum(flips) < len(flips)
    assert data.preview(3).shape == (3, 3, 16, 8)


def test_other_images_and_images_without_manifest_are_refused(tmp_path):
    message = refused(with_images(tmp_path / "cache", seed=1))
    assert crop_id(Noise(1), (16, 8)) in message
    assert crop_id(Noise(0), (16, 8)) in message
    write_lightningdit(tmp_path)
    assert "no manifest" in refused(LatentShards(str(tmp_path), images=Noise()))
    with pytest.raises(UserError, match=r"val gives latents alone"):
        opened(write(tmp_path / "plain")).preview(2)


# --- other sources of batches


class Numbers(BatchSource):
    def __len__(self):
        return 9

    def batch(self, ids, mirrored):
        return {"label": torch.from_numpy(ids * 10)}

    def fingerprint(self):
        return "numbers"


def test_predict_takes_a_source_of_its_own_in_order():
    broken = LatentShards("nowhere")  # samples need no training data
    data = LatentDataModule(broken, 4, val=broken, predict=Numbers(), num_workers=2)
    data.setup("predict")
    assert data.num_images("predict") == 9
    assert data.fingerprint("predict") == "numbers"
    assert [batch["label"].tolist() for batch in data.predict_dataloader()] == [[0, 10, 20, 30], [40, 50, 60, 70], [80]]
    with pytest.raises(UserError, match="there is no latent cache nowhere"):
        data.setup("fit")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_predict_takes_a_split_as_evaluation_sees_it(split):
    sources = {"train": Noise(0), "val": Noise(1), "test": Noise(2)}
    data = LatentDataModule(sources["train"], 4, (16, 8), val=sources["val"], test=sources["test"], predict=split)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["id"].tolist() == [0, 1, 2, 3]
    for index, image in enumerate(batch["image"]):
        crop = np.asarray(center_crop(sources[split][index][0], (16, 8))).transpose(2, 0, 1)
        assert torch.equal(image, torch.from_numpy(crop.copy()))
    assert data.fingerprint("predict") == data.fingerprint(split)
