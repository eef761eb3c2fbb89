import os
import random
import socket

import numpy as np
import pytest
from PIL import Image

from aligntok.data.images import center_crop, random_crop, random_flip, random_resized_crop, read_image, to_rgb
from aligntok.errors import UserError

RED, GREEN, BLUE, YELLOW, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)


def array(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def quadrants(height=32, width=48):
    """Red, green over blue, yellow."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = YELLOW
    return Image.fromarray(pixels)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coordinates(height, width):
    """An image whose red is the column and whose green is the row, in 0..250."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 250 / (width - 1), y * 250 / (height - 1), 0 * x], -1).round().astype(np.uint8)
    )


def assert_quadrants(pixels, colours, tolerance=0):
    height, width = pixels.shape[:2]
    seen = [pixels[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert np.abs(np.array(seen, int) - np.array(colours)).max() <= tolerance, seen


# --- reading


def test_rgb_is_read_as_it_is(tmp_path):
    noise(9, 7).save(tmp_path / "a.png")
    assert np.array_equal(array(read_image(tmp_path / "a.png")), array(noise(9, 7)))
    assert np.array_equal(array(read_image(str(tmp_path / "a.png"))), array(noise(9, 7)))


def test_grey_and_bilevel(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "grey.png")
    assert array(read_image(tmp_path / "grey.png"))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert array(read_image(tmp_path / "bit.png"))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)).save(path)
    assert array(read_image(path))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_big_endian_16_bits():
    image = Image.frombytes("I;16B", (2, 1), bytes([0x12, 0x34, 0xFF, 0x00]))
    assert array(to_rgb(image))[0, :, 0].tolist() == [0x12, 0xFF]


def test_transparent_grey_of_16_bits_becomes_white(tmp_path):
    Image.fromarray(np.array([[300, 301]], np.uint16)).save(tmp_path / "a.png", transparency=300)
    assert array(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [1] * 3]


