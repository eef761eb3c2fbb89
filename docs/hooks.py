"""Hook of the site: fills in what stands elsewhere.

`{{ configs }}` becomes all shipped configs, `{{ aligntok.data }}` what that package offers, `{{ benchmarks }}` the page
of benchmarks/.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the lists."""
    if "{{ configs }}" in markdown:
        return markdown.replace("{{ configs }}", configs())
    if "{{ benchmarks }}" in markdown:
        tables = (ROOT / "benchmarks/README.md").read_text().partition("\n")[2]
        return markdown.replace("../benchmarks/README.md#", "#").replace("{{ benchmarks }}", tables)
    return re.sub(r"{{ (aligntok\.\w+) }}", lambda match: members(match[1]), markdown)


def members(package: str) -> str:
    """Return an entry of the reference for each name that a package's `__init__` imports from its modules."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{name.name}" for node in imports for name in node.names]
    return "\n\n".join(f"::: {name}" for name in sorted(names, key=lambda name: name.rpartition(".")[2].lower()))


def configs() -> str:
    """Return each folder of configs as a section, each config as its name, its comment and its text."""
    folder, sections = ROOT / "configs", []
    for part in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        sections.append(f"## {'Recipes' if part == folder else part.name + '/'}\n")
        for path in sorted(part.glob("*.yaml")):
            text = path.read_text()
            comment = " ".join(line[1:].strip() for line in opening(text))
            sections.append(f'??? note "`{path.relative_to(folder)}`"\n')
            sections.append(f"    {comment}\n\n    ```yaml\n" + "".join(f"    {line}\n" for line in text.splitlines()))
            sections.append("    ```\n")
    return "\n".join(sections)


def opening(text: str) -> list[str]:
    """Return the comment lines at the head of a file, without the command that they show."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#  "):
            lines.append(line)
    return lines
