"""``aligntok report FOLDER``: one HTML page of what the runs in a folder show."""

from __future__ import annotations

from pathlib import Path

from aligntok.errors import UserError
from aligntok.files import write_text
from aligntok.programs.parser import Parser
from aligntok.programs.report.page import page
from aligntok.programs.report.runs import find_runs

__all__ = ["page", "report_command", "write_report"]


def report_command(arguments: list[str]) -> None:
    """Run ``aligntok report`` with the words that follow it.

    Raises:
        UserError: There is no such folder, no run in it, or the page cannot be written.
    """
    parser = Parser(
        prog="aligntok report",
        description="Write one self-contained HTML page with the numbers, pictures and curves of the runs in a folder.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="holds one folder for each run, as `aligntok fit --output` wrote it"
    )
    parser.add_argument("--output", metavar="FILE", help="the page (default: FOLDER/report.html)")
    options = parser.parse_args(arguments)
    print(write_report(options.folder, options.output))


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        folder: Holds the runs' folders, or is one.
        output: The page; by default ``report.html`` in the folder.

    Raises:
        UserError: There is no such folder, no run in it, or the page cannot be written.
    """
    folder = Path(folder)
    runs = find_runs(folder)
    path = Path(output) if output is not None else folder / "report.html"
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it, such as {path / 'report.html'}")
    write_text(path, page(folder, runs))
    return path
