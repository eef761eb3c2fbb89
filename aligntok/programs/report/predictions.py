"""What ``aligntok predict`` left in the folders beside the runs: cached latents, and samples of generators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntok.programs.report.runs import Run, read_yaml, setting, wrote

CONFIG = "predict.yaml"


@dataclass
class Prediction:
    """A folder that ``aligntok predict`` wrote, its config, and the run whose checkpoint it used."""

    folder: Path
    config: dict[str, Any]
    run: Run | None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that wrote it."""
        return self.config.get("ckpt_path") or None

    def is_at(self, folder: object) -> bool:
        """Tell whether a config that names this folder means this: it is here, or was when it was written."""
        places = {self.folder.resolve(), Path(self.config.get("output") or self.folder).resolve()}
        return isinstance(folder, str) and Path(folder).resolve() in places


def find_predictions(folder: Path, runs: list[Run]) -> list[Prediction]:
    """Read the predictions in a folder, by name."""
    found = []
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        config = read_yaml(path)
        run = next((run for run in runs if wrote(run, setting(config, "ckpt_path"))), None)
        found.append(Prediction(path.parent, config, run))
    return found
