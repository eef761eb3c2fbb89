"""The report on generators says what their files say: table, samples by class, curves, findings, commands."""

import base64
import io
import json
import re
import subprocess
import sys
from html import unescape

import pytest
import yaml
from PIL import Image

from aligntok.programs.report import COLOURS as LINES
from aligntok.programs.report import write_report
from aligntok.programs.report.measures import findings
from aligntok.programs.report.runs import find_runs

COLOURS = ["red", "lime", "blue"]
CONDITIONS = "no protocol: 1,000 images of 32x32 px, features digits; Euler(num_steps=16, shift=1.0)"
SWEEP = {
    "val/gfd_digits_steps2": 1.4,
    "val/gfd_digits_steps8": 0.95,
    "val/gfd_digits_steps32": 0.87,
    "val/recall_digits_steps8": 0.6,
}
FIRST = [
    "Samples of “dit” on the latents of “stage1”: gFD (digits) 0.895 at 16 sampling steps.",
    "99.0 % of the samples are what was asked for, by a classifier of real images.",
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))


def last(folder, name):
    return str(folder / name / "checkpoints" / "last.ckpt")


def make_tokenizer(folder, name="stage1", stage="LatentAlignment", metric="val/psnr", value=25.0):
    config = {"model": {"class_path": f"aligntok.stages.{stage}"}, "output": str(folder / name)}
    write(folder / name / "config.yaml", config)
    write(folder / name / "run.json", {"stage": stage, "steps": 20, "seconds": 9.0, "metrics": {metric: value}})
    (folder / name / "metrics.csv").write_text("step,train/loss\n9,0.5\n19,0.1\n")


def make_cache(folder, name="latents", run="stage1", classes=("one", "two, deux", "three")):
    write(folder / name / "manifest.json", {"format": 1, "images": {"classes": list(classes)}})
    tokenizer = {"class_path": "aligntok.weights.load_tokenizer", "init_args": {"path": last(folder, run)}}
    write(folder / name / "encode.yaml", {"output": str(folder / name), "tokenizer": tokenizer})


def make_generator(folder, name="dit", done=True, num_samples=1000, init_from=None, **metrics):
    classifier = {"class_path": "load_classifier", "init_args": {"path": last(folder, "encoder")}}
    quality = {"num_samples": num_samples, "batch_size": 50, "reference": "digits", "classifier": classifier}
    callbacks = [
        {"class_path": "aligntok.callbacks.EMA"},
        {"class_path": "aligntok.callbacks.GenerationQuality", "init_args": quality},
        {"class_path": "aligntok.callbacks.SampleGrid", "init_args": {"num_classes": 10, "per_class": 2}},
    ]
    model = {
        "network": {"class_path": "aligntok.networks.DiT", "init_args": {"num_classes": 3}},
        "tokenizer": {"class_path": "aligntok.weights.load_tokenizer", "init_args": {"path": last(folder, "stage1")}},
        "sampler": {"class_path": "aligntok.flow.Euler", "init_args": {"num_steps": 16}},
        "guidance": {"class_path": "aligntok.flow.Guidance", "init_args": {"scale": 2.0}},
    }
    train = {"class_path": "aligntok.data.LatentShards", "init_args": {"folder": str(folder / "latents")}}
    config = {
        "model": {"class_path": "aligntok.stages.LatentDiffusion", "init_args": model},
        "trainer": {"callbacks": callbacks, "max_steps": 40},
        "data": {"train": train},
        "output": str(folder / name),
        "init_from": init_from,
    }
    write(folder / name / "config.yaml", config)
    values = {"val/gfd_digits": 0.895, "val/class_agreement": 0.99, "val/recall_digits": 0.698}
    values |= {key.replace("__", "/"): value for key, value in metrics.items()}
    record = {"stage": "LatentDiffusion", "steps": 40, "seconds": 307.0, "metrics": values}
    record["parameters"] = {"network": [1274672, 0], "frozen_tokenizer": [0, 1277235]}
    if done:
        write(folder / name / "run.json", record)
    rows = [
        "step,train/loss,train/mse_t0.1,train/mse_t0.2,val/mse_t0.1,val/mse_t0.2,val/gfd_digits,val/class_agreement"
    ]
    rows += ["19,2.9,1.0,1.0,,,,", "19,,,,0.9,0.9,3.5,0.8", "39,0.5,0.4,0.5,,,,", "39,,,,0.3,0.6,0.895,0.99"]
    (folder / name / "metrics.csv").write_text("\n".join(rows))
    for step, colours in ((20, ["white"] * 3), (40, COLOURS)):
        picture = Image.new("RGB", (2 * 66 + 2, 3 * 66 + 2), "white")
        for row, colour in enumerate(colours):
            for column in range(2):
                picture.paste(Image.new("RGB", (64, 64), colour), (66 * column + 2, 66 * row + 2))
        path = folder / name / "images" / f"samples_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    return folder


