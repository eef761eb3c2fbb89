"""The files that an installer, CI or a citation reads agree with each other."""

import re
from pathlib import Path

import yaml

from aligntok import __version__

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_oldest_versions_are_the_lower_bounds():
    required = PROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
    bound = r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"'
    needed, floors = dict(re.findall(bound, required)), dict(re.findall(bound, PROJECT))  # these with the extras
    assert len(needed) == len(required.strip().splitlines())
    oldest = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE))
    assert oldest.keys() >= needed.keys() - {"torch", "torchvision"}
    for name, version in oldest.items():
        assert f"{version}.".startswith(f"{floors[name]}."), name


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{__version__}"' in PROJECT
    assert citation["version"] == __version__
    assert re.findall(r"## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text())[0] == __version__


def test_ci_runs_the_pythons_that_we_name():
    named = re.findall(r"Python :: (3\.\d+)", PROJECT)
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == named
    assert f'requires-python = ">={named[0]}"' in PROJECT
