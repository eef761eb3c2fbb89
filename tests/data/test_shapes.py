import pickle

import numpy as np
import pytest
from PIL import Image

from aligntok.data.shapes import FIGURES, Shapes
from aligntok.errors import UserError
from tests.ranks import run_ranks


def pixels(data, index):
    return np.asarray(data[index][0])


def test_image_and_label():
    image, label = Shapes()[13]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert type(label) is int
    assert label == 1


def test_classes_are_in_the_agreed_order():
    names = "circle square triangle star plus ring heart crescent hexagon arrow L T"
    assert Shapes().classes == names.split()


def test_labels_are_balanced():
    data = Shapes(num_images=36)
    assert np.bincount([data[index][1] for index in range(len(data))]).tolist() == [3] * 12


def test_length_bounds_iteration():
    data = Shapes(num_images=5, image_size=8)
    assert len(data) == 5
    assert len(list(data)) == 5
    assert np.array_equal(pixels(data, -1), pixels(data, 4))
    with pytest.raises(IndexError):
        data[5]


def test_image_does_not_depend_on_order_or_length_or_copy():
    forward, backward = Shapes(num_images=10), Shapes(num_images=20)
    first = [pixels(forward, index) for index in range(10)]
    last = [pixels(backward, index) for index in reversed(range(10))][::-1]
    assert np.array_equal(first, last)
    assert np.array_equal(first[3], pixels(pickle.loads(pickle.dumps(forward)), 3))


def test_another_process_draws_the_same_image():
    (theirs,) = run_ranks(1, pixels, Shapes(seed=4), 7)
    assert np.array_equal(theirs, pixels(Shapes(seed=4), 7))


def test_seed_and_index_change_the_image():
    images = [pixels(Shapes(seed=seed), index) for seed in (0, 12) for index in (0, 12)]
    for i in range(4):
        for j in range(i):
            assert not np.array_equal(images[i], images[j])


def test_every_size_shows_the_same_scene():
    for index in range(12):
        small = Shapes(image_size=32, seed=2)[index][0]
        large = Shapes(image_size=128, seed=2)[index][0].resize((32, 32), Image.Resampling.BOX)
        difference = np.asarray(small, dtype=float) - np.asarray(large, dtype=float)
        # noise has a standard deviation of at most 0.06 * 255 = 15; two different scenes are about 80 apart
        assert np.sqrt((difference**2).mean()) < 25


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (24, 56)])
def test_figure_is_undistorted_and_inside_the_image(monkeypatch, size):
    height, width = size
    grids = []
    monkeypatch.setitem(FIGURES, "circle", lambda x, y: grids.append(x + 1j * y) or abs(x + 1j * y) - 1)
    for index in range(0, 600, 12):
        assert Shapes(image_size=size)[index][0].size == (width, height)
    radii = []
    for grid in grids:  # where each pixel lies in the plane of the unit circle
        down, right = grid[1, 0] - grid[0, 0], grid[0, 1] - grid[0, 0]
        assert down == pytest.approx(1j * right, abs=1e-5)  # turned and scaled, nothing else
        radius = 1 / abs(right)
        centre = -grid[0, 0] / right  # column + i row, as the grid is turned by the phase of ``right``
        assert radius - 0.51 <= centre.real <= width - 0.49 - radius
        assert radius - 0.51 <= centre.imag <= height - 0.49 - radius
        radii.append(2 * radius / min(size))
    assert 0.35 <= min(radii) < 0.42
    assert 0.68 < max(radii) <= 0.7501


def figure_mask(name, points=401):
    grid = np.linspace(-1.1, 1.1, points, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    return x, y, FIGURES[name](x, y)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_a_distance_that_fills_the_unit_circle(name):
    x, y, distance = figure_mask(name)
    assert distance.dtype == np.float32
    assert np.hypot(x, y)[distance < 0].max() == pytest.approx(1, abs=0.02)
    step = x[0, 1] - x[0, 0]
    slope = np.hypot(*np.gradient(distance, step))[abs(distance) < 0.02]
    assert np.median(slope) == pytest.approx(1, abs=0.01)  # else edges would be blurred or jagged
    assert slope.max() < 1.1


# areas in closed form, from the radius of the circumscribed circle
@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", np.pi),
        ("square", 2),
        ("triangle", 3 * np.sqrt(3) / 4),
        ("hexagon", 3 * np.sqrt(3) / 2),
        ("ring", np.pi * (1 - 0.56**2)),
        ("star", 10 * 0.5 * 0.42 * np.sin(np.pi / 5)),
    ],
)
def test_figure_has_the_area_of_its_shape(name, area):
    x, _, distance = figure_mask(name)
    assert (distance < 0).sum() * (x[0, 1] - x[0, 0]) ** 2 == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize(
    ("name", "fold"), [("triangle", 3), ("square", 4), ("plus", 4), ("star", 5), ("hexagon", 6), ("ring", 7)]
)
def test_figure_has_the_symmetry_of_its_shape(name, fold):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 500))
    angle = 2 * np.pi / fold
    turned = FIGURES[name](np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y)
    assert np.allclose(FIGURES[name](x, y), turned, atol=1e-6)


def test_pooled_colours_do_not_tell_the_class():
    data = Shapes(num_images=2400, image_size=16)
    images = np.stack([pixels(data, index) for index in range(len(data))]) / 255
    labels = np.arange(len(data)) % 12
    features = np.concatenate([images.mean((1, 2)), images.std((1, 2)), np.ones((len(data), 1))], axis=1)
    train, test = slice(0, 1800), slice(1800, None)
    weights = np.linalg.lstsq(features[train], np.eye(12)[labels[train]], rcond=None)[0]
    accuracy = ((features[test] @ weights).argmax(1) == labels[test]).mean()
    assert accuracy < 0.2  # chance is 1/12; the area of the figure gives away a little


def test_repr_names_all_that_determines_the_data():
    data = Shapes(num_images=24, image_size=(16, 8), seed=3)
    assert repr(data) == "Shapes(num_images=24, image_size=(16, 8), seed=3)"
    assert repr(Shapes(image_size=16)) == repr(Shapes(image_size=(16, 16)))


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"image_size": 4}, {"image_size": (32, 4)}, {"seed": -1}])
def test_wrong_argument_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Shapes(**wrong)


def test_plain_scenes_hold_two_colours_and_the_figure():
    for index in range(12):
        image = pixels(Shapes(plain=True, image_size=64), index)
        _, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        assert np.sort(counts)[-2:].sum() > 0.85 * 64 * 64  # the rest is the figure's antialiased edge
