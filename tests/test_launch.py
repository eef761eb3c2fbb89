"""Every shipped recipe on two processes by Lightning's own launcher: `--trainer.devices 2 --trainer.strategy ddp`.

Each runs two steps at a debug size by the command that its header or a chain says, after the runs and the cache
that this command and the recipe itself name. `aligntok encode` launches two processes by Fabric.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from aligntok.__main__ import main
from aligntok.data import Shapes
from aligntok.layers import find_config, read_configs, shipped_configs
from aligntok.programs.steps import read_chain

LAST = "checkpoints/last.ckpt"
CACHES = [name for name in shipped_configs() if name.endswith("cache.yaml")]
RECIPES = [
    name
    for name in shipped_configs()
    if {"output", "model"} <= (config := read_configs(name)).keys() and "num_samples" not in config
]
FAST = {"photos/stage1.yaml"}  # in `make test`: with EMA, and nothing has to run before it
MADE_BY = {read_configs(name)["output"]: name for name in (*RECIPES, *CACHES)}
MADE_BY["runs/quickstart_alitok/encoder"] = "quickstart/encoder.yaml"

CHAINS = [step.command for name in ("quickstart", "quickstart_alitok") for step in read_chain(f"chains/{name}.yaml")]
ROOT = Path(__file__).parents[1]

PHOTOS = ("--data.train.root", "photos")
PAPER = (*PHOTOS, "--data.val.root", "photos", "--data.image_size", "32", "--data.global_batch_size", "4")
TEXT = (
    "--data.image_size",
    "16",
    "--model.tokenizer",
    "tests.text_parts.tokenizer",
    "--model.network.latent_shape=[4,4,4]",
)
STAGE3 = ("--model.tokenizer.path", f"runs/stage3/{LAST}", "--model.network.latent_shape=[4,2,2]")
CACHED = ("--data.val", "0.2", "--data.global_batch_size", "4")
CAPTIONS = ("--data.train", "aligntok.data.CaptionedFolder", *PHOTOS, *CACHED)
SMALL = {  # options for every recipe that has this layer, or is it
    "stage/lpips_gan.yaml": ("--config", "size/debug.yaml", *PAPER),
    **{f"laion/stage{i}.yaml": ("--config", "size/debug.yaml", "--data.image_size", "32") for i in (1, 2, 3)},
    "data/captions.yaml": CAPTIONS,
    "data/captioned_folder.yaml": CAPTIONS,
    "stage/text_diffusion.yaml": ("--config", "size/dit_debug.yaml", "--config", "stage/wordllama.yaml"),
    "t2i.yaml": TEXT,
    "t2i_b.yaml": TEXT,
    "t2i_from_lightningdit.yaml": ("--data.global_batch_size", "8"),
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
    "laion/cache.yaml": ("--images", "aligntok.data.CaptionedFolder", "--images.root", "photos", "--num_workers", "0"),
}
ENCODE = ("--min_psnr", "0", "--num_workers", "0", "--accelerator", "cpu", "--devices", "1")
FIT = ("--config", "run/debug.yaml")


def layers_of(name: str) -> set[str]:
    content = yaml.safe_load(find_config(name).read_text())
    return {name}.union(*map(layers_of, content.get("layers", ())))


class Runs:
    """Runs of recipes in the current folder."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        for index in range(20):
            photo = Path("photos", f"class{index % 2}", f"{index}.jpg")
            photo.parent.mkdir(parents=True, exist_ok=True)
            Shapes(20, (150, 200))[index][0].save(photo)
            photo.with_suffix(".txt").write_text(f"a shape of number {index}")

    def command(self, name: str, output: str) -> list[str]:
        """Return the command of a recipe, or of a cache, after what it needs was run by one process, in this one."""
        config = read_configs(name)
        config.pop("output")
        verb = "encode" if name in CACHES else "fit"
        layers = layers_of(name)
        layers -= {"stage/lpips_gan.yaml"} if "data/captions.yaml" in layers else set()  # whose images are others
        options = [word for layer in sorted(layers) for word in SMALL.get(layer, ())]
        commands = "\n".join([find_config(name).read_text(), *CHAINS])
        said = re.search(rf"aligntok {verb} --config {name} .*?(--(init_from|tokenizer) \S+)", commands)
        if said and "runs/" in said[1]:  # else it is a published file
            options += said[1].split()
        for path in re.findall(r"\bruns/\S+", f"{yaml.safe_dump(config)} {' '.join(options)}"):
            self.need(path)
        return [verb, "--config", name, *options, "--output", output, *(ENCODE if verb == "encode" else FIT)]

    def need(self, path: str) -> None:
        """Run what writes a file or a cache."""
        for output, name in MADE_BY.items():
            if Path(path).is_relative_to(output) and output not in self.done:
                assert main(self.command(name, output)) == 0
                self.done.add(output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, judge_weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("launch"))
        yield Runs()


def launch(command: list[str]) -> str:
    """Run a command in processes of its own and return what it printed."""
    words = [sys.executable, "-m", "aligntok", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # rounds like the tests
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stderr[-3000:]}"
    printed = result.stdout + result.stderr
    assert "litlogger" not in printed  # Lightning's advice, and its tips
    assert "sync_dist" not in printed
    return printed


def marked(names: list[str]):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(RECIPES))
def test_two_processes_run_the_recipe(runs, name):
    command = runs.command(name, f"two/{name}")
    assert re.search(
        "global batch: .* = 2 x ", launch([*command, "--trainer.devices", "2", "--trainer.strategy", "ddp"])
    )
    assert torch.load(f"two/{name}/{LAST}", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", marked(CACHES))
def test_two_processes_write_the_cache_of_one(runs, name):
    launch([*runs.command(name, f"two/{name}"), "--devices", "2"])
    one = read_configs(name)["output"]
    runs.need(one)
    files = [{path.name: path.read_bytes() for path in Path(at).glob("*.safetensors")} for at in (one, f"two/{name}")]
    assert files[0]
    assert files[0] == files[1]
