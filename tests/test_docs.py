"""What the documentation shows works: Python is run, and commands name verbs, options and configs that exist."""

import ast
import re
from pathlib import Path

import pytest

from aligntok.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "extending.md")  # tested with its project
NOT_RUN = "<!-- not run:"  # a comment in front of a block, with the reason


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"([^\n]*)\n+```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return [text for before, text in found if not before.startswith(NOT_RUN)]


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "python"):
        exec(compile(ast.parse(text), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_commands_name_what_exists(page):
    commands = re.findall(r"\baligntok ([a-z]+)((?: [^`|\n]*)?)", page.read_text())
    for verb, words in commands:
        if words.startswith(" --") or " --config" in words:
            assert verb in VERBS, f"aligntok {verb}{words}"
        for config in re.findall(r"--config (\S+\.yaml)", words):
            if not re.match(r"(weights|runs|\.\.\.)", config):
                assert (ROOT / "configs" / config).is_file(), config


def test_the_pages_are_those_of_the_site():
    """A page that is in no menu is found by nobody."""
    site = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f" {page.relative_to(ROOT / 'docs')}\n" not in site] == []