def make_all(folder):
    make_tokenizer(folder)
    make_cache(folder)
    make_generator(folder)
    validated = {"checkpoint": last(folder, "dit"), "metrics": {**SWEEP, "val/gfd_digits": 0.895}}
    write(folder / "dit" / "validate.json", {**validated, "conditions": CONDITIONS})
    samples = yaml.safe_load((folder / "dit" / "config.yaml").read_text())
    samples |= {"output": str(folder / "samples"), "ckpt_path": last(folder, "dit")}
    write(folder / "samples" / "sample.yaml", samples)
    write(folder / "samples" / "samples.json", {"count": 3})
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Return the folder and the page of a tokenizer, its cache, a generator, its validation and its samples."""
    folder = make_all(tmp_path_factory.mktemp("runs") / "quickstart")
    return folder, write_report(folder).read_text()


def tables(page):
    return [re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", table, re.DOTALL) for table in page.split("<table>")[1:]]


def text_of(html):
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def figures(page):
    """Return each panel's drawing, and its lines (points, and whether it is dashed), by caption."""
    found = {}
    panel = r"<figcaption>([^<]+)</figcaption><img alt=[^>]*svg\+xml;base64,([^\"]+)"
    for caption, data in re.findall(panel, page):
        drawing = base64.b64decode(data).decode()
        paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; ([^"]*)"', drawing)
        own = [(path, style) for path, style in paths if any(f"stroke: {colour}" in style for colour in LINES)]
        lines = [(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), "dasharray" in style) for path, style in own]
        found.setdefault(unescape(caption).replace("\N{NO-BREAK SPACE}", " "), []).extend(lines)
    return found


def drawing_of(page, caption):
    data = re.search(rf"<figcaption>{caption}</figcaption><img alt=[^>]*svg\+xml;base64,([^\"]+)", page)[1]
    return base64.b64decode(data).decode()


def sentences(folder):
    return findings(find_runs(folder))


def test_generators_have_their_own_table(full):
    tokenizers, generators = tables(full[1])
    assert [text_of(row).split()[0] for row in tokenizers] == ["stage1"]
    row = text_of(generators[0])
    assert len(generators) == 1
    for words in (
        "dit latents of stage1 LatentDiffusion Euler, 16 steps guidance 2.0 40 0:05:07",
        "1.27 M trained network",
    ):
        assert words in row
    assert "0.895" in row
    assert "99.0 % 69.8 %" in row
    assert text_of(full[1].split("<tbody>")[1]).count("Recall (digits) ↑") == 1  # those of the sweep are no columns
    assert f"dit, measured by aligntok validate : {CONDITIONS}." in text_of(full[1])


def test_what_encode_and_sample_wrote_is_no_run(full):
    assert [run.name for run in find_runs(full[0])] == ["stage1", "dit"]


def test_each_class_has_its_name_and_its_last_samples(full):
    rows = re.findall(r'<span>([^<]*)</span><img alt="[^"]*" src="data:image/png;base64,([^"]+)"', full[1])
    assert [name for name, _ in rows] == ["one", "two", "three"]
    for (_, data), colour in zip(rows, COLOURS, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        times = image.width // 130  # 2 tiles of 64 and the gap
        assert image.width == 130 * times > 1000
        assert {image.getpixel((x, y)) for x in (0, 64 * times - 1) for y in (0, 64 * times - 1)} == {
            Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        }
        assert image.getpixel((64 * times, 0)) == (255, 255, 255)  # crisp: the gap begins at once


def test_classes_are_numbered_where_no_cache_names_them(tmp_path):
    page = write_report(make_generator(tmp_path)).read_text()
    assert re.findall(r'<span>([^<]*)</span><img alt="samples', page) == ["0", "1", "2"]


def test_moved_folder_keeps_names_and_tokenizer(tmp_path):
    make_all(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    page = write_report(tmp_path / "new").read_text()
    assert "<span>three</span>" in page
    assert "latents of stage1" in text_of(page)


def test_curves_of_training_and_of_sampling_steps(full):
    panels = figures(full[1])
    assert len(panels["gFD (digits) ↓"][0][0]) == 2
    assert len(panels["Class agreement ↑"][0][0]) == 2
    assert len(panels["gFD (digits) ↓ over sampling steps"][0][0]) == 4  # 2, 8, 32 and the run's own 16
    assert len(panels["Recall (digits) ↑ over sampling steps"][0][0]) == 2
    assert "Class agreement ↑ over sampling steps" not in panels  # measured at 16 alone


def test_sweep_holds_the_runs_own_sampler(full):
    expected = [(2, 1.4), (8, 0.95), (16, 0.895), (32, 0.87)]
    assert find_runs(full[0])[1].sweep("val/gfd_digits") == expected


def test_twice_the_sampling_steps_is_the_same_way_on(full):
    ((line, _),) = figures(full[1])["gFD (digits) ↓ over sampling steps"]
    first, second, third, fourth = (float(x) for x, _ in line)  # 2, 8, 16, 32
    assert third - second == pytest.approx(fourth - third)
    assert second - first == pytest.approx(2 * (third - second))
    drawing = drawing_of(full[1], "gFD [^<]* over sampling steps")
    assert re.findall(r">(\d+)</text>", drawing)[:5] == ["2", "4", "8", "16", "32"]


def test_error_over_time_is_the_last_of_validation_and_training(full):
    (val, solid), (train, dashed) = figures(full[1])["Velocity error ↓"]
    assert (solid, dashed) == (False, True)
    heights = [float(y) for _, y in (*val, *train)]  # 0.3, 0.6, 0.4, 0.5; downwards in SVG
    assert sorted(heights, reverse=True) == [heights[i] for i in (0, 2, 3, 1)]


def test_losses_of_generators_stand_apart(full):
    panels = figures(full[1])
    assert full[1].count("<figcaption>train/loss</figcaption>") == 2
    assert len(panels["train/loss"]) == 2
    assert not any("mse_t" in caption for caption in panels)


def test_page_holds_no_address(full):
    addresses = re.findall(r'(?:src|href)="([^"]*)"', full[1])
    assert all(address.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for address in addresses)
    assert "http" not in full[1]


def test_findings_of_a_generator(full):
    assert sentences(full[0]) == [
        "“stage1” reconstructs at 25.0 dB.",
        *FIRST,
        "gFD (digits) is lowest at 32 sampling steps (0.87); 8 steps come within 10 % of it (0.95).",
    ]


def test_findings_turn_with_the_numbers(tmp_path):
    make_generator(make_all(tmp_path), val__class_agreement=0.5)
    make_tokenizer(tmp_path, "encoder", "EncoderPretraining", "val/accuracy", 0.861)
    conditions = "no protocol: 5,000 images of 32x32 px; Heun(num_steps=50, shift=1.0)"
    metrics = {"val/gfd_digits": 2.0, "val/gfd_digits_steps2": 1.0}
    write(tmp_path / "dit" / "validate.json", {"metrics": metrics, "conditions": conditions})
    assert sentences(tmp_path)[1:] == [
        "Samples of “dit” on the latents of “stage1”: gFD (digits) 2 at 50 sampling steps.",
        "50.0 % of the samples are what was asked for, by a classifier that is right on 86.1 % of the validation"
        " images.",
        "gFD (digits) is lowest at 2 sampling steps (1).",
    ]


def test_lone_generator_has_the_headline(tmp_path):
    make_generator(tmp_path)
    alone = [FIRST[0].replace(" on the latents of “stage1”", ""), FIRST[1]]
    assert sentences(tmp_path) == sentences(tmp_path / "dit") == alone
    assert "<h2>Runs</h2>" not in write_report(tmp_path).read_text()


def test_generators_compare_where_measured_alike(tmp_path):
    make_generator(tmp_path, "one")
    make_generator(tmp_path, "two", val__gfd_digits=0.5)
    assert sentences(tmp_path) == ["Of 2 generators, “two” has the lowest gFD (digits) 0.5, then “one” with 0.895."]
    assert 'class="best">0.5<' in write_report(tmp_path).read_text()
    make_generator(tmp_path, "two", val__gfd_digits=0.5, num_samples=500)
    assert sentences(tmp_path) == ["No run has been measured yet."]
    assert 'class="best"' not in write_report(tmp_path).read_text()


def test_unfinished_generator_shows_samples_and_no_numbers(tmp_path):
    page = write_report(make_generator(tmp_path, done=False)).read_text()
    row = text_of(tables(page)[0][0])
    assert "unfinished" in row
    assert "0.895" not in row
    assert page.count("data:image/png") == 3


def commands(folder):
    page = write_report(folder).read_text()
    text = unescape(re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1])
    return [line.removeprefix("aligntok ") for line in text.replace(f"{folder}/", "").splitlines()]


def test_commands_make_cache_generator_measures_and_samples_in_turn(full):
    latents = (
        "--model.init_args.tokenizer.init_args.path again/stage1/checkpoints/last.ckpt"
        " --data.train.init_args.folder again/latents"
    )
    checkpoint = "--ckpt_path again/dit/checkpoints/last.ckpt"
    assert commands(full[0]) == [
        "fit --config stage1/config.yaml --output again/stage1",
        "encode --config latents/encode.yaml --output again/latents"
        " --tokenizer.init_args.path again/stage1/checkpoints/last.ckpt",
        f"fit --config dit/config.yaml --output again/dit {latents}",
        f"validate --config again/dit/config.yaml {checkpoint} --output again/dit",
        f"sample --config samples/sample.yaml --output again/samples {checkpoint} {latents}",
    ]


def test_commands_keep_tokenizer_and_latents_of_one_making(tmp_path):
    make_tokenizer(tmp_path)
    make_generator(tmp_path)  # its cache is not here: the old latents want the old tokenizer
    assert commands(tmp_path)[1:] == [
        "fit --config dit/config.yaml --output again/dit",
        "validate --config again/dit/config.yaml --ckpt_path again/dit/checkpoints/last.ckpt --output again/dit",
    ]


def test_cache_of_a_tokenizer_elsewhere_comes_first(tmp_path):
    make_cache(tmp_path, run="elsewhere")
    make_generator(tmp_path)
    lines = commands(tmp_path)
    assert lines[0] == "encode --config latents/encode.yaml --output again/latents"
    assert lines[1].endswith("--output again/dit --data.train.init_args.folder again/latents")


def make_autoregressive(folder, name="ar"):
    make_tokenizer(folder, "stage2", "DecoderRefinement")
    path = folder / "stage2" / "run.json"
    record = json.loads(path.read_text())
    record["metrics"] |= {"val/codebook_usage": 0.9, "val/codebook_perplexity": 111.4}
    write(path, record)
    network = {"class_path": "aligntok.networks.AutoregressiveTransformer", "init_args": {"num_classes": 3}}
    model = {
        "network": network,
        "tokenizer": {"class_path": "aligntok.weights.load_tokenizer", "init_args": {"path": last(folder, "stage2")}},
        "sampler": {"class_path": "aligntok.decoding.TokenSampler", "init_args": {"guidance_scale": 2.5}},
    }
    train = {"class_path": "aligntok.data.TokenShards", "init_args": {"folder": str(folder / "tokens")}}
    stage = {"class_path": "aligntok.stages.AutoregressiveGeneration", "init_args": model}
    config = {"model": stage, "data": {"train": train}, "output": str(folder / name)}
    write(folder / name / "config.yaml", config)
    metrics = {"val/gfd_digits": 0.9, "val/class_agreement": 0.91, "val/accuracy": 0.123, "val/loss": 2.345}
    write(folder / name / "run.json", {"stage": "AutoregressiveGeneration", "steps": 40, "metrics": metrics})
    (folder / name / "metrics.csv").write_text("step,train/loss,val/accuracy\n19,3.0,\n39,2.5,0.123\n")
    positions = "position,part,loss,accuracy\n0,prefix,3.0,0.1\n1,grid,2.0,0.5\n2,grid,1.0,0.3\n"
    (folder / name / "accuracy_per_position.csv").write_text(positions)
    make_cache(folder, "tokens", "stage2")


def test_an_autoregressive_generator_has_its_measures_and_its_curve(tmp_path):
    make_autoregressive(tmp_path)
    page = write_report(tmp_path).read_text()
    tokenizers, generators = (text_of(" ".join(rows)) for rows in tables(page))
    assert "90.0 %" in tokenizers
    assert "111" in tokenizers
    assert "Probe" not in page  # nobody measured it
    assert "12.3 %" in generators
    assert "2.345" in generators
    assert "TokenSampler" in generators
    assert "guidance 2.5" in generators
    assert "accuracy 12.3 %" not in generators  # that line is the classifier's
    ((points, _),) = figures(page)["Token accuracy along the sequence ↑"]
    heights = [float(y) for _, y in points]
    assert heights[1] < heights[2] < heights[0]  # downwards: 50 % above 30 % above 10 %


def test_the_tokens_of_a_repeated_run_are_its_own(tmp_path):
    make_autoregressive(tmp_path)
    page = unescape(write_report(tmp_path).read_text())
    assert "--data.train.init_args.folder again/tokens" in page


def test_the_report_starts_without_torch():
    code = "import sys, aligntok.programs.report; sys.exit(any(name in sys.modules for name in ('torch', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
