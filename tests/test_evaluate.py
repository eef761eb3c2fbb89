"""`aligntok evaluate`: equal images give equal numbers however they are stored, and nothing unlike is compared."""

import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from aligntok.__main__ import main
from aligntok.data.images import center_crop
from aligntok.data.stored import StoredFile, StoredFolder
from aligntok.errors import UserError
from aligntok.metrics import EncoderFeatures, GenerationMetrics, Reference, TimmFeatures, find_protocol
from aligntok.metrics.protocol import FREE
from aligntok.networks import VisionEncoder
from aligntok.networks.frozen import load_frozen
from aligntok.programs.evaluate import evaluate_command, make_metrics, parse, sorted_by_class
from aligntok.programs.judges import read_judges

NAME = "tf_efficientnet_lite0"
LITE0 = ["--encoder", NAME, "--encoder_weights", "offline", "--device", "cpu"]


def pictures(count, seed, size=32):
    """Blocks of random colour, uint8 (count, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def write_folder(folder, images, name="{:04d}.png"):
    for number, image in enumerate(images):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_npz(path, images, **more):
    np.savez(path, arr_0=images, **more)
    return path


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


SAMPLES, REAL = pictures(24, 0), pictures(30, 1)


@pytest.fixture
def stored(tmp_path):
    """Samples and reference, each as a folder and as a file."""
    return {
        "folder": write_folder(tmp_path / "png", SAMPLES),
        "npz": write_npz(tmp_path / "samples.npz", SAMPLES, arr_1=np.arange(24) % 3),
        "real folder": write_folder(tmp_path / "real", REAL),
        "real npz": write_npz(tmp_path / "real.npz", REAL),
    }


def evaluate(samples, reference, *options):
    """Return the last record that a command wrote."""
    evaluate_command([str(samples), "--reference", str(reference), *LITE0, *map(str, options)])
    folder = samples if samples.is_dir() else samples.parent
    return json.loads((folder / "evaluation.json").read_text())[-1]


def test_folder_and_file_give_what_the_metrics_give_for_the_arrays(stored):
    encoder = VisionEncoder(NAME, 32, 16, "offline")
    direct = GenerationMetrics(EncoderFeatures(encoder), precision_recall=True, kid=True, mind=True)
    direct.update(tensor(REAL), torch.arange(30), real=True)
    direct.update(tensor(SAMPLES), torch.arange(24))
    expected = direct.compute()
    for samples in ("folder", "npz"):
        for reference in ("real folder", "real npz"):
            record = evaluate(stored[samples], stored[reference], "--all", "--batch_size", 7)
            assert record["values"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert record["count"] == 24
    assert expected[f"fd_{NAME}"] > 0.01


def test_images_are_no_distance_from_themselves(stored):
    values = evaluate(stored["folder"], stored["npz"])["values"]
    assert values[f"fd_{NAME}"] == pytest.approx(0, abs=1e-5)
    assert (values[f"precision_{NAME}"], values[f"recall_{NAME}"]) == (1, 1)


def test_a_kept_reference_takes_the_place_of_its_images(stored, tmp_path, capsys):
    kept = tmp_path / "kept" / "real.safetensors"
    first = evaluate(stored["npz"], stored["real folder"], "--save_reference", kept)
    again = evaluate(stored["npz"], kept)
    assert again["values"] == pytest.approx(first["values"], abs=1e-9)
    assert again["reference"] == first["reference"] == Reference.load(kept).source
    assert first["reference"].startswith("real images:")
    out = capsys.readouterr().out
    assert "samples.npz 24/24  images/s" in out
    assert "real 30/30" in out
    assert f"reference {first['reference']} (30 images, as stored)" in out
    assert first["conditions"] in out
    small = write_npz(tmp_path / "small.npz", pictures(24, 0, size=16))
    with pytest.raises(UserError, match="16x16"):
        evaluate(small, kept)


def test_where_it_writes_is_tried_before_it_measures(stored, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("aligntok.programs.evaluate.make_metrics", lambda *args: pytest.fail("it began"))
    with pytest.raises(UserError, match=r"cannot write .*what should be its folder is a file"):
        evaluate(stored["npz"], stored["real npz"], "--save_reference", tmp_path / "file" / "real.safetensors")
    (tmp_path / "png" / "evaluation.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*evaluation\.json: a folder of this name is in the way"):
        evaluate(stored["folder"], stored["real npz"])


def test_earlier_records_stay_and_the_same_one_is_replaced(stored):
    evaluate(stored["npz"], stored["real npz"], "--fid")
    evaluate(stored["npz"], stored["real folder"], "--fid")
    evaluate(stored["npz"], stored["real npz"], "--fid", "--kid")
    path = stored["npz"].parent / "evaluation.json"
    records = json.loads(path.read_text())
    assert [record["values"].keys() for record in records] == [{f"fd_{NAME}"}, {f"fd_{NAME}", f"kid_{NAME}"}]
    path.write_text("notes")
    with pytest.raises(UserError, match=r"evaluation\.json was not written by"):
        evaluate(stored["npz"], stored["real npz"])


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "[[]]", "\xff", "[" * 100_000])
def test_records_of_others_are_left_alone(stored, content):
    path = stored["npz"].parent / "evaluation.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=r"evaluation\.json was not written by"):
        evaluate(stored["npz"], stored["real npz"], "--fid")
    assert path.read_bytes() == content.encode("latin1")


class Touch:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("key", ["arr_0", "arr_1", "mu"])
def test_what_is_pickled_in_a_file_is_not_run(stored, tmp_path, key, monkeypatch):
    content = {"arr_0": SAMPLES, "arr_1": np.arange(24), "mu": np.zeros(48), "sigma": np.eye(48)}
    np.savez(tmp_path / "evil.npz", **{**content, key: np.array([Touch(tmp_path / "ran")] * 24, dtype=object)})

    def read():
        file = StoredFile(tmp_path / "evil.npz")
        return file.labels, file.statistics()

    with pytest.raises(UserError, match=r"evil\.npz is (damaged at (arr_1|mu) .*pickle|no \.npz of images)"):
        read()
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_nothing_or_another_version_of_the_format(stored, tmp_path):
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.npz is no \.npz"):
        StoredFile(tmp_path / "empty.npz")
    with zipfile.ZipFile(tmp_path / "new.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, SAMPLES, version=(3, 0))
    images = StoredFile(tmp_path / "new.npz")
    assert torch.equal(torch.cat(list(images.images(7))), tensor(SAMPLES))
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (24, 32, 32, 3)})
        file.write(bytes(1000))
    with pytest.raises(UserError, match=r"short\.npz is no .*has 1,1\d\d bytes"):
        StoredFile(tmp_path / "short.npz")


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99"])
def test_a_device_that_cannot_compute_is_named(stored, device):
    words = [str(stored["npz"]), "--reference", str(stored["real npz"]), *LITE0[:-1], device]
    with pytest.raises(UserError, match=f"--device {device}: "):
        evaluate_command(words)


def test_a_reference_of_no_numbers_is_named(tmp_path):
    good = Reference(torch.zeros(3), torch.eye(3), 9, "toy", "tiny", sample=torch.zeros(4, 3))
    odd = {"cov": torch.full((3, 3), torch.nan), "sample": torch.zeros(4, 2), "mean": torch.ones(3, 1)}
    for name, value in odd.items():
        tensors = {"mean": good.mean, "cov": good.cov, "sample": good.sample, name: value}
        save_file(tensors, tmp_path / "odd.safetensors", {"count": "9", "source": "toy", "features": "tiny"})
        with pytest.raises(UserError, match=r"odd\.safetensors: "):
            Reference.load(tmp_path / "odd.safetensors")


def test_reference_folder_is_cropped_as_adm_does(stored, tmp_path):
    wide = [np.concatenate([image, image[:, :8]], axis=1) for image in pictures(12, 2, size=48)]
    wide = [*wide, *pictures(12, 3, size=40)]
    cropped = np.stack([np.array(center_crop(Image.fromarray(image), (32, 32))) for image in wide])
    folder = write_folder(tmp_path / "wide", wide)
    found = evaluate(stored["npz"], folder, "--image_size", 32)
    expected = evaluate(stored["npz"], write_npz(tmp_path / "cropped.npz", cropped))
    assert found["values"] == pytest.approx(expected["values"], abs=1e-9)
    assert "ADM centre crop" in found["conditions"]
    assert "ADM" not in expected["conditions"]


def test_other_sizes_are_refused(stored, tmp_path):
    small = write_npz(tmp_path / "small.npz", pictures(24, 0, size=16))
    with pytest.raises(UserError, match=r"samples have 32x32 pixels, the reference .*small.npz has 16x16"):
        evaluate(stored["folder"], small)
    with pytest.raises(UserError, match=r"samples have 16x16 pixels.*--image_size"):
        evaluate(small, stored["real folder"])
    Image.fromarray(pictures(1, 0, size=16)[0]).save(stored["folder"] / "0017.png")
    with pytest.raises(UserError, match=r"0017.png has 16x16 pixels, the first image 32x32"):
        evaluate(stored["folder"], stored["real npz"])
    (stored["folder"] / "0017.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0017.png: the file is no image"):
        evaluate(stored["folder"], stored["real npz"])


def test_wrong_count_is_refused_before_anything_is_loaded(stored):
    for protocol in ("gfid-adm50k", f"fd-{NAME}"):
        words = [str(stored["npz"]), "--reference", str(stored["real npz"]), "--protocol", protocol]
        with pytest.raises(UserError, match=f"{protocol} wants 50,000 images, 24 were measured"):
            evaluate_command([*words, "--encoder", NAME, "--encoder_weights", "nowhere.pth"])


def test_without_inception_weights_it_says_where_to_put_them(stored, tmp_path, monkeypatch, capsys):
    def download(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    command = ["evaluate", str(stored["npz"]), "--reference", str(stored["real npz"]), "--device", "cpu"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "FID needs weights-inception" in error
    assert str(tmp_path) in error
    assert error.count("\n") == 1


def test_measures_of_inception():
    def chosen(*flags):
        (metrics,) = make_metrics(parse(["x", "--reference", "y", *flags]), (32, 32), FREE)
        measures = {
            "is": metrics.inception_score,
            "sfid": metrics.sfid,
            "pr": metrics.precision_recall,
            "kid": metrics.kid,
            "mind": metrics.mind,
        }
        return " ".join(name for name, asked in measures.items() if asked)

    assert chosen() == "is sfid pr"  # what papers report
    assert chosen("--fid") == ""
    assert chosen("--kid") == "kid"
    assert chosen("--fid", "--sfid") == "sfid"
    assert chosen("--all") == "is sfid pr kid mind"


class Pixels(nn.Module):
    """Averages of the image in place of Inception's features."""

    def __init__(self, weights):
        super().__init__()
        self.name, self.num_features, self.num_spatial = "inception", 12, 3

    def forward(self, image):
        return self.with_spatial(image)[0]

    def with_spatial(self, image):
        return nn.functional.adaptive_avg_pool2d(image, 2).flatten(1), image.mean((2, 3))

    def logits(self, features):
        return features.double() * 10


