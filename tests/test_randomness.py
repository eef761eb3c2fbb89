import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aligntok.randomness import (
    choices,
    gumbel_noise,
    hashed,
    image_generator,
    keys_like_ids,
    noise_like_ids,
    normal,
    philox,
    uniform,
)

SHAPE = (4, 8, 8)


def test_a_row_depends_on_its_id_alone():
    ids = torch.arange(64)
    noise = noise_like_ids(ids, SHAPE, seed=3)
    assert noise.shape == (64, *SHAPE)
    assert noise.dtype == torch.float32
    assert torch.equal(torch.cat([noise_like_ids(part, SHAPE, 3) for part in ids.split(7)]), noise)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise_like_ids(ids[order], SHAPE, 3), noise[order])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(noise_like_ids(ids, SHAPE, seed=3), noise)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_stays_the_same_between_versions():
    """Images of an old run are drawn again only while this holds."""
    noise = noise_like_ids(torch.tensor([4711]), (4,), seed=0)[0]
    assert_close(noise, torch.tensor([-0.284517, -0.082872, -2.050509, -1.145478]))


def test_seeds_and_large_numbers_are_all_different():
    ids = torch.tensor([0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**62, -1])
    rows = torch.cat([noise_like_ids(ids, SHAPE, seed).flatten(1) for seed in (0, 1, 2, 2**32, 2**63 + 5, -1)])
    assert len(rows.unique(dim=0)) == len(rows) == 6 * 8
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5


def test_it_is_standard_normal():
    noise = noise_like_ids(torch.arange(2000), SHAPE, seed=0)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(noise.pow(4).mean() - 3) < 0.05
    per_place = noise.flatten(1)
    assert per_place.mean(0).abs().max() < 6 / 2000**0.5  # over ids, at each place
    assert per_place.mean(1).abs().max() < 6 / 256**0.5  # over places, of each id
    neighbours = (per_place[1:] * per_place[:-1]).mean(1)
    assert neighbours.abs().max() < 6 / 256**0.5


def test_no_ids_give_no_noise():
    assert noise_like_ids(torch.empty(0, dtype=torch.long), SHAPE, 0).shape == (0, *SHAPE)


def test_gumbel_noise_depends_on_seed_id_and_step_alone():
    ids = torch.arange(64)
    keys = keys_like_ids(ids, seed=3)
    noise = gumbel_noise(keys, step=2, count=101)
    assert noise.shape == (64, 101)
    assert noise.dtype == torch.float32
    assert torch.equal(torch.cat([gumbel_noise(keys_like_ids(part, 3), 2, 101) for part in ids.split(7)]), noise)
    others = [gumbel_noise(keys_like_ids(ids, 4), 2, 101), gumbel_noise(keys, 3, 101)]
    rows = torch.cat([noise, *others])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / 101**0.5
    assert keys_like_ids(torch.empty(0, dtype=torch.long), 0).shape == (0, 2)


def test_gumbel_noise_stays_the_same_between_versions():
    """Token sequences of an old run are drawn again only while this holds."""
    noise = gumbel_noise(keys_like_ids(torch.tensor([4711]), seed=0), step=1, count=5)[0]
    assert_close(noise, torch.tensor([1.165133, 0.536556, 1.009001, 0.334791, 2.252705]), atol=1e-5, rtol=0)


def test_it_is_gumbel_distributed():
    noise = gumbel_noise(keys_like_ids(torch.arange(300), seed=0), step=7, count=1000)
    assert noise.isfinite().all()
    uniform = (-(-noise.double()).exp()).exp().flatten().sort().values
    gap = (uniform - torch.arange(1, len(uniform) + 1) / len(uniform)).abs().max()
    assert gap < 1.63 / len(uniform) ** 0.5  # Kolmogorov-Smirnov at 1 percent
    assert (noise.mean(0) - 0.5772).abs().max() < 6 * 1.2825 / 300**0.5


FULL = 0xFFFFFFFF