@pytest.mark.parametrize("pixels", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pixels_without_a_scale_are_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*scale"):
        read_image(tmp_path / "a.tif")


def test_cmyk(tmp_path):
    colours = quadrants().convert("CMYK")
    assert colours.getpixel((0, 0)) == (0, 255, 255, 0)
    for name in ("a.tif", "a.jpg"):
        colours.save(tmp_path / name)
        assert_quadrants(array(read_image(tmp_path / name)), [RED, GREEN, BLUE, YELLOW], tolerance=4)


def test_palette(tmp_path):
    quadrants().quantize(4).save(tmp_path / "a.gif")
    assert_quadrants(array(read_image(tmp_path / "a.gif")), [RED, GREEN, BLUE, YELLOW])


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency_is_composited_on_white(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=transparency)
    half_blue = [127, 127, 255] if isinstance(transparency, bytes) else [0, 0, 255]
    assert array(read_image(tmp_path / "a.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255], half_blue]


def test_alpha_is_composited_on_white(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)).save(tmp_path / "a.png")
    assert array(read_image(tmp_path / "a.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255], [204] * 3]
    Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8)).save(tmp_path / "b.png")
    assert array(read_image(tmp_path / "b.png"))[0].tolist() == [[0] * 3, [255] * 3]
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "c.png", transparency=GREEN)
    assert array(read_image(tmp_path / "c.png"))[0].tolist() == [[255] * 3]


# the camera was turned: where the stored quadrants red, green / blue, yellow belong (TIFF 6.0, tag 274)
ORIENTATIONS = {
    1: [RED, GREEN, BLUE, YELLOW],
    2: [GREEN, RED, YELLOW, BLUE],
    3: [YELLOW, BLUE, GREEN, RED],
    4: [BLUE, YELLOW, RED, GREEN],
    5: [RED, BLUE, GREEN, YELLOW],
    6: [BLUE, RED, YELLOW, GREEN],
    7: [YELLOW, GREEN, BLUE, RED],
    8: [GREEN, YELLOW, RED, BLUE],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    quadrants(32, 48).save(path, exif=exif)
    image = read_image(path)
    assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    assert_quadrants(array(image), ORIENTATIONS[orientation], tolerance=4)


def test_orientation_holds_for_a_reduced_decode_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    quadrants(320, 480).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg", min_size=32)
    assert image.size == (40, 60)
    assert_quadrants(array(image), ORIENTATIONS[6], tolerance=4)


@pytest.mark.parametrize(("min_size", "side"), [(None, 640), (641, 640), (321, 640), (320, 320), (161, 320), (80, 80)])
def test_reduced_decode_keeps_the_shorter_side(tmp_path, min_size, side):
    quadrants(640, 960).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg", min_size=min_size)
    assert image.size == (side * 3 // 2, side)
    assert_quadrants(array(image), [RED, GREEN, BLUE, YELLOW], tolerance=4)
    quadrants(960, 640).save(tmp_path / "b.jpg")
    assert read_image(tmp_path / "b.jpg", min_size=min_size).size == (side, side * 3 // 2)


def test_only_jpeg_is_reduced(tmp_path):
    noise(64, 64).save(tmp_path / "a.png")
    assert np.array_equal(array(read_image(tmp_path / "a.png", min_size=8)), array(noise(64, 64)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_truncated_file_is_named(tmp_path, suffix, part):
    path = tmp_path / f"broken.{suffix}"
    noise(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match=rf"broken\.{suffix}"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"label,path\n", "the file is no image"), (b"\xff\xd8\xff\xe0" + bytes(99), "")],
)
def test_file_without_image_is_named(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jpg: {reason}"):
        read_image(tmp_path / "a.jpg")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match=tmp_path.name):
        read_image(tmp_path)


# --- crops


def adm_crop(image, size):
    """ADM's square crop, straight from its description."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    factor = size / min(width, height)
    width, height = round(width * factor), round(height * factor)
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (64, 64, 64),
        (64, 64, 32),
        (37, 91, 16),
        (91, 37, 16),
        (333, 500, 64),
        (20, 31, 32),
        (129, 257, 64),
        (127, 128, 64),
    ],
)
def test_center_crop_is_the_crop_of_adm(height, width, size):
    image = noise(height, width)
    assert np.array_equal(array(center_crop(image, (size, size))), adm_crop(image, size))


def test_center_crop_halves_by_means_of_four():
    image = noise(64, 96)
    means = array(image).reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(array(center_crop(image, (32, 32))) - means[:, 8:40]).max() <= 1  # rounded per axis


def test_center_crop_takes_the_middle():
    image = noise(8, 13)
    assert np.array_equal(array(center_crop(image, (8, 8))), array(image)[:, 2:10])  # (13 - 8) // 2
    assert np.array_equal(array(center_crop(image, (8, 13))), array(image))


@pytest.mark.parametrize("source", [(5, 7), (20, 30), (24, 16), (100, 17), (300, 451)])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 40)])
def test_crops_have_the_size_asked_for(source, size):
    image = noise(*source)
    for seed in range(3):
        generator = np.random.default_rng(seed)
        for crop in (
            center_crop(image, size),
            random_crop(image, size, generator),
            random_resized_crop(image, size, generator),
        ):
            assert array(crop).shape == (*size, 3)


def test_not_square_crop_keeps_the_proportions():
    disc = np.hypot(*(np.mgrid[:200, :200] - 99.5)) < 40
    crop = array(center_crop(Image.fromarray((disc * 255).astype(np.uint8)), (50, 100)))[..., 0] > 127
    assert crop.any(0).sum() == crop.any(1).sum() == 40


def test_crops_convert_palettes_before_they_resize():
    smooth = array(center_crop(noise(64, 64).quantize(16), (16, 16)))
    assert len(np.unique(smooth.reshape(-1, 3), axis=0)) > 16


def test_random_crop_is_a_window_of_the_scaled_image():
    image = coordinates(20, 50)
    lefts = set()
    for seed in range(60):
        crop = array(random_crop(image, (20, 20), np.random.default_rng(seed)))
        left = round(int(crop[0, 0, 0]) * 49 / 250)
        assert np.array_equal(crop, array(image)[:, left : left + 20])
        lefts.add(left)
    assert min(lefts) < 4
    assert max(lefts) > 26  # of 0..30


def test_same_seed_same_crop():
    image = noise(60, 80)
    for transform in (
        lambda generator: random_crop(image, (16, 16), generator),
        lambda generator: random_resized_crop(image, (16, 16), generator),
        lambda generator: random_flip(image, generator),
    ):
        results = [array(transform(np.random.default_rng(seed))) for seed in (0, 0, 1, 2, 3, 4)]
        assert np.array_equal(results[0], results[1])
        assert any(not np.array_equal(results[0], other) for other in results[2:])


def test_crops_leave_the_global_generator_alone():
    random.seed(0)
    before = random.getstate()
    random_resized_crop(noise(20, 20), (8, 8), np.random.default_rng(0))
    assert random.getstate() == before


def crop_box(height, width, seed, **arguments):
    """(width, height) as parts of the image, read off the coordinates at the centres of the first and last pixels."""
    crop = array(
        random_resized_crop(coordinates(height, width), (64, 64), np.random.default_rng(seed), **arguments)
    ).astype(float)
    return np.array([crop[32, 60, 0] - crop[32, 3, 0], crop[60, 32, 1] - crop[3, 32, 1]]) / 250 * 64 / 57


def test_random_resized_crop_samples_area_and_ratio():
    boxes = np.array([crop_box(256, 256, seed, scale=(0.1, 0.5), ratio=(0.5, 2.0)) for seed in range(200)])
    area, ratio = boxes.prod(1), boxes[:, 0] / boxes[:, 1]
    assert area.min() > 0.09
    assert area.max() < 0.51
    assert area.mean() == pytest.approx(0.3, abs=0.03)  # uniform
    assert ratio.min() > 0.45
    assert ratio.max() < 2.1
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.1)  # uniform in the logarithm
    assert np.log(ratio).std() == pytest.approx(2 * np.log(2) / np.sqrt(12), abs=0.05)


def test_random_resized_crop_of_a_strip_keeps_to_the_ratio():
    width, height = crop_box(20, 200, 0, scale=(1.0, 1.0))
    assert height == pytest.approx(1, abs=0.1)
    assert width * 200 == pytest.approx(20 * 4 / 3, abs=2)


def test_random_resized_crop_of_everything_is_a_resize():
    image = noise(40, 40)
    crop = random_resized_crop(image, (30, 20), np.random.default_rng(0), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert np.array_equal(array(crop), array(image.resize((20, 30), Image.Resampling.BICUBIC)))


def test_random_flip_mirrors_half_of_the_images():
    image = noise(6, 9)
    generator = np.random.default_rng(0)
    flips = 0
    for _ in range(400):
        flipped = array(random_flip(image, generator))
        mirrored = np.array_equal(flipped, array(image)[:, ::-1])
        assert mirrored or np.array_equal(flipped, array(image))
        flips += mirrored
    assert 160 < flips < 240


# --- what is no image, or more than one


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "itself", "nowhere"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # addresses of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("a.png")
    else:
        path.symlink_to({"device": "/dev/zero", "itself": path.name, "nowhere": "gone"}[kind])
    with pytest.raises(UserError, match=r"cannot read image .*a\.png: (it is no file|No such file|Too many levels)"):
        read_image(path)


def test_no_program_runs_for_an_image(tmp_path, monkeypatch):
    """An EPS would be handed to Ghostscript, whatever it is called."""
    trace = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    noise(8, 8).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: the file is no image of a format that is read \(JPEG, PNG"):
        read_image(tmp_path / "a.png")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a\nb.png", "\udcff.png", "tab\t.png"])
def test_any_name_is_told_in_a_line_that_can_be_printed(tmp_path, name):
    (tmp_path / os.fsencode(name).decode(errors="surrogateescape")).write_bytes(b"")
    with pytest.raises(UserError, match="the file is empty") as caught:
        read_image(tmp_path / name)
    assert str(caught.value).encode().decode().isprintable()


def test_a_bomb_is_refused_and_the_first_of_several_frames_is_read(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png: .*decompression bomb"):
        read_image(tmp_path / "bomb.png")
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    for suffix in ("gif", "png", "tif", "webp"):
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
        assert_quadrants(array(read_image(tmp_path / f"a.{suffix}")), [RED] * 4, tolerance=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_images_of_any_shape_are_cropped(tmp_path, size):
    Image.new("RGB", size, GREEN).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    for crop in (center_crop, lambda *args: random_crop(*args, np.random.default_rng(0))):
        assert_quadrants(array(crop(image, (16, 16))), [GREEN] * 4)
