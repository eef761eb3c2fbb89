"""README and docs: their code runs, their commands and options exist, their pages are in the menu."""

import ast
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from aligntok import cli
from aligntok.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OWN_PROJECT = {"encoder", "loss", "stage", "data"}  # pages whose code is tests/foreign, see test_foreign_project.py
NOT_RUN = "<!-- not run:"  # a comment in front of a block, with the reason
TOKENIZERS = "photos/stage1.yaml"  # the recipe on which an option is tried that stands alone; of generators dit.yaml
DIT = [
    "--model.network.latent_shape",
    "[32,16,16]",
    "--model.network.num_classes",
    "1000",
]  # it asks a tokenizer's file


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


QUOTED = sorted(quoted())
COMMANDS = [shlex.split(text)[1:] for text in QUOTED if re.match(r"aligntok [a-z]+ (?!\.\.\.)", text)]
OPTIONS = [text.split() for text in QUOTED if re.match(r"--(data|model|trainer|callbacks)\.\S+ \S+", text)]


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    if page.stem in OWN_PROJECT:
        return
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "python"):
        exec(compile(ast.parse(text), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("verb", sorted({words[0] for words in COMMANDS}))
def test_commands_and_their_options_exist(verb, capsys):
    assert verb in VERBS
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    known = capsys.readouterr().out
    options = {word.partition("=")[0] for words in COMMANDS if words[0] == verb for word in words if word[:2] == "--"}
    assert [option for option in options if not re.search(rf"{option.partition('.')[0]}\b", known)] == []


def options_by_recipe() -> dict[str, list[str]]:
    """Return all options of parts that the pages name (``--data.image_size 64``), by the recipe they are meant for."""
    found: dict[str, list[str]] = {TOKENIZERS: [], "dit.yaml": []}
    for words in COMMANDS:
        if words[0] in ("fit", "validate") and words[1] == "--config" and words[2] in ("stage1.yaml", TOKENIZERS):
            pairs = [pair for pair in pairwise(words) if re.match(r"--\w+\.", pair[0])]
            found.setdefault(words[2], []).extend(word for pair in pairs for word in pair)
    for option in OPTIONS:
        is_generators = re.match(r"--model\.(network|sampler|guidance|tokenizer\.path)", option[0])
        found["dit.yaml" if is_generators else TOKENIZERS].extend(option)
    found["dit.yaml"].extend(DIT)
    return {recipe: words for recipe, words in found.items() if words}


class Parsed(Exception):
    """The options are right; nothing was built."""


@pytest.mark.parametrize(("recipe", "options"), options_by_recipe().items(), ids=lambda value: str(value)[:20])
def test_options_of_parts_are_right(recipe, options, monkeypatch, capsys):
    def stop(self):
        raise Parsed

    monkeypatch.setattr(cli.RunCLI, "before_instantiate_classes", stop)
    with pytest.raises(Parsed):
        assert main(["fit", "--config", recipe, *options]) == 0, capsys.readouterr().err


def test_configs_exist():
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    names = set(re.findall(r"--config ([\w/]+\.yaml)", text))
    names = {name for name in names if not re.match(r"(weights|runs)/|FOLDER", name)}
    names -= set(re.findall(r"`(\w+\.yaml)`:\n\n```yaml", text))  # what the page tells the reader to write
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
    text = "\n".join(
        (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", ".github/workflows/test.yml")
    )
    words = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= words
    assert {word for word in words if word.startswith("test")} <= set(re.findall(r"[\w-]+", text))
