"""What a laptop makes of a folder of 2,000 photographs: the commands of `aligntok new`, timed, and a control.

    pip install 'aligntok[offline]'
    python benchmarks/photos.py

The images are tiles of 36 photographs that Debian's wallpaper packages bring (`apt-get download`, nothing is
installed): a class for each photograph, 55 or 56 tiles, no two of which share a pixel, so what is held out was never
seen. Then the commands that `aligntok new` prints, one after the other: three stages, report, latents, diffusion
transformer, samples; and the control, stage 1 for as many more steps as stage 2 has. Started again after an
interruption, it goes on: commands that ended are not repeated, and a run that was cut off continues.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ("mate-backgrounds", "plasma-workspace-wallpapers", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
PHOTOGRAPHS = (  # names of files, or of the folders that hold them in several sizes
    *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings"),
    *("Wood", "YellowFlower", "BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf", "Grey", "Kite"),
    *("OneStandsOut", "Path", "summer_1am", "Bridge_by", "Dragonfly_by", "Picture_0B", "Picture_1A", "Wine_by"),
    *("aitzgorri", "free_by", "friends_by", "greentock", "life_by", "picosdeeuropa", "seeding", "sunset", "Kleiber"),
)
NUM_IMAGES, MAX_SIDE = 2000, 256
COLUMNS = {"psnr": "PSNR (dB)", "probe": "probe (%)", "rfd_efficientnet_lite0": "rFD (Lite0)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/photos_benchmark"), help="of images, config and runs")
    parser.add_argument("--photographs", type=Path, help="folder with the packages' files, if they are there already")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    if not Path("wallpapers").is_dir():
        make_images(args.photographs, Path("wallpapers"))
    times: dict[str, dict[str, float]] = (
        json.loads(Path("times.json").read_text()) if Path("times.json").is_file() else {}
    )
    if not Path("wallpapers.yaml").is_file():
        lines = subprocess.run(aligntok("new wallpapers"), check=True, capture_output=True, text=True).stdout
        Path("new.txt").write_text(lines)
    print(Path("new.txt").read_text())
    commands = [line.strip() for line in Path("new.txt").read_text().splitlines() if line.startswith("  aligntok")]
    stage1 = next(command for command in commands if "stage1" in command)
    control = stage1.replace(
        "runs/wallpapers/stage1", "runs/control --init_from runs/wallpapers/stage1/checkpoints/last.ckpt"
    )
    for command in [*commands, control]:
        if command in times:
            continue
        resumed = " --ckpt_path last" if " fit " in command else ""
        began, used = time.perf_counter(), cpu_seconds()
        subprocess.run(aligntok(command.removeprefix("aligntok ") + resumed), check=True)
        times[command] = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}
        Path("times.json").write_text(json.dumps(times, indent=1))
    show(times)


def make_images(photographs: Path | None, folder: Path) -> None:
    """Cut ``NUM_IMAGES`` tiles out of the photographs, into a class folder each."""
    if photographs is None:
        with tempfile.TemporaryDirectory() as name:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=name, check=True)
            for package in Path(name).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, name], check=True)
            make_images(Path(name), folder)
        return
    files = [path for path in sorted(photographs.rglob("*.[jp][pn]g")) if not path.is_symlink()]
    for number, name in enumerate(PHOTOGRAPHS):
        image = max((Image.open(path) for path in files if is_of(path, name)), key=lambda image: image.width)
        first, last = (NUM_IMAGES * k // len(PHOTOGRAPHS) for k in (number, number + 1))
        (folder / name).mkdir(parents=True)
        for index, tile in enumerate(tiles(image.convert("RGB"), last - first)):
            tile.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            tile.save(folder / name / f"{index:03}.jpg", quality=95)


def is_of(path: Path, name: str) -> bool:
    return path.stem.startswith(name) or path.parts[-4:-1] == (name, "contents", "images")


def tiles(image: Image.Image, count: int) -> list[Image.Image]:
    """Return ``count`` squares of an image, as large as possible without one lying over another, in a random order."""
    side = next(s for s in range(min(image.size), 0, -1) if (image.width // s) * (image.height // s) >= count)
    columns = image.width // side
    chosen = np.random.default_rng(0).permutation(columns * (image.height // side))[:count]
    return [
        image.crop((k % columns * side, k // columns * side, (k % columns + 1) * side, (k // columns + 1) * side))
        for k in chosen.tolist()
    ]


def aligntok(words: str) -> list[str]:
    return [sys.executable, "-m", "aligntok", *shlex.split(words)]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def show(times: dict[str, dict[str, float]]) -> None:
    """Print the table of the runs, the seconds of each command, and what was claimed."""
    runs = {name: Path(f"runs/wallpapers/{name}") for name in ("stage1", "stage2", "stage3")} | {
        "control": Path("runs/control")
    }
    metrics = {name: json.loads((run / "run.json").read_text())["metrics"] for name, run in runs.items()}
    print(f"| run | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
    for name, values in metrics.items():
        cells = (f"{values[f'val/{key}'] * (100 if key == 'probe' else 1):.2f}" for key in COLUMNS)
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| command | seconds | CPU seconds |\n|---|---|---|")
    for command, spent in times.items():
        print(f"| `{command}` | {spent['seconds']:.0f} | {spent['cpu_seconds']:.0f} |")
    psnr = {name: values["val/psnr"] for name, values in metrics.items()}
    kept = metrics["stage2"]["val/probe"] / metrics["stage1"]["val/probe"]
    gains = [f"{psnr['stage2'] - psnr[run]:+.2f} dB" for run in ("stage1", "control")]
    print(f"\nstage 2: {gains[0]} from stage 1, {gains[1]} from the control; it keeps {kept:.2f} of stage 1's probe")


if __name__ == "__main__":
    main()
