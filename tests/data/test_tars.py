"""Tar shards: the index against Python's tarfile, odd names, broken ones, and resume of a real Trainer."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image

from aligntok.data import CaptionedTars, LatentDataModule, Mixture
from aligntok.data.dataset import ImageDataset
from aligntok.data.tar_index import members_of
from aligntok.errors import UserError
from tests.data.test_captions import Captioned, CaptionRecorder, picture
from tests.data.test_datamodule import SIZE, trainer
from tests.ranks import run_ranks


def encoded(seed, kind="JPEG"):
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT, mtime=0):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(data), mtime
            tar.addfile(about, io.BytesIO(data))
    return path


def shard(path, numbers, caption="caption {}", **options):
    """Write a tar as img2dataset does."""
    members = []
    for i in numbers:
        members += [(f"{i:09d}.jpg", encoded(i)), (f"{i:09d}.txt", caption.format(i).encode())]
        members += [(f"{i:09d}.json", json.dumps({"caption": f"json {i}", "alts": ["x", "y"]}).encode())]
    return write_tar(path, members, **options)


LONG = "folder/" * 30 + "name" * 20
NAMES = {
    "plain": (["a.jpg", "a.txt"], tarfile.USTAR_FORMAT),
    "pax": ([f"{LONG}.jpg", f"{LONG}.txt"], tarfile.PAX_FORMAT),
    "gnu": ([f"{LONG}.jpg", f"{LONG}.txt"], tarfile.GNU_FORMAT),
    "prefix": (["p" * 90 + "/" + "n" * 80 + ".jpg", "p" * 90 + "/" + "n" * 80 + ".txt"], tarfile.USTAR_FORMAT),
    "unicode": (["Füchse/狐.png", "Füchse/狐.txt"], tarfile.PAX_FORMAT),
    "unicode_gnu": (["Füchse/狐.png", "Füchse/狐.txt"], tarfile.GNU_FORMAT),
    "dots": (["v1.2/a.b.jpg", "v1.2/a.b.txt", "v1.2/a.b.long.txt"], tarfile.PAX_FORMAT),
    "upper": (["A.JPEG", "A.TXT"], tarfile.PAX_FORMAT),
    "apart": (["a.jpg", "b.jpg", "b.txt", "a.txt"], tarfile.PAX_FORMAT),
    "hidden": (["._a.jpg", "a.jpg", "a.txt", ".hidden.jpg"], tarfile.PAX_FORMAT),
    "twice": (["a.jpg", "a.txt", "a.txt", "a.jpg"], tarfile.PAX_FORMAT),
    "orphan": (["readme", "only.txt", "a.webp", "a.txt"], tarfile.GNU_FORMAT),
    "spaces": ([" a b\n.jpg", " a b\n.txt"], tarfile.PAX_FORMAT),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """13 tars with odd names, folders and links among the members, and what tarfile reads of them."""
    root = tmp_path_factory.mktemp("odd")
    for number, (kind, (names, form)) in enumerate(NAMES.items()):
        with tarfile.open(root / f"{number:02d}_{kind}.tar", "w", format=form) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for i, name in enumerate(names):
                about = tarfile.TarInfo(name)
                suffix = name.rpartition(".")[2].lower()
                kinds = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
                data = encoded(100 * number + i, kinds[suffix]) if suffix in kinds else f"{kind} {i}".encode()
                about.size, about.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(about, io.BytesIO(data))
                link = tarfile.TarInfo(f"link{i}.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, LONG[: 90 if form == tarfile.USTAR_FORMAT else 200]
                tar.addfile(link)
    return root


def test_members_are_those_of_tarfile(odd):
    for path in sorted(odd.glob("*.tar")):
        with tarfile.open(path) as tar, path.open("rb") as file:
            theirs = [(os.fsencode(m.name), m.offset_data, m.size) for m in tar if m.isfile()]
            assert list(members_of(file.fileno(), path.stat().st_size)) == theirs, path.name


def test_images_and_captions_are_those_of_tarfile(odd):
    source = CaptionedTars(str(odd))
    number = 0
    for path in sorted(odd.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # of one name the last
        shown = {name: data for name, data in content.items() if not name.rpartition("/")[2].startswith(".")}
        images = [name for name in shown if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))]
        for name in images:
            image, captions = source[number]
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(shown[name])).convert("RGB")))
            stem = name.rpartition(".")[0]
            texts = [data.decode() for text, data in shown.items() if text.lower() == f"{stem}.txt".lower()]
            assert list(captions) == texts, name
            number += 1
    assert number == len(source) == len(NAMES) + 1


def test_large_numbers_in_headers_are_read(tmp_path):
    """A size in base 256, as GNU tar writes from 8 GiB on, and one in a pax header."""
    path = write_tar(tmp_path / "a.tar", [("a.jpg", encoded(0)), ("a.txt", b"x")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    size = int(data[124:136].split(b"\0")[0], 8)
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert CaptionedTars(str(tmp_path))[0][1] == {"x": 1.0}
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        about = tarfile.TarInfo("b.jpg")
        about.size, about.pax_headers = len(encoded(1)), {"size": str(len(encoded(1)))}
        tar.addfile(about, io.BytesIO(encoded(1)))
        tar.addfile(tarfile.TarInfo("b.txt"))
    assert CaptionedTars(str(tmp_path))[1][1] == {"": 1.0}


def test_several_captions_of_members_and_of_json_have_weights(tmp_path):
    shard(tmp_path / "00000.tar", range(3), "text {}")
    wanted = {"txt": 0.5, "json:caption": 0.25, "json:alts": 0.25, "json:none": 1.0, "other.txt": 1.0}
    source = CaptionedTars(str(tmp_path), wanted)
    assert source[2][1] == {"text 2": 0.5, "json 2": 0.25, "x": 0.125, "y": 0.125}
    assert CaptionedTars(str(tmp_path), "json:caption")[1][1] == {"json 1": 1.0}
    assert CaptionedTars(str(tmp_path / "0*.tar")).fingerprint() == CaptionedTars(str(tmp_path)).fingerprint()
    with pytest.raises(UserError, match=r"no caption \(json:size\) for image .*00000.tar/000000001.jpg"):
        CaptionedTars(str(tmp_path), "json:size")[1]


def test_the_index_is_written_once_and_bound_to_the_tar(tmp_path, capfd):
    path = shard(tmp_path / "00000.tar", range(4))
    shard(tmp_path / "00001.tar", range(4, 6))
    assert len(CaptionedTars(str(tmp_path))) == 6
    index = tmp_path / "00000.tar.index"
    written = index.stat().st_mtime_ns
    assert len(CaptionedTars(str(tmp_path))) == 6
    assert index.stat().st_mtime_ns == written
    opened = CaptionedTars(str(tmp_path))
    assert len(opened) == 6
    capfd.readouterr()
    shard(path, range(10, 15))
    with pytest.raises(UserError, match=r"00000.tar has changed since it was opened"):
        opened[0]
    assert list(CaptionedTars(str(tmp_path))[4][1]) == ["caption 14"]
    assert "00000.tar has changed since its index was written: it is indexed again" in capfd.readouterr().err
    os.utime(path, (1, 1))  # the time alone
    assert len(CaptionedTars(str(tmp_path))) == 7
    assert "00000.tar has changed" in capfd.readouterr().err
    index.write_bytes(index.read_bytes()[:50])
    assert len(CaptionedTars(str(tmp_path))) == 7
    assert not list(tmp_path.glob(".*"))


def test_an_index_may_lie_elsewhere(tmp_path):
    (tmp_path / "tars").mkdir()
    shard(tmp_path / "tars/00000.tar", range(4))
    assert len(CaptionedTars(str(tmp_path / "tars"), index=str(tmp_path / "index"))) == 4
    assert not list((tmp_path / "tars").glob("*.index"))
    (tmp_path / "tars/00000.tar.index").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*Give the tars an index folder"):
        len(CaptionedTars(str(tmp_path / "tars")))


def test_broken_members_are_named_counted_and_skipped(tmp_path, capfd):
    members = []
    for i in range(200):
        members += [(f"{i:03d}.jpg", encoded(i)), (f"{i:03d}.txt", b"x")]
    members[2 * 7] = ("007.jpg", b"no image")
    members[2 * 8] = ("008.jpg", b"")
    del members[2 * 9 + 1]
    write_tar(tmp_path / "00000.tar", members)
    shard(tmp_path / "00001.tar", range(200))
    data = ImageDataset(CaptionedTars(str(tmp_path)), (SIZE, SIZE))
    batch = data.__getitems__(range(400))
    assert sorted(set(range(400)) - set(batch["id"].tolist())) == [7, 8, 9]
    words = capfd.readouterr().err
    assert "image skipped (1 of 400 so far): cannot read image" in words
    assert "00000.tar/007.jpg: the file is no image" in words
    assert "00000.tar/008.jpg: the file is empty" in words
    assert "(3 of 400 so far): no caption (txt) for image" in words


@pytest.mark.parametrize("damage", ["cut", "header", "marker"])
def test_a_broken_tar_gives_the_images_before_the_break_and_is_named(tmp_path, capfd, damage):
    path = shard(tmp_path / "00000.tar", range(8), form=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("000000005.jpg").offset
    if damage == "header":
        data[at + 100 : at + 110] = b"\xff" * 10
    path.write_bytes(data[: {"cut": at + 600, "header": len(data), "marker": at}[damage]])
    source = CaptionedTars(str(tmp_path))
    assert [list(source[i][1]) for i in range(len(source))] == [[f"caption {i}"] for i in range(5)]
    words = capfd.readouterr().err
    assert "00000.tar is broken (" in words
    assert "5 images before that are read" in words
    len(CaptionedTars(str(tmp_path)))
    assert "00000.tar is broken (" in capfd.readouterr().err


def test_folders_without_tars_or_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no tar in"):
        len(CaptionedTars(str(tmp_path)))
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UserError, match=r"no image in the 1 tars of .*; the first: the header at byte 0 is broken"):
        len(CaptionedTars(str(tmp_path)))


def fit(folder, steps, ckpt_path=None, workers=0, **options):
    """Train on a mixture of tars and other images; return all that came of each batch."""
    recorder = CaptionRecorder()
    tars = CaptionedTars(str(folder), {"txt": 1.0, "json:caption": 1.0})
    source = Mixture([tars, Captioned([["a", "b"]] * 7)], [1, 2])
    data = LatentDataModule(source, 4, SIZE, val=0.2, num_workers=workers)
    run = trainer(max_steps=steps, **options)
    run.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    run.save_checkpoint(folder / f"{steps}.ckpt")
    return recorder.train_batches


def go_on_as_rank(folder):
    return fit(folder, 13, folder / "7.ckpt", devices=2, strategy=DDPStrategy(process_group_backend="gloo"))


def test_mixture_of_tars_resumes_in_mid_epoch_with_any_workers_and_ranks(tmp_path):
    shard(tmp_path / "00000.tar", range(11))
    shard(tmp_path / "00001.tar", range(11, 20))
    whole = fit(tmp_path, 13)
    assert fit(tmp_path, 7, workers=2) == whole[:7]
    assert fit(tmp_path, 13, tmp_path / "7.ckpt", workers=2) == whole[7:]
    ranks = run_ranks(2, go_on_as_rank, tmp_path)
    together = [sorted(first + second) for first, second in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in whole[7:]]
