import torch
from torch.testing import assert_close

from aligntok.flow import noise_like_ids

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
