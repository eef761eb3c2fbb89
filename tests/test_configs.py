"""Every shipped YAML: parsed, built on the meta device, counted, and run for two steps at a debug size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from aligntok import cli
from aligntok.__main__ import main
from aligntok.callbacks import GenerationQuality, SampleGrid
from aligntok.layers import find_config, read_configs, shipped_configs
from aligntok.programs.steps import read_chain
from aligntok.weights import load_network, load_tokenizer
from aligntok.weights.lightningdit import to_lightningdit

ENCODE = {
    "laion/cache.yaml",
    "cache.yaml",
    "token_cache.yaml",
    "photos/cache.yaml",
    "quickstart/cache.yaml",
    "quickstart_alitok/cache.yaml",
}
SAMPLE = {"sample.yaml", "quickstart/samples.yaml", "quickstart_alitok/samples.yaml"}
CHAINS = {name for name in shipped_configs() if name.startswith("chains/")}
RECIPES = [
    name
    for name in shipped_configs()
    if name not in ENCODE | SAMPLE | CHAINS and "output" in yaml.safe_load(find_config(name).read_text())
]
OPTIONAL = {f"size/{kind}_vae.yaml" for kind in ("sd", "sdxl", "sd3", "flux")}
OPTIONAL |= {"size/d64.yaml", "size/debug.yaml", "data/shapes.yaml", "run/debug.yaml"}  # layers that a user adds
OPTIONAL |= {f"size/dit_{size}.yaml" for size in ("s", "b", "l", "1p0b", "1p6b", "debug")} | {
    "evaluate.yaml",
    "fdr6.yaml",
    "stage/offline_gan.yaml",
    "run/cpu.yaml",
    "run/8gpu.yaml",
    "run/slurm.yaml",
}
OPTIONAL |= {f"size/ar_{size}.yaml" for size in ("l", "xl", "debug")} | {"size/alitok_debug.yaml"}
OPTIONAL |= {"size/text_dit_tiny.yaml", "stage/wordllama.yaml"}
AFTER_OTHERS = {"quickstart_alitok/ar.yaml"}  # built from files of other runs
AFTER_OTHERS |= {f"quickstart/{name}.yaml" for name in ("stage1", "control", "stage2", "stage3", "dit")}
AFTER_OTHERS |= {"photos/dit.yaml"}
IMAGENET = ("--model.tokenizer", "null", "--model.network.latent_shape=[32,16,16]", "--model.network.num_classes=1000")
TOKENS = ("--model.network.codebook_size=4096", "--model.network.grid=[16,16]", "--model.network.num_prefix=16")
DEBUG = ("--config", "size/debug.yaml", "--config", "data/shapes.yaml", "--data.global_batch_size", "4")


def layers_of(name: str) -> set[str]:
    content = yaml.safe_load(find_config(name).read_text())
    return {name}.union(*(layers_of(layer) for layer in content.get("layers", [])))


def build(monkeypatch, tmp_path, *args: str) -> cli.RunCLI:
    """Parse and instantiate a command on the meta device without running it."""
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(cli.RunCLI, "before_instantiate_classes", lambda self: None)  # asks for a previous stage
    monkeypatch.setattr(cli.RunCLI, "after_instantiate_classes", lambda self: None)  # takes it
    if any(arg.startswith("quickstart") for arg in args):
        args = (*args, "--callbacks.rfid=null")  # its features are read from the encoder's run
    with torch.device("meta"):
        return cli.run(["fit", *args, "--config", "run/debug.yaml", "--output", str(tmp_path / "run")])


def test_every_layer_is_used():
    used = set().union(*(layers_of(name) for name in RECIPES))
    assert used | OPTIONAL | ENCODE | SAMPLE | CHAINS == set(shipped_configs())


@pytest.mark.parametrize("name", sorted(ENCODE))
def test_encode_takes_its_configs(name, tmp_path, capsys):
    words = ["--tokenizer", "no.ckpt", "--accelerator", "cpu", "--output", str(tmp_path / "cache")]
    assert main(["encode", "--config", name, *words]) == 2
    assert "there is no checkpoint no.ckpt" in capsys.readouterr().err


LIKE_OTHERS = {f"laion/stage{i}.yaml" for i in (1, 2, 3)} | {"t2i_flux_vae.yaml", "t2i_vavae.yaml"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ())
        for name in sorted(set(RECIPES) - AFTER_OTHERS)
    ],
)
def test_recipe_builds_on_meta(name, monkeypatch, tmp_path):
    tokens = (IMAGENET[0], IMAGENET[1], IMAGENET[3], *TOKENS) if "alitok_ar.yaml" in layers_of(name) else ()
    sizes = IMAGENET if "dit.yaml" in layers_of(name) else tokens
    sizes = IMAGENET[:3] if "stage/text_diffusion.yaml" in layers_of(name) else sizes
    model = build(monkeypatch, tmp_path, "--config", name, *sizes).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    groups = model.parameter_groups()
    assert all(group.parameters for group in groups.values())


@pytest.mark.parametrize(("extra", "latent_dim"), [((), 32), (("--config", "size/d64.yaml"), 64)])
def test_paper_sizes(extra, latent_dim, monkeypatch, tmp_path):
    stage = build(monkeypatch, tmp_path, "--config", "stage2.yaml", *extra).model
    spec = stage.tokenizer.spec
    assert spec.latent_shape == (latent_dim, 16, 16)
    assert spec.image_size == (256, 256)
    assert stage.tokenizer.encoder.input_size == (224, 224)

    def count(network):
        return sum(p.numel() for p in network.parameters())

    if latent_dim == 32:
        assert count(stage.tokenizer.decoder) == 41_418_659  # LDM's decoder with post_quant_conv, facts of VA-VAE
        assert count(stage.tokenizer.adapter) == 1024 * 32 + 32
    # ViT-L/14 without head: patches 3*14*14*1024+1024, class token and 257 -> 16*16+1 positions, 24 blocks, final norm
    block = 4 * 1024 + (3 * 1024 * 1024 + 3 * 1024) + (1024 * 1024 + 1024) + 2 * 4 * 1024 * 1024 + 5 * 1024 + 2 * 1024
    assert count(stage.tokenizer.encoder) == 3 * 14 * 14 * 1024 + 1024 + 1024 + 257 * 1024 + 24 * block + 2 * 1024
    assert count(stage.loss.adversarial.discriminator) == 2_765_633
    assert stage.measures_latents
    assert stage.semantic.weight == 1.0


def test_the_image_size_is_said_once(monkeypatch, tmp_path):
    """One key, and encoder, decoder, data, losses and metrics follow; checkpoints hold plain numbers."""
    size = ("--config", "stage/offline_gan.yaml", "--data.image_size", "96")
    cli = build(
        monkeypatch, tmp_path, "--config", "photos/stage2.yaml", *size, "--model.tokenizer.adapter.latent_dim=6"
    )
    assert cli.datamodule.image_size == cli.model.tokenizer.encoder.image_size == (96, 96)
    assert cli.model.tokenizer.spec.image_size == (96, 96)
    assert cli.model.tokenizer.spec.latent_shape == (6, 12, 12)
    assert re.findall(r"image_size=(\w+)", str(cli.config)) == ["96"] * 4  # encoder, perceptual, data, features
    recipe = cli.model.hparams["tokenizer"]["init_args"]
    assert (recipe["encoder"]["init_args"]["image_size"], recipe["decoder"]["init_args"]["latent_dim"]) == (96, 6)
    discrete = build(
        monkeypatch,
        tmp_path,
        "--config",
        "quickstart_alitok/stage1.yaml",
        *size[2:],
        "--model.tokenizer.encoder.num_prefix=24",
    ).model.tokenizer
    assert discrete.spec.image_size == (96, 96)


def test_layers_that_do_not_contradict_each_other_come_in_any_order():
    for name in RECIPES:
        layers = yaml.safe_load(find_config(name).read_text())["layers"]
        layers = [layer for layer in layers if layer.partition("/")[0] in ("base.yaml", "stage", "size", "data")]
        if len(layers) > 2:
            assert read_configs(*layers) == read_configs(*reversed(layers)), name


@pytest.mark.parametrize(("name", "epochs"), [("stage1.yaml", 15), ("stage2.yaml", 31), ("stage3.yaml", 15)])
def test_comment_on_epochs_is_what_the_config_computes(name, epochs, monkeypatch, tmp_path):
    config = yaml.safe_load(find_config(name).read_text())
    data = yaml.safe_load(find_config("data/imagenet.yaml").read_text())["data"]
    images = config["trainer"]["max_steps"] * data["global_batch_size"]
    assert images // 1_281_167 == epochs
    assert f"{epochs} epochs" in find_config(name).read_text()


@pytest.mark.parametrize(("name", "epochs"), [("dit.yaml", 64), ("dit_800ep.yaml", 800)])
def test_generator_recipes_are_lightningdits(name, epochs, monkeypatch, tmp_path):
    cli = build(monkeypatch, tmp_path, "--config", name, *IMAGENET)
    network = cli.model.network
    qk_norm = 28 * 2 * 72 if epochs == 800 else 0
    assert sum(p.numel() for p in network.parameters()) + network.positions.numel() == 675_256_736 + qk_norm
    steps = yaml.safe_load(find_config(name).read_text())["trainer"]["max_steps"]
    assert cli.datamodule.global_batch_size == 1024
    assert abs(steps * 1024 / 1_281_167 - epochs) < 1
    assert f"{epochs} epochs" in find_config(name).read_text()
    assert (cli.model.objective.uniform_from or 0) < steps


def program(verb: str, name: str, *args: str) -> int:
    return main([verb, "--config", name, *args, "--accelerator", "cpu", "--devices", "1"])


def fit(name: str, *args: str) -> Path:
    config = yaml.safe_load(find_config(name).read_text())
    assert main(["fit", "--config", name, *args, "--config", "run/debug.yaml"]) == 0
    checkpoint = Path(config["output"]) / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    return checkpoint


@pytest.fixture(scope="module")
def paper_runs(tmp_path_factory, judge_weights):
    """The three stages of the paper, two steps each, at a debug size."""
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = (*DEBUG, "--callbacks.rfid=null")  # Inception is slow
        first = fit("stage1.yaml", *options)
        second = fit("stage2.yaml", *options, "--init_from", str(first))
        fit("stage3.yaml", *options, "--init_from", str(second))
    return folder


def test_paper_recipes_run(paper_runs):
    tokenizer = load_tokenizer(paper_runs / "runs/stage3/checkpoints/last.ckpt")
    assert tokenizer(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.slow
def test_the_paper_measures_rfid(paper_runs, monkeypatch):
    monkeypatch.chdir(paper_runs)
    fit("stage3.yaml", *DEBUG, "--output", "runs/rfid", "--init_from", "runs/stage2/checkpoints/last.ckpt")
    assert "val/rfid" in Path("runs/rfid/run.json").read_text()


@pytest.fixture
def few_samples(monkeypatch):
    """Measure few samples, and let pass what a tokenizer of two steps reconstructs."""

    def patch(callback, **values):
        setup = callback.setup
        monkeypatch.setattr(
            callback, "setup", lambda self, *args, **stage: vars(self).update(values) or setup(self, *args, **stage)
        )

    patch(GenerationQuality, num_samples=24, batch_size=24)
    patch(SampleGrid, per_class=1)


@pytest.mark.slow
def test_generator_recipes_run(paper_runs, monkeypatch, few_samples, capsys):
    monkeypatch.chdir(paper_runs)
    tokenizer = "runs/stage3/checkpoints/last.ckpt"
    images = ("--images", "aligntok.data.Shapes", "--images.num_images", "64", "--images.image_size", "32")
    assert program("encode", "cache.yaml", "--tokenizer", tokenizer, *images, "--min_psnr", "0") == 0
    small = ("--config", "size/dit_debug.yaml", "--data.global_batch_size", "4")
    checkpoint = fit("dit.yaml", *small)
    fit("dit_800ep.yaml", *small)
    ours = ("--model.tokenizer", "aligntok.weights.load_tokenizer", "--model.tokenizer.path", tokenizer)
    ours = (*ours, "--model.network.latent_shape=[4,2,2]", "--model.network.num_classes=12")
    fit("lightningdit.yaml", *small, *ours)

    samples = (*small[:2], "--config", "sample.yaml", "--num_samples", "3")
    assert program("sample", "dit.yaml", *samples, "--classes", "[2,7]", "--ckpt_path", str(checkpoint)) == 0
    names = ["000000_class2.png", "000001_class7.png", "000002_class2.png"]
    assert sorted(path.name for path in Path("runs/samples/png").iterdir()) == names
    assert Path("runs/samples/samples_3x32x32x3.npz").is_file()
    assert yaml.safe_load(Path("runs/samples/sample.yaml").read_text())["precision"] == "bf16-mixed"  # the recipe's
    assert program("sample", "dit.yaml", *samples[:2], *samples[4:], "--ckpt_path", str(checkpoint)) == 0
    assert len(list(Path("runs/dit/samples/png").iterdir())) == 3  # not among the files of the run
    drawn = ["--num_samples", "3", "--precision", "bf16-mixed", "--accelerator", "cpu", "--ckpt_path", str(checkpoint)]
    assert main(["sample", *drawn, "--output", "alone", "--classes", "[2,7]"]) == 0  # the checkpoint says the rest
    assert [(Path("alone/png") / name).read_bytes() for name in names] == [
        (Path("runs/samples/png") / name).read_bytes() for name in names
    ]

    torch.save({"ema": to_lightningdit(load_network(checkpoint))}, "theirs.pt")
    assert (
        program(
            "sample",
            "lightningdit.yaml",
            *samples,
            *ours,
            "--init_from",
            "theirs.pt",
            "--output",
            "theirs",
        )
        == 0
    )
    capsys.readouterr()
    measured = ["--config", "evaluate.yaml", "--config", "run/debug.yaml", "--ckpt_path", str(checkpoint)]
    assert main(["validate", "--config", "dit.yaml", *small, *measured]) == 2
    assert "wants 50,000 images, 24" in capsys.readouterr().err
    wrong = ["--model.network.latent_shape", "[8,2,2]", "--config", "run/debug.yaml", "--output", "wrong"]
    assert main(["fit", "--config", "dit.yaml", *small, *wrong]) == 2
    words = "model: network.latent_shape [8, 2, 2] differs from the latents of tokenizer [4, 2, 2]"
    assert f"aligntok: error: {words}" in capsys.readouterr().err


@pytest.mark.slow  # a minute: every step of the chain
def test_quickstart_recipes_run(in_folder, few_samples):
    third, generator = (f"runs/quickstart/{name}/checkpoints/last.ckpt" for name in ("stage3", "dit"))
    guided = ["--model.guidance.guide", "aligntok.weights.load_network", "--model.guidance.guide.path", generator]
    debug, cpu = ["--config", "run/debug.yaml"], ["--accelerator", "cpu", "--devices", "1"]
    small = {"encode": [*cpu, "--min_psnr", "0"], "sample": [*cpu, *guided, "--num_samples", "20"]}
    for step in read_chain("chains/quickstart.yaml", added={"fit": debug, "validate": debug, **small}):
        assert main(step.words) == 0
        if step.verb == "fit":
            assert torch.load(step.folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert "val/rfd_digits" in (in_folder / "runs/quickstart/stage3/validate.json").read_text()
    values = json.loads((in_folder / "runs/quickstart/dit/validate.json").read_text())["metrics"]
    for name in ("gfd_digits", "precision_digits", "class_agreement"):
        assert {f"val/{name}", *(f"val/{name}_steps{n}" for n in (2, 4, 8, 32))} <= values.keys()
    last = json.loads((in_folder / "runs/quickstart/dit/run.json").read_text())["metrics"]
    assert last["val/gfd_digits"] == pytest.approx(values["val/gfd_digits"], rel=1e-4)
    average = torch.load(generator, weights_only=True)["state_dict"]
    network = load_network(generator).state_dict()
    assert {f"network.{key}" for key in network} == average.keys()
    assert all(torch.equal(value, average[f"network.{key}"]) for key, value in network.items())
    assert load_tokenizer(generator).fingerprint() == load_tokenizer(third).fingerprint()
    samples = in_folder / "runs/quickstart/samples"
    assert len(list((samples / "png").iterdir())) == 20
    record = json.loads((samples / "samples.json").read_text())
    assert record["guide"] == record["network"]  # itself here; without a guide it would be null
    assert (in_folder / "runs/quickstart/report.html").is_file()
    root = Path(__file__).parent.parent
    (block,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    notebook = json.loads((root / "docs/start.ipynb").read_text())
    names = {}
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), names)
    assert names["samples"].shape == (40, 3, 32, 32)


def test_saved_config_is_the_run(in_folder):
    fit("quickstart/encoder.yaml")
    saved = Path("runs/quickstart/encoder/config.yaml")
    assert main(["fit", "--config", str(saved), "--output", "again"]) == 0
    first, second = (
        torch.load(p, weights_only=True)
        for p in (saved.parent / "checkpoints/last.ckpt", "again/checkpoints/last.ckpt")
    )
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])
