"""Cached tokens served: which view of which image, in which order, and what is refused."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import nn

from aligntok.cache import TOKEN_LAYOUT, Manifest, Record, shard_name
from aligntok.data import Augmentation, LatentDataModule, LatentShards, TokenShards
from aligntok.data.order import shuffled
from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.randomness import choices
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `validation_step`")  # modules of these tests only train

COUNTS = (7, 7, 7, 5)  # rows of the shards
TOTAL, LENGTH, CODES = sum(COUNTS), 10, 40_000  # 2 prefix tokens and a grid of 4 x 2; beyond 15 bits
SIZES = {"codebook_size": CODES, "grid": (4, 2), "num_prefix": 2, "sequence_length": LENGTH}


def rows(views=10):
    """Return tokens (TOTAL, views, LENGTH) that tell id and view."""
    ids, view = torch.arange(TOTAL).view(-1, 1, 1), torch.arange(views).view(1, -1, 1)
    return (ids * 1000 + view * 100 + torch.arange(LENGTH) + 14_000) % CODES


def write(folder, crops="ten", flips=True, **changes):
    """Write a cache without the writer."""
    folder.mkdir(exist_ok=True, parents=True)
    views = {"center": 1, "ten": 5}[crops] * (1 + flips)
    records, first = [], 0
    for k, count in enumerate(COUNTS):
        part = slice(first, first + count)
        content = {"tokens": rows(views)[part].to(torch.uint16).contiguous(), "labels": torch.arange(TOTAL)[part] % 5}
        path = folder / shard_name(k, TOKEN_LAYOUT)
        save_file(content, path)
        records.append(Record(path.name, first, count, [], hash_file(path)))
        first += count
    entry = {"fingerprint": "f" * 16, "kind": "discrete", "latent_shape": [3, 1, LENGTH], "image_size": [16, 8],
             "downsampling": 4, "codebook_size": CODES}  # fmt: skip
    images = {"source": "s" * 16, "split": "train", "crop": crops, "count": TOTAL, "classes": list("abcde")}
    manifest = {"tokenizer": entry, "images": images, "dtype": "uint16", "flips": flips, "shard_size": COUNTS[0],
                "statistics": {"usage": [1.0], "perplexity": [9.0]}, "shards": records, **changes}  # fmt: skip
    Manifest(**manifest).write(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokens") / "cache")


def module(folder, global_batch_size=8, **options):
    source = TokenShards(str(folder))
    return LatentDataModule(source, global_batch_size, **{"val": source, **options})


def opened(*args, **options):
    data = module(*args, **options)
    data.setup()
    return data


def views_of(batch):
    """Check that tokens and labels are those of the ids; return which views they are."""
    tokens, ids = batch["tokens"], batch["id"]
    assert tokens.dtype == torch.int64
    views = (tokens[:, 0] - 14_000 - ids * 1000) % CODES // 100
    assert torch.equal(tokens, rows()[ids, views])
    assert torch.equal(batch["label"], ids % 5)
    return views


def epochs(data, count):
    loader = data.train_dataloader()
    return [list(loader) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_id_once_in_an_epoch_in_all_views_over_the_epochs(cache, workers):
    seen = set()
    for epoch, batches in enumerate(epochs(opened(cache, 6, num_workers=workers), 20)):
        assert torch.cat([batch["id"] for batch in batches]).tolist() == shuffled(TOTAL, 0, epoch)[:24].tolist()
        seen |= {pair for batch in batches for pair in zip(batch["id"].tolist(), views_of(batch).tolist(), strict=True)}
    assert {view for _, view in seen} == set(range(10))
    assert len(seen) > 0.75 * 10 * TOTAL  # 20 draws of 10 views each: 88 % are to be expected


def test_evaluation_takes_view_0_in_order(cache):
    data = opened(cache, 4)
    batches = list(data.val_dataloader())
    assert torch.cat([batch["id"] for batch in batches]).tolist() == list(range(TOTAL))
    assert not any(views_of(batch).any() for batch in batches)


@pytest.mark.parametrize(("crops", "flip", "views"), [("ten", False, range(5)), ("center", True, range(2))])
def test_flip_decides_whether_mirrored_views_are_taken(tmp_path, crops, flip, views):
    data = opened(write(tmp_path / "cache", crops), augmentation=Augmentation(flip=flip))
    assert set(torch.cat([views_of(batch) for epoch in epochs(data, 5) for batch in epoch]).tolist()) == set(views)


def test_a_view_is_a_function_of_seed_epoch_and_id_alone(cache):
    def chosen(batch_size, **options):
        found = {}
        for epoch, batches in enumerate(epochs(opened(cache, batch_size, **options), 2)):
            for batch in batches:
                found |= {(epoch, i): v for i, v in zip(batch["id"].tolist(), views_of(batch).tolist(), strict=True)}
        return found

    first, other = chosen(2), chosen(13, num_workers=2)
    assert len(first) == 2 * TOTAL
    assert all(first[key] == value for key, value in other.items())
    assert sum(first[0, i] != first[1, i] for i in range(TOTAL)) > 18
    seeded = chosen(2, seed=1)
    assert sum(seeded[key] != first[key] for key in first) > 36


def test_choices_are_fair():
    ids = np.arange(20_000)
    zeros = np.zeros_like(ids)
    for count in (2, 3, 5, 10):
        shares = np.bincount(choices(count, 0, zeros, ids), minlength=count) / len(ids)
        assert len(shares) == count
        assert np.abs(shares - 1 / count).max() < 0.01
    assert choices(1, 0, zeros, ids).max() == 0


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["id"].tolist(), views_of(batch).tolist()))
        return self.network(batch["tokens"].float().mean().view(1, 1)).mean() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, recorder, *args):
        trainer.save_checkpoint(self.folder / f"{len(recorder.seen):02d}.ckpt")


def fit(data, ckpt_path=None, callbacks=(), **options):
    recorder = Recorder()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, max_epochs=-1, max_steps=7, limit_val_batches=0,
                         callbacks=list(callbacks), **{"devices": 1, **options})  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


def test_a_run_resumed_anywhere_sees_the_very_next_views(cache, tmp_path):
    whole = fit(module(cache, num_workers=2), callbacks=[Save(tmp_path)])
    for path in sorted(tmp_path.iterdir()):
        assert fit(module(cache), ckpt_path=path) == whole[int(path.stem) :], path.name


def fit_on_rank(cache):
    return fit(module(cache), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))


def test_two_ranks_see_the_steps_of_one_in_the_same_views(cache):
    ranks = run_ranks(2, fit_on_rank, cache)
    for (ids, views), *shares in zip(fit(module(cache)), *ranks, strict=True):
        together = [pair for share in shares for pair in zip(*share, strict=True)]
        assert sorted(together) == sorted(zip(ids, views, strict=True))


# --- what is refused


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokens_of_the_network_are_accepted(cache):
    opened(cache).check_tokens(SIZES, None)


@pytest.mark.parametrize(
    ("name", "value"), [("codebook_size", 4096), ("grid", (2, 4)), ("num_prefix", 0), ("sequence_length", 8)]
)
def test_tokens_of_other_sizes_are_refused_by_both_values_and_keys(cache, name, value):
    message = refused(opened(cache).check_tokens, {**SIZES, name: value}, None)
    for words in ("train", str(cache), f"{name} {SIZES[name]}", f"network.{name} is {value}"):
        assert words in message


def test_a_cache_of_another_codebook_is_refused(cache, tiny):
    tokenizer = tiny.discrete()
    message = refused(opened(cache).check_tokens, SIZES, tokenizer)
    for words in ("train", "f" * 16, tokenizer.fingerprint(), "token_cache.yaml"):
        assert words in message


def test_latents_in_place_of_tokens_and_tokens_in_place_of_latents(cache, tmp_path, tiny):
    assert "holds tokens, but this model learns latents" in refused(opened(cache).check_latents, (3, 4, 2), None)
    folder = tiny.cache(tmp_path, tiny.measured(), num_images=16)
    data = LatentDataModule(LatentShards(folder), 4, augmentation=Augmentation(flip=False), val=0.25)
    data.setup()
    assert "holds latents, but this model learns tokens" in refused(data.check_tokens, SIZES, None)
    assert "holds latents, not tokens" in refused(len, TokenShards(folder))


def test_folders_that_are_none(tmp_path):
    message = refused(len, TokenShards(str(tmp_path / "absent")))
    assert "there is no token cache" in message
    assert "token_cache.yaml" in message
    assert "holds no tokens" in refused(len, TokenShards(str(tmp_path)))
    assert "unfinished" in refused(len, TokenShards(str(write(tmp_path / "begun", statistics=None))))
    assert "mirrored" in refused(opened, write(tmp_path / "plain", flips=False))
    folder = write(tmp_path / "altered")
    (folder / shard_name(2, TOKEN_LAYOUT)).write_bytes(b"")
    message = refused(len, TokenShards(str(folder)))
    assert shard_name(2, TOKEN_LAYOUT) in message
    assert f"aligntok repair {folder}" in message
    assert len(TokenShards(str(folder), on_bad_shard="skip")) == TOTAL - 7


def test_a_shard_with_other_views_than_the_manifest_says(tmp_path):
    folder = write(tmp_path / "cache", "center")
    content = json.loads((folder / "manifest.json").read_text())
    content["images"]["crop"] = "ten"
    (folder / "manifest.json").write_text(json.dumps(content))
    assert "is altered: it holds ((7, 2, 10)" in refused(len, TokenShards(str(folder)))
