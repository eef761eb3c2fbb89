"""Captions say what is drawn; a scene is a function of its index; held-out pairs are in no other scene."""

import importlib.util

import numpy as np
import pytest
import torch

from aligntok.data import EmojiScenes, EmojiTruth, emoji
from aligntok.data.emoji import GROUNDS, KINDS, LARGE, NOTHING, NUMBERS, OBJECTS, PLACES, Scene
from aligntok.errors import UserError

NAMES = list(OBJECTS)


@pytest.fixture(scope="module")
def scenes():
    return EmojiScenes(num_images=600, kinds=KINDS)


def test_a_scene_is_a_function_of_seed_and_index_alone(scenes):
    again, other = EmojiScenes(num_images=600, kinds=KINDS), EmojiScenes(num_images=600, seed=1, kinds=KINDS)
    for index in (599, 3, 0):
        (image, caption), (image_again, caption_again) = scenes[index], again[index]
        assert (caption, image.tobytes()) == (caption_again, image_again.tobytes())
    assert [scenes[i][1] for i in range(30)] != [other[i][1] for i in range(30)]
    assert scenes[-1][1] == scenes[599][1]
    with pytest.raises(IndexError):
        scenes[600]


def test_kinds_take_turns_and_captions_say_what_is_there(scenes):
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        assert scene.kind == KINDS[index % len(KINDS)]
        there = [name for name in scene.objects if name != NOTHING]
        assert {*there} == {*scene.asked}
        names = [NAMES[each] for each in scene.asked]
        articles = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
        expected = {
            "single": articles[0],
            "ground": f"{articles[0]} on a {list(GROUNDS)[scene.ground]} ground",
            "count": f"{NUMBERS[len(there) - 1]} {names[0] if len(there) == 1 else OBJECTS[names[0]][0]}",
            "two": " and ".join(articles),
            "position": f" {scene.relation} ".join(articles),
            "held_out": " and ".join(articles),
        }
        assert scene.caption == expected[scene.kind]
        assert (scene.objects[0] != NOTHING) == (scene.kind in ("single", "ground"))


def test_each_object_is_drawn_at_its_place_and_nothing_elsewhere(scenes):
    for index in range(60):
        scene, pixels = scenes.scene(index), np.asarray(scenes[index][0]).astype(int)
        ground = np.array(list(GROUNDS.values())[scene.ground])
        changed = (pixels != ground).any(-1)
        for place, (x, y) in enumerate(PLACES[1:], start=1):
            quarter = changed[int(y > 0.5) * 16 :, int(x > 0.5) * 16 :][3:13, 3:13]
            if scene.objects[0] == NOTHING:
                assert quarter.any() == (scene.objects[place] != NOTHING), (index, place)
        assert changed[8:24, 8:24].any()


def test_drawings_differ_and_have_their_size():
    drawn = []
    for number in range(len(OBJECTS)):
        scene = Scene("single", "", (number, *[NOTHING] * 4), 0, (number,))
        picture = np.asarray(emoji.draw(scene, np.zeros((5, 2), int), 64))
        rows, columns = np.nonzero((picture != picture[0, 0]).any(-1))
        assert max(np.ptp(rows), np.ptp(columns)) > 0.6 * LARGE * 64, NAMES[number]
        drawn.append(picture.tobytes())
    assert len({*drawn}) == len(OBJECTS) == 40


def test_held_out_pairs_are_in_no_other_scene(scenes):
    seen, held = emoji.pairs_of_objects()
    assert not {*seen} & {*held}
    assert len(seen) + len(held) == 40 * 39 // 2
    assert {each for pair in held for each in pair} == {*range(40)}  # each object has pairs that are never seen
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        if len(scene.asked) == 2:
            assert (tuple(sorted(scene.asked)) in held) == (scene.kind == "held_out")


def test_what_is_right():
    def agrees(scene, *objects, ground=0):
        return scene.agrees([NAMES.index(name) if name else NOTHING for name in objects], ground)

    fox, pizza = NAMES.index("fox"), NAMES.index("pizza")
    single = Scene("single", "a fox", (fox, *[NOTHING] * 4), 0, (fox,))
    assert agrees(single, "", "", "fox", "pizza", "")
    assert not agrees(single, "pizza", "", "", "", "")
    ground = Scene("ground", "a fox on a white ground", (fox, *[NOTHING] * 4), 0, (fox,))
    assert agrees(ground, "fox", "", "", "", "")
    assert not agrees(ground, "fox", "", "", "", "", ground=1)
    count = Scene("count", "two foxes", (NOTHING, fox, fox, NOTHING, NOTHING), 0, (fox,))
    assert agrees(count, "", "", "fox", "", "fox")
    assert not agrees(count, "", "fox", "fox", "fox", "")
    two = Scene("two", "a fox and a pizza", (NOTHING, fox, pizza, NOTHING, NOTHING), 0, (fox, pizza))
    assert agrees(two, "", "pizza", "", "fox", "")
    assert not agrees(two, "", "fox", "", "", "fox")
    left = Scene("position", "", (NOTHING, fox, pizza, NOTHING, NOTHING), 0, (fox, pizza), "left of")
    assert agrees(left, "", "", "pizza", "fox", "")
    assert not agrees(left, "", "pizza", "", "fox", "")  # above is not left


def test_each_scene_agrees_with_itself(scenes):
    assert all(scene.agrees(scene.objects, scene.ground) for scene in map(scenes.scene, range(len(scenes))))


def test_the_truth_is_that_of_the_pictures(scenes):
    ids = np.array([5, 3, 8])
    batch = EmojiTruth(scenes).batch(ids, np.zeros(3, np.int64))
    assert batch["image"].dtype == torch.uint8
    for row, index in enumerate(ids):
        assert np.array_equal(batch["image"][row].permute(1, 2, 0), scenes[index][0])
        assert batch["objects"][row].tolist() == list(scenes.scene(index).objects)
        assert batch["ground"][row] == scenes.scene(index).ground


def test_bad_arguments_and_a_missing_font(monkeypatch):
    with pytest.raises(UserError, match=r"kinds \['triple'\]: give some of single"):
        EmojiScenes(kinds=["triple"])
    with pytest.raises(UserError, match="num_images"):
        EmojiScenes(num_images=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'aligntok\[offline\]'"):
        EmojiScenes()
