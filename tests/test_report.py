"""The report says what the files say, and the finding turns with the numbers."""

import json
import re
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from aligntok.__main__ import main
from aligntok.errors import UserError
from aligntok.programs.report import report_command, write_report
from aligntok.programs.report.measures import findings
from aligntok.programs.report.runs import find_runs

STAGES = {"1": "LatentAlignment", "2": "PerceptualAlignment", "3": "DecoderRefinement", "e": "EncoderPretraining"}


def make_run(folder, name, stage, psnr=None, probe=None, start=None, steps=20, done=True, curve=False, **metrics):
    run = folder / name
    run.mkdir(parents=True)
    config = {
        "model": {"class_path": f"aligntok.stages.{STAGES[stage]}"},
        "output": str(run),
        "init_from": str(folder / start / "checkpoints" / "last.ckpt") if start else None,
        "trainer": {"max_steps": steps},
        "data": {"val": {"class_path": "aligntok.data.Digits"}, "image_size": 32},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    values = {"val/psnr": psnr, "val/probe": probe, **{key.replace("__", "/"): value for key, value in metrics.items()}}
    values = {key: value for key, value in values.items() if value is not None}
    record = {"stage": STAGES[stage], "steps": steps, "seconds": 75.0, "metrics": values}
    record["parameters"] = {
        "encoder": [0, 820352],
        "adapter": [9, 0] if stage == "1" else [0, 9],
        "decoder": [1632907, 0],
    }
    if stage == "2":
        record["parameters"]["encoder"] = [820352, 0]
    if done:
        (run / "run.json").write_text(json.dumps(record))
    if curve:
        (run / "metrics.csv").write_text(f"epoch,step,train/l1,val/psnr\n0,9,0.5,\n,{steps - 1},,{psnr}\n,1")
        (run / "images").mkdir()
        for step, colour in ((steps // 2, "red"), (steps, "blue")):
            Image.new("RGB", (20, 3 * 9 + 2), colour).save(run / "images" / f"step_{step:07d}.png")
    return run


def chain(folder, stage1=(25.0, 0.93), control=(25.7, 0.92), stage2=(26.3, 0.911), **options):
    """Stage 1, the control and stage 2, each (PSNR, probe)."""
    make_run(folder, "stage1", "1", *stage1, **options)
    make_run(folder, "control", "1", *control, start="stage1", **options)
    make_run(folder, "stage2", "2", *stage2, start="stage1", **options)
    return folder


def finding(folder):
    return findings(find_runs(folder))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Return the folder and the page of a whole chain with curves and pictures, stage 3 unfinished."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    make_run(folder, "encoder", "e", steps=30, val__accuracy=0.944)
    chain(folder, curve=True, val__ssim=0.9, val__rfd_digits=12.3)
    make_run(folder, "stage3", "3", 27.0, 0.911, start="stage2", done=False, curve=True, steps=12)
    report_command([str(folder)])
    return folder, (folder / "report.html").read_text()


class Page(HTMLParser):
    """Collects addresses and open tags."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def rows_of(page):
    return re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)[1:]


def text_of(html):
    return unescape(re.sub(r"<[^>]+>", " ", html))


def test_runs_stand_in_the_order_of_training(full):
    _, page = full
    names = [
        text_of(re.search(r'<th scope="row"[^>]*>(.*?)(<small|</th>)', row, re.DOTALL).group(1)).strip()
        for row in rows_of(page)
    ]
    assert names == ["encoder", "stage1", "control", "stage2", "stage3"]


def test_numbers_of_a_run_are_in_its_row(full):
    row = text_of(rows_of(full[1])[3])
    for text in (
        "PerceptualAlignment",
        "from stage1",
        "20",
        "0:01:15",
        "26.30",
        "0.900",
        "12.3",
        "91.1 %",
        "2.45 M trained",
    ):
        assert text in row
    assert "820 k frozen" in text_of(rows_of(full[1])[1])
    assert "\N{EN DASH}" in text_of(rows_of(full[1])[0])  # the encoder reconstructs nothing
    assert "pooled" not in full[1].lower()  # nobody measured it


def test_page_needs_nothing_else(full):
    _, page = full
    parsed = Page(page)
    assert parsed.open == []
    assert not parsed.tags & {"script", "link", "iframe", "object"}
    assert all(
        address.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for address in parsed.addresses
    )
    assert "http" not in page
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)
    for drawing in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)"', b64decode(drawing).decode()))


def test_unfinished_run_is_listed_without_final_numbers(full):
    _, page = full
    row = text_of(rows_of(page)[4])
    assert "unfinished" in row
    assert "of 12" in row
    assert "27.0" not in row
    assert "cut off: stage3." in text_of(page)


def test_picture_rows_of_the_last_step(full):
    page = full[1]
    assert page.count("data:image/png") == 1 + 2 * 4  # equal originals once, then two rows per tokenizer
    assert "reconstructions, step 20" in page
    assert "reconstructions, step 10" not in page


def test_commands_chain_the_repeated_runs(full):
    folder, page = full
    text = text_of(page)
    assert f"aligntok fit --config {folder}/stage1/config.yaml --output again/stage1\n" in text
    assert "--output again/stage2 --init_from again/stage1/checkpoints/last.ckpt" in text


def test_report_is_stable_when_run_again_beside_its_own_page(full):
    folder, page = full
    again = write_report(folder).read_text()
    assert re.sub(r"<footer.*", "", again) == re.sub(r"<footer.*", "", page)


def test_findings_of_a_gain(tmp_path):
    assert finding(chain(tmp_path)) == [
        "Of 3 tokenizers, “stage2” reconstructs best (26.3 dB), and “stage1” has the best linear probe (93.0 %).",
        "“stage2” against “stage1”, from which it started: PSNR 1.30 dB better (25.00 → 26.30), Linear probe 1.9 points"
        " worse (93.0 % → 91.1 %).",
        "“stage2” against “control”, which trained “stage1” on for as many steps: PSNR 0.60 dB better (25.70 → 26.30),"
        " Linear probe 0.9 points worse (92.0 % → 91.1 %).",
    ]


def test_findings_turn_with_the_numbers(tmp_path):
    best, start, control = finding(chain(tmp_path, stage1=(26.3, 0.911), stage2=(25.0, 0.93)))
    assert "“stage1” reconstructs best (26.3 dB), and “stage2” has the best linear probe" in best
    assert "PSNR 1.30 dB worse (26.30 → 25.00), Linear probe 1.9 points better (91.1 % → 93.0 %)" in start
    assert "PSNR 0.70 dB worse" in control


@pytest.mark.parametrize(
    ("stage2", "words"),
    [
        ((25.4, 0.93), "“control”, which trained “stage1” on for as many steps: PSNR 0.30 dB worse"),
        ((25.72, 0.93), "PSNR the same (25.70 → 25.72)"),
        ((26.0, 0.93), "Linear probe the same (93.0 % → 93.0 %)"),
        ((26.0, 0.465), "Linear probe 46.5 points worse (93.0 % → 46.5 %)"),
        ((26.0, None), "PSNR 0.30 dB better (25.70 → 26.00)."),
        ((float("nan"), 0.9), "Of 2 tokenizers, “control” reconstructs best (25.7 dB)"),
    ],
)
def test_findings_say_no_more_than_the_numbers(tmp_path, stage2, words):
    assert words in " ".join(finding(chain(tmp_path, stage2=stage2)))


def test_control_of_another_length_is_named_as_such(tmp_path):
    make_run(tmp_path, "stage1", "1", 25.0, 0.9)
    make_run(tmp_path, "control", "1", 25.5, 0.9, start="stage1", steps=10)
    make_run(tmp_path, "stage2", "2", 26.0, 0.9, start="stage1")
    assert "which trained “stage1” on for 10 steps (against 20)" in finding(tmp_path)[2]


def test_latents_that_do_not_move_and_frechet_distances_are_told(tmp_path):
    make_run(tmp_path, "stage1", "1", 25.0, 0.9, val__rfid=20.0)
    make_run(tmp_path, "stage2", "2", 26.0, 0.88, start="stage1", val__rfid=15.0)
    make_run(tmp_path, "stage3", "3", 26.4, 0.88, start="stage2", val__rfid=16.0)
    sentences = finding(tmp_path)
    assert "rFID better (20 → 15)" in sentences[1]
    assert "rFID worse (15 → 16)" in sentences[2]
    assert sentences[2].endswith("; its latents did not move.")  # the record says that the decoder alone learned


def test_every_second_stage_is_compared(tmp_path):
    make_run(tmp_path, "stage1", "1", 25.0, 0.9)
    make_run(tmp_path, "w0", "2", 27.0, 0.5, start="stage1")
    make_run(tmp_path, "w1", "2", 26.0, 0.88, start="stage1")
    best, *compared = finding(tmp_path)
    assert "“w0” reconstructs best (27.0 dB), and “stage1” has the best linear probe (90.0 %)" in best
    assert [sentence.split(" against ")[0] for sentence in compared] == ["“w0”", "“w1”"]


def test_stages_of_other_packages_have_their_rows_and_sentences(tmp_path):
    make_run(tmp_path, "stage1", "1", 25.0, 0.9)
    for name, measures in (("mine", {"val/psnr": 26.0}), ("odd", {"val/purity": 0.25})):
        run = make_run(tmp_path, name, "2", start="stage1")
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["class_path"] = f"other.package.{name.title()}"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "run.json").write_text(json.dumps({"stage": name.title(), "steps": 20, "metrics": measures}))
    assert "“mine” against “stage1”, from which it started: PSNR 1.00 dB better" in finding(tmp_path)[1]
    page = text_of(write_report(tmp_path).read_text())
    assert "Mine" in page
    assert "purity 0.25" in page


def test_runs_on_different_images_are_not_compared(tmp_path):
    chain(tmp_path)
    path = tmp_path / "stage2" / "config.yaml"
    path.write_text(path.read_text().replace("image_size: 32", "image_size: 64"))
    assert "do not compare" in finding(tmp_path)[0]
    assert "dB better" not in " ".join(finding(tmp_path))
    assert 'class="best"' not in write_report(tmp_path).read_text()


def test_validation_replaces_the_runs_own_measures(tmp_path):
    chain(tmp_path)
    (tmp_path / "stage2" / "validate.json").write_text(json.dumps({"checkpoint": "x", "metrics": {"val/psnr": 24.0}}))
    assert "PSNR 1.00 dB worse (25.00 → 24.00)" in finding(tmp_path)[1]


def test_parents_are_found_after_the_folder_was_moved(tmp_path):
    chain(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    parents = {run.name: run.parent and run.parent.name for run in find_runs(tmp_path / "new")}
    assert parents == {"stage1": None, "control": "stage1", "stage2": "stage1"}


def test_run_taken_up_again_is_unfinished(tmp_path):
    run = make_run(tmp_path, "stage1", "1", 25.0, 0.9, curve=True)
    with (run / "metrics.csv").open("w") as file:
        file.write("epoch,step,train/l1\n0,29,0.1\n")
    assert not find_runs(tmp_path)[0].finished


def test_lone_run_and_its_own_folder(tmp_path):
    run = make_run(tmp_path, "stage1", "1", 25.04, 0.9)
    expected = "“stage1” reconstructs at 25.0 dB, and a linear probe on its latents is right on 90.0 %."
    assert finding(tmp_path) == finding(run) == [expected]


def test_names_are_escaped(tmp_path):
    folder = tmp_path / "<i>&"
    make_run(folder, "<b>x", "1", 25.0, 0.9)
    page = write_report(folder).read_text()
    assert "<b>x" not in page
    assert "<i>&" not in page
    assert "&lt;b&gt;x" in page


@pytest.mark.parametrize("arguments", [["{}/none"], ["{}"], [], ["{}", "--what"]])
def test_mistakes_are_told(tmp_path, arguments, capsys):
    words = [word.format(tmp_path) for word in arguments]
    with pytest.raises(UserError):
        report_command(words)
    assert main(["report", *words]) == 2
    assert "aligntok: error:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_broken_record_is_named(tmp_path):
    run = make_run(tmp_path, "stage1", "1", 25.0)
    (run / "run.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"run\.json is broken"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", '{"stage": "A", "steps": "20", "metrics": {}}'),
        ("run.json", '{"stage": "A", "steps": 20, "metrics": [1]}'),
        ("run.json", '{"stage": "A", "steps": 20, "parameters": {"encoder": 3}}'),
        ("run.json", "[1, 2]"),
        ("run.json", '{"stage": "A", "seconds": "long"}'),
        ("run.json", '{"stage": 3}'),
        ("run.json", '{"stage": "A", "steps": true}'),
        ("run.json", '{"parameters": {"encoder": [1, 2, 3]}}'),
        ("run.json", "[" * 100_000),
        ("validate.json", '{"conditions": [3], "metrics": {}}'),
        ("validate.json", '{"metrics": 3}'),
        ("validate.json", '{"checkpoint": 3, "metrics": {}}'),
        ("metrics.csv", b"step,train/loss\n\xff\xfe\x00"),
        ("config.yaml", "data: [3"),
    ],
)
def test_files_of_wrong_types_are_named_in_one_line(tmp_path, file, content):
    run = make_run(tmp_path, "stage1", "1", 25.0)
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        write_report(tmp_path)
    assert f"{file} is broken" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["data: 3", "{data: {val: 3}, model: 5, trainer: [1], output: 7, init_from: [2]}"])
def test_a_config_of_other_types_is_no_obstacle(tmp_path, config):
    run = make_run(tmp_path, "stage1", "1", 25.0)
    (run / "config.yaml").write_text(config)
    assert "25.00" in write_report(tmp_path).read_text()


def test_help_names_the_folder(capsys):
    with pytest.raises(SystemExit) as stop:
        report_command(["--help"])
    assert stop.value.code == 0
    assert "FOLDER" in capsys.readouterr().out


def test_old_page_survives_a_failed_write(tmp_path, monkeypatch):
    make_run(tmp_path, "stage1", "1", 25.0)
    path = tmp_path / "out" / "page.html"
    report_command([str(tmp_path), "--output", str(path)])
    old = path.read_text()

    def full_disk(self, text, **options):
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        report_command([str(tmp_path), "--output", str(path)])
    assert path.read_text() == old
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_output_must_be_a_file(tmp_path):
    make_run(tmp_path, "stage1", "1", 25.0)
    with pytest.raises(UserError, match="is a folder"):
        report_command([str(tmp_path), "--output", str(tmp_path)])
