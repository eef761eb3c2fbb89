"""Hook of the documentation site: `{{ configs }}` becomes a list of all shipped configs with their opening comment."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the list of configs; point links to files of the repository at their text."""
    return markdown.replace("{{ configs }}", configs()) if "{{ configs }}" in markdown else markdown


def configs() -> str:
    """Return each folder of configs as a section, each config as its name, its comment and its text."""
    folder, sections = ROOT / "configs", []
    for part in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        sections.append(f"## {'Recipes' if part == folder else part.name + '/'}\n")
        for path in sorted(part.glob("*.yaml")):
            text = path.read_text()
            comment = " ".join(line[1:].strip() for line in opening(text))
            sections.append(f"??? note \"`{path.relative_to(folder)}`\"\n")
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
