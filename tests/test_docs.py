"""README and docs: their code runs, their commands and options exist, their pages are in the menu."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from aligntok import cli
from aligntok.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OWN_PROJECT = {"encoder", "loss", "stage", "data"}  # pages whose code is tests/foreign, see test_foreign_project.py
NOT_RUN = "<!-- not run:"  # a comment in front of a block, with the reason
FIT = ("fit", "validate")
OF_TOKENIZERS = {  # what those recipes take from a checkpoint
    "--model.network.latent_shape": "[32,16,16]",
    "--model.network.num_classes": "1000",
    "--model.network.codebook_size": "4096",
    "--model.network.grid": "[16,16]",
    "--model.network.num_prefix": "16",
}


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"([^\n]*)\n+```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return [text for before, text in found if not before.startswith(NOT_RUN)]


def quoted() -> set[str]:
    """Return all lines of shell blocks, and all that stands in back-quotes."""
    found = set()
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        found |= {line.partition(" #")[0].strip() for line in lines}
        found |= set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)))
    return found


COMMANDS = sorted(text for text in quoted() if re.match(r"aligntok [a-z]+ (?!\.\.\.)", text))
OPTIONS = sorted(text for text in quoted() if re.match(r"--[a-z]\w+\.\S+ \S+$", text))


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    if page.stem in OWN_PROJECT:
        return
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "python"):
        exec(compile(ast.parse(text), str(page), "exec"), {"__name__": page.stem})


class Parsed(Exception):  # noqa: N818
    """The options of a command are right; nothing was built."""


@pytest.fixture
def parse(monkeypatch, tmp_path, capsys):
    """Run a command of `fit` up to where it would build the run, any other up to the file that is not there."""

    def stop(self):
        raise Parsed

    monkeypatch.setattr(cli.RunCLI, "before_instantiate_classes", stop)
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> None:
        if words[0] in FIT:
            with pytest.raises(Parsed):
                assert main(words) == 0, capsys.readouterr().err
            return
        code, error = main(words), capsys.readouterr().err
        files = [word for word in words[1:] if "/" in word or "." in word or word.isupper()]
        assert code == 2, words
        assert any(name in error for name in files) or "no runs" in error, error

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_right(command, parse):
    """In an empty folder each is refused for want of a file that it names, and for nothing else."""
    words = shlex.split(command)[1:]
    assert words[0] in VERBS
    if any(word.startswith(("weights/", "runs/")) for word in words if word.endswith(".yaml")):
        return  # a config that another command writes
    parse(words + of_tokenizers(words))


def test_options_are_right(parse):
    """Options that stand alone, of a tokenizer's recipe and of a generator's."""
    generators = [o for o in OPTIONS if re.match(r"--model\.(network|sampler|guidance|tokenizer\.path)", o)]
    assert len(generators) > 1
    words = [word for option in set(OPTIONS) - set(generators) for word in option.split()]
    assert len(words) > 10
    parse(["fit", "--config", "stage1.yaml", *words])
    words = ["fit", "--config", "dit.yaml", *(word for option in generators for word in option.split())]
    parse(words + of_tokenizers(words))


def of_tokenizers(words: list[str]) -> list[str]:
    keys = []
    if words[0] in FIT and {"dit.yaml", "dit_800ep.yaml"} & set(words):
        keys = list(OF_TOKENIZERS)[:2]
    if words[0] in FIT and "alitok_ar.yaml" in words:
        keys = list(OF_TOKENIZERS)[1:]
    return [word for key in keys if key not in words for word in (key, OF_TOKENIZERS[key])]


def test_configs_exist():
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    names = set(re.findall(r"--config ([\w/]+\.yaml)", text))
    names = {name for name in names if not re.match(r"(weights|runs)/", name)}
    assert [name for name in names if not (ROOT / "configs" / name).is_file()] == []


def test_the_pages_are_those_of_the_site():
    """A page that is in no menu is found by nobody."""
    site = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f" {page.relative_to(ROOT / 'docs')}\n" not in site] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_to_files(page):
    """The site's own links are checked by `make docs`."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    links += re.findall(r"`((?:aligntok|tests|benchmarks|docs|configs)/[\w/]*\.\w+)`", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_makefile_has_the_words():
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", ".github/workflows/test.yml"))
    words = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= words
    assert {word for word in words if word.startswith("test")} <= set(re.findall(r"[\w-]+", text))