def test_what_papers_report_against_adms_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aligntok.programs.evaluate.InceptionFeatures", Pixels)
    features = [part.double() for part in Pixels(None).with_spatial(tensor(REAL))]
    stored = {}
    for (mean, cov), part in zip((("mu", "sigma"), ("mu_s", "sigma_s")), features, strict=True):
        stored |= {mean: part.mean(0).numpy(), cov: part.T.cov().numpy()}
    reference = write_npz(tmp_path / "VIRTUAL_imagenet32.npz", REAL, **stored)
    samples = write_npz(tmp_path / "samples.npz", REAL, arr_1=np.arange(30) // 10)
    evaluate_command([str(samples), "--reference", str(reference), "--device", "cpu"])
    record = json.loads((tmp_path / "evaluation.json").read_text())[0]
    assert record["values"].keys() == {"fid", "sfid", "is", "precision", "recall"}
    assert record["values"]["fid"] == pytest.approx(0, abs=1e-6)
    assert record["values"]["sfid"] == pytest.approx(0, abs=1e-6)
    assert "ADM centre crop" in record["conditions"]
    assert record["reference"].startswith("VIRTUAL_imagenet32.npz sha256:")
    assert "sorted by class" in capsys.readouterr().out


def test_labels_and_order(stored, tmp_path):
    assert StoredFile(stored["npz"]).labels.tolist() == [0, 1, 2] * 8
    assert StoredFile(stored["real npz"]).labels is None
    assert StoredFile(write_npz(tmp_path / "odd.npz", SAMPLES, arr_1=np.zeros(3, int))).labels is None
    assert StoredFolder(stored["folder"]).labels is None
    names = [f"{number:06d}_class{number % 2 + 5}.png" for number in range(4)]
    asked = tmp_path / "asked" / "png"  # as `aligntok predict` writes
    for name, image in zip(names, SAMPLES, strict=False):
        write_folder(asked, [image], name)
    assert StoredFolder(asked).labels.tolist() == [5, 6, 5, 6]
    assert StoredFolder(asked.parent).labels.tolist() == [5, 6, 5, 6]

    classes = tmp_path / "classes"  # "a b" sorts before "a/" as a path, after "a" as a name
    for name, first, last in (("a", 0, 3), ("a b", 3, 5), ("c", 5, 6)):
        write_folder(classes / name, SAMPLES[first:last])
    folder = StoredFolder(classes)
    assert folder.labels.tolist() == [0, 1, 2, 0, 1, 0]
    shown = torch.cat(list(folder.images(batch_size=4)))
    assert torch.equal(shown, tensor(SAMPLES[[0, 3, 5, 1, 4, 2]]))
    record = evaluate(stored["npz"], stored["real npz"])
    assert "labels balanced (8 of each of 3)" in record["conditions"]


def test_sorted_by_class():
    for labels, expected in (
        ([0, 0, 1, 1], True),
        ([1, 1, 0, 0], True),
        ([0, 1, 0, 1], False),
        ([0, 1, 2, 3], False),
        ([0, 0, 0], False),
    ):
        assert sorted_by_class(torch.tensor(labels)) is expected
    assert not sorted_by_class(None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}", "--reference", "nowhere"], "there is no nowhere"),
        (["nowhere.npz", "--reference", "{real npz}"], "there is no nowhere.npz"),
        (["{folder}/0000.png", "--reference", "{real npz}"], "neither an .npz nor a folder"),
        (["{statistics}", "--reference", "{real npz}"], "statistics.npz has no images"),
        (["{folder}", "--reference", "{statistics}"], "statistics.npz has no images"),
        (["{folder}", "--reference", "{real npz}", "--image_size", "32"], "--image_size 32 crops"),
        (["{folder}", "--reference", "{real npz}", "--save_reference", "x.npz"], "ends in .safetensors"),
        (["{folder}", "--reference", "{real npz}", "--sfid"], "of Inception's features, not of"),
        (["{folder}", "--reference", "{real npz}", "--pool", "class"], "no class token"),
        (["{folder}", "--reference", "{real npz}", "--inception_weights", "x"], "no effect on an --encoder"),
        (["{folder}", "--reference", "{real npz}", "--protocol", "best"], "no protocol 'best'"),
        (["{folder}", "--reference", "{real npz}", "--device", "abacus"], "--device abacus"),
        (["{folder}"], "--reference"),
    ],
)
def test_errors_of_a_line(stored, tmp_path, capsys, words, message):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    places = {**stored, "statistics": tmp_path / "statistics.npz"}
    assert main(["evaluate", *LITE0, *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("aligntok: error: ")
    assert error.count("\n") == 1


def test_encoder_options_need_an_encoder():
    for words in (["--pool", "class"], ["--encoder_weights", "x"], ["--pool", "class", "--encoder", "clip-rn50"]):
        with pytest.raises(UserError, match="no effect without an --encoder"):
            parse(["x", "--reference", "y", *words])


def test_extractors_of_torch_fidelity_by_their_names():
    (metrics,) = make_metrics(parse(["x", "--reference", "y", "--encoder", "clip-vit-l-14", "--fid"]), (32, 32), FREE)
    assert (metrics.names, metrics.widths) == (["fd_clip-vit-l-14"], [768])


# Several networks


def judges_file(path, **units):
    """Small random networks; each a seed, which is its name too."""
    judges = {}
    for seed, (name, unit) in enumerate(units.items()):
        torch.manual_seed(seed)
        features = {"name": name, "model": "test_vit", "image_size": 32, "weights": str(path.parent / f"{name}.pth")}
        network = TimmFeatures("test_vit", 32, None)
        load_frozen(network)
        torch.save(network.network.network.state_dict(), features["weights"])
        judges[name] = {"features": {"class_path": "aligntok.metrics.TimmFeatures", "init_args": features}}
        judges[name] |= {} if unit is None else {"validation": unit}
    path.write_text(json.dumps({"judges": judges}))  # JSON is YAML
    return path


def judged(samples, reference, file, *options):
    words = [str(samples), "--reference", str(reference), "--judges", str(file), "--device", "cpu"]
    evaluate_command([*words, *map(str, options)])
    return json.loads((samples.parent / "evaluation.json").read_text())[-1]


def test_judges_measure_held_out_images_then_samples_in_these_units(stored, tmp_path):
    held_out = write_npz(tmp_path / "held_out.npz", pictures(20, 5))
    units = judged(held_out, stored["real folder"], judges_file(tmp_path / "a.yaml", one=None, two=None))["values"]
    assert units.keys() == {"fd_one", "fd_two"}  # and no ratio
    file = judges_file(tmp_path / "b.yaml", one=units["fd_one"], two=units["fd_two"])
    assert judged(held_out, stored["real folder"], file)["values"]["fdr2"] == pytest.approx(1)
    record = judged(stored["npz"], stored["real folder"], file)
    ratios = [record["values"][name] / units[name] for name in units]
    assert record["values"]["fdr2"] == pytest.approx(sum(ratios) / 2)
    assert ratios[0] != pytest.approx(ratios[1], rel=1e-3)
    wanted = f"features one (unit {units['fd_one']}), two (unit {units['fd_two']}), reference real images:"
    assert wanted in record["conditions"]
    assert "24 images of 32x32 px" in record["conditions"]


def test_judges_take_statistics_that_are_called_after_them(stored, tmp_path):
    file = judges_file(tmp_path / "judges.yaml", one=0.5, two=2.0)
    first = judged(stored["npz"], stored["real folder"], file, "--save_reference", tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["one.safetensors", "two.safetensors"]
    again = judged(stored["npz"], tmp_path / "kept", file)
    assert again["values"] == pytest.approx(first["values"], rel=1e-9)
    for name in ("one", "two"):  # as the authors of FDr6 publish theirs
        kept = Reference.load(tmp_path / "kept" / f"{name}.safetensors")
        (tmp_path / "theirs").mkdir(exist_ok=True)
        np.savez(tmp_path / "theirs" / f"{name}.npz", mu=kept.mean.numpy(), sigma=kept.cov.numpy())
    theirs = judged(stored["npz"], tmp_path / "theirs", file)
    assert theirs["values"] == pytest.approx(first["values"], rel=1e-9)
    assert "reference one.npz sha256:" in theirs["conditions"]


def test_the_judge_of_the_docs(stored, tmp_path):
    page = Path(__file__).parents[1] / "docs" / "evaluate.md"
    (tmp_path / "docs.yaml").write_text(re.search(r"```yaml\n(judges:.*?)```", page.read_text(), re.DOTALL)[1])
    record = judged(stored["npz"], stored["real npz"], tmp_path / "docs.yaml")
    assert record["values"].keys() == {"fd_tf_efficientnet_lite0"}


def test_judges_that_cannot_judge(stored, tmp_path, capsys):
    def error(text, *words):
        (tmp_path / "wrong.yaml").write_text(text)
        command = [str(stored["npz"]), "--reference", str(stored["real npz"]), "--judges", str(tmp_path / "wrong.yaml")]
        assert main(["evaluate", *command, "--device", "cpu", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert len(said) < 420
        return said

    start = "{{features: {{class_path: aligntok.metrics.TimmFeatures, init_args: {{model: test_vit, {0}}}}}"
    one = start + ", validation: {1}}}"
    good = one.format("name: x", 1)
    assert "wrong.yaml: give `judges` and nothing else" in error("other: 1")
    assert "`judges` needs one or more" in error("judges: {}")
    assert "features of another `name`" in error(f"judges: {{a: {good}, b: {good}}}")
    assert "judges.a.validation is 0" in error(f"judges: {{a: {one.format('name: x', 0)}}}")
    assert "there is no file nowhere.pth" in error(f"judges: {{a: {one.format('weights: nowhere.pth', 1)}}}")
    assert "leave out --kid --encoder" in error(f"judges: {{a: {good}}}", "--kid", "--encoder", NAME)
    assert "fdr6 wants 50,000 images, 24" in error(f"judges: {{a: {good}}}", "--protocol", "fdr6")


def test_fdr6_is_of_its_own_six_judges(monkeypatch):
    create = timm.create_model  # 300 million parameters take seconds even on the meta device
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create("test_vit", **options))
    judges = read_judges("fdr6.yaml")
    names = ["inception", "convnext", "dinov2", "mae", "siglip", "clip"]
    assert [judge.features.name for judge in judges] == names
    protocol = find_protocol("fdr6")
    options = parse(["x", "--reference", "y", "--protocol", "fdr6"])
    assert [metrics.names for metrics in make_metrics(options, (256, 256), protocol, judges)] == [
        ["fid"],
        *([f"fd_{name}"] for name in names[1:]),
    ]
    options.judges = "mine.yaml"
    with pytest.raises(UserError, match="has judges of its own"):
        make_metrics(options, (256, 256), protocol, judges)
    with pytest.raises(UserError, match="fdr6 takes several feature networks"):
        GenerationMetrics(Pixels(None), protocol="fdr6")
