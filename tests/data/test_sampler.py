from itertools import islice

import pytest

from aligntok.data.loaders import InOrderSampler, Position, ShuffledSampler, even_batch_size
from aligntok.data.order import shuffled
from aligntok.errors import UserError


def sampler(num_images=26, global_batch=8, rank=0, world=1, accumulation=1, seed=0, position=None):
    return ShuffledSampler(
        num_images, global_batch, global_batch // world // accumulation, rank, world, seed, position or Position()
    )


def take(count, **options):
    return list(islice(sampler(**options), count))


def test_epochs_are_permutations_without_the_rest_that_fills_no_step():
    keys = take(48)
    for epoch in (0, 1):
        indices = [index for e, index in keys[24 * epoch : 24 * (epoch + 1)] if e == epoch]
        assert len(set(indices)) == 24
        assert set(indices) <= set(range(26))
        assert indices == shuffled(26, 0, epoch)[:24].tolist()
    assert [i for _, i in keys[:24]] != [i for _, i in keys[24:]]
    assert take(24, seed=1) != keys[:24]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 1), (1, 2), (2, 2), (2, 4), (8, 1)])
def test_steps_are_the_same_sets_on_any_number_of_ranks_and_accumulated_batches(world, accumulation):
    alone = take(80)
    ranks = [take(80 // world, rank=rank, world=world, accumulation=accumulation) for rank in range(world)]
    share = 8 // world
    for step in range(10):
        together = [key for keys in ranks for key in keys[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(alone[8 * step : 8 * (step + 1)])
        assert len(set(together)) == 8


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_position_is_enough_to_go_on(world, accumulation):
    batch = 8 // world // accumulation
    for rank in range(world):
        options = {"rank": rank, "world": world, "accumulation": accumulation}
        whole = take(80 // world, **options)
        position = Position()
        counting = sampler(position=position, **options)
        for taken in range(batch, len(whole), batch):
            counting.advance()
            copy = Position(position.epoch, position.image)
            assert take(batch, position=copy, **options) == whole[taken : taken + batch]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_another_batch_size_goes_on_at_the_same_image_and_keeps_count(world, accumulation):
    """Steps of 8 up to image 16 of 50, then steps of 12 on other ranks."""
    order = [(epoch, int(index)) for epoch in (0, 1) for index in shuffled(50, 0, epoch)[:48]]
    position = Position(0, 16)
    batch = 12 // world // accumulation
    seen = []
    for step in range(4):
        ranks = [
            take(
                batch,
                num_images=50,
                global_batch=12,
                rank=rank,
                world=world,
                accumulation=accumulation,
                position=Position(position.epoch, position.image),
            )
            for rank in range(world)
        ]
        keys = {key for keys in ranks for key in keys}
        assert len(keys) == batch * world
        seen.append(keys)
        sampler(50, 12, world=world, accumulation=accumulation, position=position).advance()
        if step == 0:
            assert keys == set(order[16 : 16 + batch * world])
    assert len(set.union(*seen)) == 4 * batch * world  # counting and order agree: nothing comes twice


def test_position_beyond_a_smaller_set_is_the_next_epoch():
    assert take(8, position=Position(3, 500)) == [(4, int(i)) for i in shuffled(26, 0, 4)[:8]]


def test_length_is_that_of_an_epoch_of_whole_steps():
    assert len(sampler(26, 8)) == 24
    assert len(sampler(26, 8, world=2, accumulation=2)) == 12


@pytest.mark.parametrize("count", [1, 2, 7, 9, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_in_order_each_once(count, world):
    shares = [list(InOrderSampler(range(count), rank, world)) for rank in range(world)]
    assert [len(InOrderSampler(range(count), rank, world)) for rank in range(world)] == [len(s) for s in shares]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert all(share == sorted(share) for share in shares)


def test_all_ranks_get_equally_many_batches():
    for count in range(1, 70):
        for world in range(1, min(count, 9) + 1):
            for batch in range(1, 12):
                size = even_batch_size(count, world, batch)
                shares = [len(range(rank, count, world)) for rank in range(world)]
                assert len({-(-share // size) for share in shares}) == 1
                assert size == batch or count % world
    assert even_batch_size(50_000, 64, 32) == 32
    assert even_batch_size(9, 2, 4) == 3


def test_fewer_images_than_ranks_are_refused_on_every_rank():
    with pytest.raises(UserError, match="3 images are too few for 4 devices"):
        even_batch_size(3, 4, 8)
