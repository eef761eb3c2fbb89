import pytest
import torch
from torch.testing import assert_close

from aligntok.flow import noise_like_ids
from aligntok.flow.noise import gumbel_noise, keys_like_ids, philox

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


@pytest.mark.parametrize(
    ("left", "right", "key", "words"),
    [
        (0, 0, 0, (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_philox_gives_the_known_answers(left, right, key, words):
    """Of the authors' library Random123, 7 rounds."""
    assert tuple(word.item() for word in philox(*map(torch.tensor, (left, right, key)))) == words


def test_it_is_gumbel_distributed():
    noise = gumbel_noise(keys_like_ids(torch.arange(300), seed=0), step=7, count=1000)
    assert noise.isfinite().all()
    uniform = (-(-noise.double()).exp()).exp().flatten().sort().values
    gap = (uniform - torch.arange(1, len(uniform) + 1) / len(uniform)).abs().max()
    assert gap < 1.63 / len(uniform) ** 0.5  # Kolmogorov-Smirnov at 1 percent
    assert (noise.mean(0) - 0.5772).abs().max() < 6 * 1.2825 / 300**0.5