@pytest.mark.parametrize("convert", [torch.tensor, np.array, int])
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0), (0,), (0x257A3673, 0xCD26BE2A)),
        ((FULL, FULL), (FULL,), (0xAB302C4D, 0x3DC9D239)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E,), (0xBEDBBE6B, 0xE4C770B3)),
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((FULL,) * 4, (FULL, FULL), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words, convert):
    """Of the authors' library Random123, 7 rounds; the same for tensors, arrays and whole numbers."""
    counter = [convert([word]) if convert is not int else word for word in counter]
    assert tuple(int(word if convert is int else word[0]) for word in philox(counter, key)) == words


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("shape", [(), (5,), (4, 8, 8)])
def test_numbers_of_an_image_do_not_depend_on_its_batch(draw, shape):
    ids = torch.tensor([0, 5, 2**31, 2**32, 2**40 + 1, -1, 7, 8])
    values = draw(ids, 3, 20, "noise", shape)
    assert values.shape == (8, *shape)
    assert values.dtype == torch.float32
    assert torch.equal(torch.cat([draw(part, 3, 20, "noise", shape) for part in ids.split(3)]), values)
    assert torch.equal(draw(ids.flip(0), 3, 20, "noise", shape), values.flip(0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(draw(ids, 3, 20, "noise", shape), values)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(ids[:0], 3, 20, "noise", shape).shape == (0, *shape)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_seed_step_stream_and_id_each_give_independent_numbers(draw):
    keys = [
        (seed, step, stream) for seed in (0, 1, 2**32, -1) for step in (0, 1, 10**6) for stream in ("noise", "time")
    ]
    rows = torch.cat([draw(torch.tensor([0, 1, 2**32]), *key, (4096,)) for key in keys])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5.5 / 4096**0.5
    shifted = torch.corrcoef(torch.cat([rows[:, 1:], rows[:, :-1]]))  # also not the same numbers elsewhere in the row
    assert (shifted - torch.eye(len(shifted))).abs().max() < 5.5 / 4096**0.5


def test_uniform_numbers_are_uniform():
    values = uniform(torch.arange(3000), 0, 7, "time", (101,))
    assert values.min() >= 0
    assert values.max() < 1
    for column in (values.flatten(), values[:, 0], values[0]):  # over all, over ids, over the numbers of one id
        counts = torch.histc(column, 20, 0, 1)
        assert ((counts - len(column) / 20) ** 2 / (len(column) / 20)).sum() < 43.8  # chi-square, 19 degrees, 0.1 %
    assert abs(values.double().mean() - 1 / 2) < 5 / (12 * values.numel()) ** 0.5


def test_normal_numbers_are_normal():
    values = normal(torch.arange(2000), 0, 7, "noise", (4, 8, 8)).flatten(1)
    count = values.numel()
    assert values.isfinite().all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(values.double().pow(power).mean() - moment) < 5 * (variance / count) ** 0.5
    assert values.mean(0).abs().max() < 5 / 2000**0.5  # over ids, at each place
    assert values.mean(1).abs().max() < 5 / 256**0.5  # over places, of each id
    levels = torch.linspace(0.05, 0.95, 19)
    edges = 2**0.5 * torch.erfinv(2 * levels - 1)
    counts = torch.bincount(torch.bucketize(values.flatten(), edges), minlength=20)
    assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 43.8  # chi-square, 19 degrees, 0.1 %
    pairs = values.view(2000, 4, 64)
    assert abs((pairs[:, 0] * pairs[:, 2]).mean()) < 5 / (2000 * 64) ** 0.5  # the two of one Box-Muller pair
    assert abs((pairs[:, 0].square() * pairs[:, 2].square()).mean() - 1) < 5 * (8 / (2000 * 64)) ** 0.5


def test_numbers_stay_the_same_between_versions():
    """A run that is resumed with a later version goes on as it would have."""
    ids = torch.tensor([4711])
    assert_close(normal(ids, 0, 1, "noise", (3,))[0], torch.tensor([-0.711416, 0.718786, 0.049112]), atol=1e-5, rtol=0)
    assert_close(uniform(ids, 0, 1, "time", (3,))[0], torch.tensor([0.712138, 0.421521, 0.381411]), atol=1e-5, rtol=0)
    assert choices(10, 0, np.array([3] * 12), np.arange(12)).tolist() == [2, 2, 3, 0, 5, 0, 1, 6, 9, 3, 2, 8]
    assert image_generator(0, 1, 4711).integers(100, size=5).tolist() == [82, 7, 79, 22, 94]


def test_an_image_is_augmented_by_seed_epoch_and_id():
    keys = [(seed, epoch, id) for seed in (0, 1, -1, 2**40) for epoch in (0, 1, 2**33) for id in (0, 1, 2**33)]
    rows = np.array([image_generator(*key).random(2000) for key in keys])
    assert np.array_equal(rows[5], image_generator(*keys[5]).random(2000))
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 5.5 / 2000**0.5


def test_the_smallest_hashes_are_a_uniform_choice():
    ids = torch.arange(20_000)
    numbers = hashed(ids)
    assert numbers.min() >= 0
    assert len(numbers.unique()) == len(ids)
    assert torch.equal(hashed(ids.flip(0)), numbers.flip(0))
    chosen = numbers.argsort()[:5000].sort().values.double()
    gap = ((chosen + 0.5) / len(ids) - (torch.arange(5000).double() + 0.5) / 5000).abs().max()
    assert gap < 1.63 / 5000**0.5  # Kolmogorov-Smirnov at 1 percent
    assert abs((chosen % 2).mean() - 1 / 2) < 3 * 0.5 / 5000**0.5
