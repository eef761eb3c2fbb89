"""Every shipped recipe on two processes by Lightning's own launcher: `--trainer.devices 2 --trainer.strategy ddp`.

Each runs two steps at a debug size by the command that its header or the Makefile says, after the runs and the cache
that this command and the recipe itself name, which are made by two processes too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from aligntok.data import Shapes
from aligntok.layers import find_config, read_configs, shipped_configs

LAST = "checkpoints/last.ckpt"
CACHES = [name for name in shipped_configs() if name.endswith("cache.yaml")]
RECIPES = [
    name
    for name in shipped_configs()
    if {"output", "model"} <= (config := read_configs(name)).keys() and "num_samples" not in config
]
SECONDS = {"quickstart/encoder.yaml", "quickstart/stage1.yaml", "stage1.yaml", "alitok_stage1.yaml"}  # in `make test`
MADE_BY = {read_configs(name)["output"]: name for name in (*RECIPES, *CACHES)}
MADE_BY["runs/quickstart_alitok/encoder"] = "quickstart/encoder.yaml"

MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text()
MAKEFILE = MAKEFILE.replace("$(FIT)", "aligntok fit --config").replace("$(LAST)", LAST)
MAKEFILE = MAKEFILE.replace("$(RUN)", "runs/quickstart").replace("$(ALITOK)", "runs/quickstart_alitok")

PHOTOS = ("--data.train.root", "photos")
PAPER = (*PHOTOS, "--data.val.root", "photos", "--data.image_size", "32", "--data.global_batch_size", "4")
STAGE3 = ("--model.tokenizer.path", f"runs/stage3/{LAST}", "--model.network.latent_shape=[4,2,2]")
CACHED = ("--data.val", "0.2", "--data.global_batch_size", "4")
SMALL = {  # options for every recipe that has this layer, or is it
    "stage/lpips_gan.yaml": ("--config", "size/debug.yaml", *PAPER),
    "stage/convnext_gan.yaml": ("--config", "size/alitok_debug.yaml", *PAPER),
    "data/folder.yaml": (*PHOTOS, "--data.global_batch_size", "2"),
    "data/imagenet_latents.yaml": ("--config", "size/dit_debug.yaml", *CACHED),
    "data/imagenet_tokens.yaml": ("--config", "size/ar_debug.yaml", *CACHED),
    "quickstart/dit.yaml": ("--callbacks.gfid.num_samples", "40", "--callbacks.gfid.batch_size", "20"),
    "quickstart_alitok/ar.yaml": ("--callbacks.gfid.num_samples", "40", "--callbacks.gfid.batch_size", "20"),
    "photos/dit.yaml": CACHED,
    "lightningdit.yaml": ("--model.tokenizer", "aligntok.weights.load_tokenizer", *STAGE3),  # in place of VA-VAE's
    "cache.yaml": ("--images.root", "photos"),
    "token_cache.yaml": ("--images.root", "photos"),
}
ENCODE = ("--min_psnr", "0", "--num_workers", "0", "--devices", "2", "--accelerator", "cpu")
FIT = ("--config", "run/debug.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp")


def layers_of(name: str) -> set[str]:
    content = yaml.safe_load(find_config(name).read_text())
    return {name}.union(*map(layers_of, content.get("layers", ())))


class Runs:
    """Runs of recipes in one folder, each made once, when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: dict[Path, str] = {}
        for index in range(20):
            photo = folder / "photos" / f"class{index % 2}" / f"{index}.jpg"
            photo.parent.mkdir(parents=True, exist_ok=True)
            Shapes(20, (150, 200))[index][0].save(photo)

    def make(self, name: str, output: str | None = None) -> str:
        """Run a recipe, or write a cache, after what it needs, on two processes; return what was printed on stderr."""
        config = read_configs(name)
        usual = config.pop("output")
        folder = self.folder / (output or usual)
        if folder in self.done:
            return self.done[folder]
        verb = "encode" if name in CACHES else "fit"
        options = [word for layer in sorted(layers_of(name)) for word in SMALL.get(layer, ())]
        commands = find_config(name).read_text() + MAKEFILE
        said = re.search(rf"aligntok {verb} --config {name} .*?(--(init_from|tokenizer) \S+)", commands)
        if said:
            options += said[1].split()
        for path in re.findall(r"\bruns/\S+", f"{yaml.safe_dump(config)} {' '.join(options)}"):
            self.need(path)
        if output not in (None, usual):
            options += ["--output", output]
        options += FIT if verb == "fit" else ENCODE
        command = [sys.executable, "-m", "aligntok", verb, "--config", name, *options]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-3000:]}"
        assert "litlogger" not in result.stdout + result.stderr  # Lightning's advice, and its tips
        self.done[folder] = result.stderr
        if verb == "fit":
            assert torch.load(folder / LAST, weights_only=True)["global_step"] == 2
            assert re.search("global batch: .* = 2 x ", result.stdout)
        return result.stderr

    def need(self, path: str) -> None:
        """Run what writes a file or a cache."""
        for output, name in MADE_BY.items():
            if Path(path).is_relative_to(output):
                self.make(name, output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, judge_weights):
    return Runs(tmp_path_factory.mktemp("launch"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SECONDS else pytest.mark.slow) for name in RECIPES]
)
def test_two_processes_run_the_recipe(runs, name):
    assert "sync_dist" not in runs.make(name)
