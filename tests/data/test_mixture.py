"""Mixtures, and orders that are not in memory: functions of (seed, epoch, place)."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from aligntok.data import CaptionedFolder, Digits, LatentDataModule, LatentShards, Mixture, Shapes
from aligntok.data import order as orders
from aligntok.data.loaders import Position, ShuffledSampler
from aligntok.data.mixture import split_holdout
from aligntok.data.order import Permutation, shuffled
from aligntok.errors import UserError
from aligntok.randomness import permuted
from tests.data.test_captions import Captioned, picture
from tests.data.test_datamodule import SIZE, Noise


def take(source, count, position=None, batch=8, rank=0, world=1):
    sampler = ShuffledSampler(len(source), batch, batch // world, rank, world, 0, position, source.keys)
    return list(islice(sampler, count))


def test_shares_are_exact_in_each_turn_and_evenly_spread():
    mixture = Mixture([Noise(10), Noise(50), Noise(7)], [0.2, 0.3, 0.5])
    sources = [int(np.searchsorted([10, 60], index, "right")) for _, index in take(mixture, 64 * 5)]
    whole = len(sources) // 10 * 10
    assert Counter(sources[:whole]) != Counter()
    for weight, number in ((0.2, 0), (0.3, 1), (0.5, 2)):
        seen = np.cumsum([one == number for one in sources[:60]])
        assert np.abs(seen - weight * np.arange(1, 61)).max() <= 1


def test_each_source_goes_through_its_own_order_again_and_again():
    mixture = Mixture([Noise(10), Noise(40)], [1, 1])
    keys = take(mixture, 48)
    own = [key for key in keys if key[1] < 10]
    assert [one for one, _ in own[:20]] == [0] * 10 + [1] * 10
    assert [index for _, index in own[:10]] == shuffled(10, 0, 0).tolist()
    assert [index for _, index in own[10:20]] == shuffled(10, 0, 1).tolist()
    other = [index - 10 for _, index in keys if index >= 10]
    assert other == shuffled(40, 1, 0)[: len(other)].tolist()


def test_an_epoch_goes_on_where_the_last_one_ended():
    mixture = Mixture([Noise(10), Noise(14)], [1, 3])
    keys = take(mixture, 24 * 5)
    assert [key for key in keys if key[1] < 10] == [
        (turn, index) for turn in range(3) for index in shuffled(10, 0, turn).tolist()
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_position_is_all_there_is_on_any_number_of_ranks(world):
    mixture = Mixture([Noise(13), Noise(9), Noise(5)], [3, 1, 1])
    alone = take(mixture, 96)
    shares = [take(mixture, 96 // world, rank=rank, world=world) for rank in range(world)]
    for step in range(12):
        together = [key for keys in shares for key in keys[step * 8 // world : (step + 1) * 8 // world]]
        assert sorted(together) == sorted(alone[8 * step : 8 * step + 8])
    assert take(mixture, 40, Position(1, 8)) == alone[24 + 8 : 24 + 48]


def test_a_mixture_of_one_is_its_source():
    source = Noise(26)
    plain = ShuffledSampler(26, 8, 8, 0, 1, seed=3)
    sampler = ShuffledSampler(26, 8, 8, 0, 1, 3, None, Mixture([source]).keys)
    assert list(islice(sampler, 24)) == list(islice(plain, 24))


def test_items_classes_and_holdout():
    mixture = Mixture([Digits("val"), Digits("train")], [1, 0])
    assert len(mixture) == 1797
    assert mixture[360] == Digits("train")[0]
    assert mixture.classes == [str(i) for i in range(10)]
    assert Mixture([Digits("val"), Shapes(8, 8)]).classes == []
    data = LatentDataModule(mixture, 8, SIZE)
    data.setup()
    assert data.num_images("train") == 360 - 36 + 1437 - 144
    assert all(index < 324 for _, index in islice(data.train_dataloader().sampler, 600))  # weight 0 is never drawn
    (batch, *_) = data.train_dataloader()
    assert batch["label"].shape == (8,)
    assert mixture.fingerprint() != Mixture([Digits("train"), Digits("val")]).fingerprint()


def test_large_files_of_a_mixture_are_decoded_smaller_for_training(tmp_path):
    for i in range(10):
        picture(i).resize((64, 64)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text("x")
    data = LatentDataModule(Mixture([CaptionedFolder(str(tmp_path)), Captioned(["y"] * 20)]), 2, SIZE)
    data.setup()
    assert data.datasets["train"].source[0][0].size == (8, 8)
    assert data.sources["train"][0][0].size == (64, 64)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, -1], "none below 0"),
        ([0, 0], "some above"),
        ([1, float("nan")], "finite"),
        ([1], "1 weights for 2 sources"),
        ([1, 1e-9], "below 1/65536 of the sum"),
    ],
)
def test_weights_that_are_none_are_refused(weights, words):
    with pytest.raises(UserError, match=words):
        Mixture([Noise(3), Noise(4)], weights)
    with pytest.raises(UserError, match="a mixture of no sources"):
        Mixture([])
    with pytest.raises(UserError, match="a mixture of LatentShards"):
        Mixture([LatentShards("runs/latents")])


def test_odd_weights_are_rounded_to_a_long_turn():
    mixture = Mixture([Noise(3), Noise(4), Noise(5)], [1 / 3, 0.141592653, np.pi])
    shares = mixture.counts / mixture.counts.sum()
    assert np.abs(shares - np.array(mixture.weights) / sum(mixture.weights)).max() < 1 / 65536


# --- orders that are not in memory


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4097])
def test_permuted_is_a_permutation_of_any_count(count):
    seen = permuted(np.arange(count), count, 5, 3)
    assert sorted(seen.tolist()) == list(range(count))


def test_permuted_looks_random_and_depends_on_seed_and_epoch():
    count = 100_003
    order = permuted(np.arange(count), count, 0, 0).astype(float)
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    for seed, epoch in ((1, 0), (0, 1), (0, -1)):
        other = permuted(np.arange(count), count, seed, epoch)
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.02
    fixed = int((order == np.arange(count)).sum())
    assert fixed < 8  # of a random permutation: one on average


def test_a_hundred_million_rows_cost_no_memory():
    order = shuffled(10**8, 0, 0)
    assert isinstance(order, Permutation)
    assert len(set(order[:1000].tolist())) == 1000
    assert order[np.array([5, 2])].tolist() == [order[5], order[2]]
    train, val = split_holdout(Noise(10**8), 0.01)
    assert (len(train), len(val)) == (99_000_000, 1_000_000)
    assert not set(train.indices[:1000].tolist()) & set(val.indices[:].tolist())
    assert train.fingerprint() != val.fingerprint()
    assert val[3][1] == val.indices[3] % 2
    data = LatentDataModule(Noise(10**8), 8, SIZE, val=0.01)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["id"].tolist() == order_of(data, 8)
    assert sum(flags.numel() for flags in data.bad_images.values()) < 10**7


def order_of(data, count):
    return Permutation(99_000_000, data.seed, 0)[:count].tolist()


def test_sources_below_the_limit_keep_their_order():
    assert orders.LARGE == 2**24
    expected = torch.randperm(7, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2))
    assert shuffled(7, 3, 2).tolist() == expected.tolist()
