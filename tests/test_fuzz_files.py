"""Damaged files: whatever is in one, its reader goes on, or says in a line or two which file it is, and runs nothing.

Each case takes a small good folder of a kind, damages one of its files by a seeded hand, and reads it as users do.
"""

import json
import os
import random
import shutil
import signal
import traceback
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aligntok.__main__ import last_message
from aligntok.data import ImageFolder, LatentDataModule, LatentShards, Shapes, TokenShards
from aligntok.data.labels import ClassLabels
from aligntok.errors import UserError
from aligntok.flow import Euler, Guidance
from aligntok.metrics import GenerationMetrics, Reference
from aligntok.programs import evaluate as evaluation
from aligntok.programs.encode import Views, encode
from aligntok.programs.fabric import make_fabric
from aligntok.programs.report import write_report
from aligntok.programs.sample import sample
from aligntok.stages import load_generator
from aligntok.weights import load_tokenizer
from aligntok.weights.checkpoint import write_exported

MAX_SECONDS, MAX_LINES, MAX_CHARACTERS = 20, 3, 400
NAMED = 0.98  # of the errors say the file's name
SMALL, LARGE = 44, 500  # cases
SEED = int(os.environ.get("FUZZ_SEED", "0"))


# --- good folders


def write_images(folder, tiny):
    for number in range(12):
        suffix = ("png", "jpg", "webp", "bmp", "tif", "ppm")[number % 6]
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number:02d}.{suffix}")


def write_latents(folder, tiny):
    encode(tiny.measured(), Shapes(16, 16), folder, Views(), make_fabric("cpu", 1), shard_size=8, min_psnr=0.0)
    (folder / "check.png").unlink()


def write_tokens(folder, tiny):
    encode(tiny.discrete(), Shapes(16, 16), folder, Views("ten"), make_fabric("cpu", 1), shard_size=8, min_psnr=0.0)
    (folder / "check.png").unlink()


def write_lightningdit(folder, tiny):
    for number in range(2):
        latents = torch.randn(8, 4, 4, 4)
        content = {"latents": latents, "latents_flip": -latents, "labels": torch.arange(8) % 3}
        save_file(content, folder / f"latents_rank00_shard{number:03d}.safetensors")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")


def write_unfinished(folder, tiny):
    write_latents(folder, tiny)
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["shards"]:
        (folder / record["file"]).with_suffix(".json").write_text(json.dumps(record))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": [], "statistics": None}))


def recipe(kind, **arguments):
    return {"class_path": f"aligntok.networks.{kind}", "init_args": arguments}


def tokenizer_recipe():
    vit = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = {"image_size": 16, "downsampling": 4, "weights": None, "model_args": vit}
    decoder = {"latent_dim": 4, "width": 8, "multipliers": [1, 1, 2], "num_blocks": 1, "num_groups": 4}
    return recipe(
        "Tokenizer",
        encoder=recipe("VisionEncoder", name="vit_tiny_patch16_224", **encoder),
        adapter=recipe("LinearAdapter", width=16, latent_dim=4),
        decoder=recipe("ConvDecoder", **decoder),
    )


def tokenizer_state(tiny):
    return {f"tokenizer.{key}": value for key, value in tiny.measured().state_dict().items()}


def write_tokenizer(folder, tiny):
    state, parts = tokenizer_state(tiny), {"tokenizer": tokenizer_recipe()}
    average = {"averages": {"0.9": state}, "averaging_state": {"decays": [0.5, 0.9]}, "current_model_state": state}
    stage = {"aligntok_stage": "LatentAlignment", "hyper_parameters": parts, "epoch": 1}
    torch.save({"state_dict": state, **stage, **average}, folder / "last.ckpt")


def write_export(folder, tiny):
    write_exported(folder / "tokenizer.safetensors", tokenizer_state(tiny), "LatentAlignment", {
        "tokenizer": tokenizer_recipe()
    })  # fmt: skip


def write_generator(folder, tiny):
    write_tokenizer(folder, tiny)
    (folder / "last.ckpt").rename(folder / "tokenizer.ckpt")
    sizes = {"latent_shape": [4, 4, 4], "num_classes": 12, "width": 16, "depth": 2, "num_heads": 2}
    arguments = {
        "_class_path": "aligntok.stages.LatentDiffusion",
        "network": recipe("DiT", **sizes),
        "tokenizer": {"class_path": "aligntok.weights.load_tokenizer", "init_args": {"path": "tokenizer.ckpt"}},
        "sampler": {"class_path": "aligntok.flow.Euler", "init_args": {"num_steps": 2}},
    }
    state = {f"network.{key}": value for key, value in tiny.dit().state_dict().items()}
    stage = {"aligntok_stage": "LatentDiffusion", "hyper_parameters": arguments}
    torch.save({"state_dict": state, **stage}, folder / "last.ckpt")


def write_evaluation(folder, tiny):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images[:30], arr_1=np.arange(30) % 3)
    np.savez(folder / "real.npz", arr_0=images[30:], mu=np.zeros(48), sigma=np.eye(48))
    features = torch.from_numpy(generator.normal(size=(60, 48)))
    reference = Reference(features.mean(0), features.T.cov(), 60, "real", "tiny", sample=features, image_size=(8, 8))
    reference.save(folder / "reference.safetensors")
    (folder / "evaluation.json").write_text(json.dumps([{"samples": "samples.npz", "conditions": "", "values": {}}]))


def write_runs(folder, tiny):
    for name, psnr in (("stage1", 25.0), ("stage2", 26.0)):
        run = folder / name
        (run / "images").mkdir(parents=True)
        model = {"class_path": "aligntok.stages.LatentAlignment", "init_args": {"tokenizer": tokenizer_recipe()}}
        data = {"val": {"class_path": "aligntok.data.Digits"}, "image_size": 16}
        start = str(folder / "stage1/checkpoints/last.ckpt") if name == "stage2" else None
        config = {"model": model, "output": str(run), "init_from": start, "trainer": {"max_steps": 20}, "data": data}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        metrics = {"val/psnr": psnr, "val/probe": 0.9}
        record = {"stage": "LatentAlignment", "steps": 20, "seconds": 75.0, "metrics": metrics}
        record["parameters"] = {"encoder": [0, 820352], "decoder": [1632907, 0]}
        (run / "run.json").write_text(json.dumps(record))
        validation = {"checkpoint": str(run / "checkpoints/last.ckpt"), "metrics": metrics, "conditions": ""}
        (run / "validate.json").write_text(json.dumps(validation))
        (run / "metrics.csv").write_text(f"epoch,step,train/l1,val/psnr\n0,9,0.5,\n,19,,{psnr}\n")
        Image.new("RGB", (20, 29), "red").save(run / "images" / "step_0000020.png")


def generator_stage(tiny):
    return tiny.generator(sampler=Euler(2), guidance=Guidance(2.0))


def write_samples(folder, tiny):
    sample(generator_stage(tiny), ClassLabels(6, 12).labels, folder, make_fabric("cpu", 1))
    (folder / "samples_6x16x16x3.npz").unlink()


# --- readers


def read_images(folder, tiny, draw):
    read_batches(LatentDataModule(ImageFolder(str(folder)), 4, 16, val=0.25))


def read_latents(folder, tiny, draw):
    read_batches(LatentDataModule(LatentShards(str(folder)), 4, val=0.25))


def read_tokens(folder, tiny, draw):
    read_batches(LatentDataModule(TokenShards(str(folder)), 4, val=0.25))


def read_batches(data):
    data.setup()
    next(iter(data.train_dataloader()))
    list(data.val_dataloader())


def resume_encoding(folder, tiny, draw):
    encode(tiny.measured(), Shapes(16, 16), folder, Views(), make_fabric("cpu", 1), shard_size=8, min_psnr=0.0)
    len(LatentShards(str(folder), verify=True))  # what was damaged is written again


def read_tokenizer(folder, tiny, draw):
    use(load_tokenizer(folder / "last.ckpt", draw.choice([None, 0, 0.9])), tiny)


def read_export(folder, tiny, draw):
    use(load_tokenizer(folder / "tokenizer.safetensors"), tiny)


def use(tokenizer, tiny):
    tokenizer.decode(tokenizer.encode(tiny.images(2)))


def read_generator(folder, tiny, draw):
    load_generator(folder / "last.ckpt")


def evaluate(folder, tiny, draw):
    reference = draw.choice(["real.npz", "reference.safetensors"])
    words = [str(folder / "samples.npz"), "--reference", str(folder / reference), "--all", "--device", "cpu"]
    evaluation.evaluate_command(words)


def report(folder, tiny, draw):
    write_report(folder)


def resume_sampling(folder, tiny, draw):
    sample(generator_stage(tiny), ClassLabels(6, 12).labels, folder, make_fabric("cpu", 1))


KINDS = {
    "images": (write_images, read_images),
    "latents": (write_latents, read_latents),
    "tokens": (write_tokens, read_tokens),
    "lightningdit": (write_lightningdit, read_latents),
    "encoding": (write_unfinished, resume_encoding),
    "tokenizer": (write_tokenizer, read_tokenizer),
    "export": (write_export, read_export),
    "generator": (write_generator, read_generator),
    "evaluation": (write_evaluation, evaluate),
    "report": (write_runs, report),
    "samples": (write_samples, resume_sampling),
}


# --- damage


class Touch:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def damage_bytes(path, draw, others, trace):
    """Damage a file without regard to what it is."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(max(1, len(content)))
    length = draw.choice([1, 16, 400, 4000])
    kind = draw.choice(["flip", "head", "cut", "zero", "double", "grow", "swap", "empty", "noise", "gone", "odd"])
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 5, 50])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "head":
        content[draw.randrange(min(64, len(content)))] = draw.randrange(256)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif kind == "double":
        content[at:at] = content[at : at + length]
    elif kind == "grow":
        content += draw.randbytes(length)
    elif kind == "swap":
        content = draw.choice(others).read_bytes()
    elif kind in ("empty", "noise"):
        content = draw.randbytes(length if kind == "noise" else 0)
    if kind in ("gone", "odd"):
        path.unlink()
        odd = [path.mkdir, lambda: path.symlink_to(path.name), lambda: path.symlink_to("nowhere")]
        if path.suffix in (".png", ".jpg", ".npz", ".ckpt"):
            odd.append(lambda: os.mkfifo(path))
        if kind == "odd":
            draw.choice(odd)()
    else:
        path.write_bytes(content)
    return kind


def odd_value(draw, value=None):
    """Return a value of another type or size."""
    odd = [None, -1, 0, 3, 10**12, 1e300, float("nan"), True, "", "x", "a\nb", [], {}, [1, "a"], {"a": None}, [[]]]
    if isinstance(value, (list, str)) and value:
        odd += [value[:-1], value + value]
    return draw.choice(odd)


def damage_value(value, draw, odd=odd_value):
    """Replace, remove or add something somewhere in nested lists and dicts."""
    places = []

    def collect(part):
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                collect(part[key])

    if isinstance(value, (dict, list)):
        collect(value)
    if not places or draw.random() < 0.05:
        return odd(draw)
    part, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.6:
        part[key] = odd(draw, part[key])
    elif kind < 0.85:
        del part[key]
    elif isinstance(part, dict):
        part["surprise"] = odd(draw)
    else:
        part.append(odd(draw))
    return value


def odd_tensor(draw, value=None):
    """Return a tensor of another shape, type or content, or no tensor."""
    if not isinstance(value, torch.Tensor) or draw.random() < 0.2:
        return odd_value(draw)
    odd = [value[..., :-1] if value.dim() else value, value.flatten(), value[None], value.double(), value.half()]
    odd += [value.to(torch.int32), value * float("nan"), value.float() * 1e38 * 1e38, value.new_zeros(0), value.bool()]
    return draw.choice(odd).contiguous()


def odd_array(draw, value, trace):
    """Return an array of another shape, type or content, or one that runs code where it is unpickled."""
    odd = [value[..., :-1], value[None], value.astype(np.float32), value.astype(np.int16), value.astype(complex)]
    odd += [value[:0], value[:1], value.astype(np.float64) * np.nan, value.astype(np.float64) * 1e300, value.ravel()]
    odd += [value.astype(str), np.array([Touch(trace)], dtype=object), np.asfortranarray(value), np.float64(3)]
    return draw.choice(odd)


def damage_content(path, draw, others, trace):
    """Write the file again, well formed, with something else in it."""
    if path.suffix == ".json":
        path.write_text(json.dumps(damage_value(json.loads(path.read_text()), draw)))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(damage_value(yaml.safe_load(path.read_text()), draw)))
    elif path.suffix == ".csv":
        cells = [line.split(",") for line in path.read_text().splitlines()]
        row = draw.choice(cells)
        odd = ["", "nan", "-1", "1e300", "x", "\0", '"', "a,b,c,d,e,f", "step", "9" * 400, "\udcff", "1e999"]
        row[draw.randrange(len(row))] = draw.choice(odd)
        path.write_text("\n".join(",".join(line) for line in cells), errors="surrogateescape")
    elif path.suffix in (".ckpt", ".pt"):
        content = torch.load(path, weights_only=True)
        if draw.random() < 0.1:
            content["surprise"] = Touch(trace)
        torch.save(damage_value(content, draw, odd_tensor), path)
    elif path.suffix == ".npz":
        with np.load(path) as file:
            content = dict(file)
        key = draw.choice(sorted(content))
        if draw.random() < 0.2:
            del content[key]
        else:
            content[key] = odd_array(draw, content[key], trace)
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        content = load_file(path)
        key = draw.choice(sorted(content))
        value = odd_tensor(draw, content[key])
        if metadata and draw.random() < 0.4:
            name = draw.choice(sorted(metadata))
            try:
                metadata[name] = json.dumps(damage_value(json.loads(metadata[name]), draw))
            except ValueError:
                metadata[name] = str(odd_value(draw))
        elif isinstance(value, torch.Tensor):
            content[key] = value
        else:
            del content[key]
        save_file(content, path, metadata)
    else:
        return damage_bytes(path, draw, others, trace)
    return "content"


# --- the cases


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for name, (write, _) in KINDS.items():
        (root / name).mkdir()
        write(root / name, tiny)
    return root


class Overtime(BaseException):
    """A reader hangs; no Exception, so that nothing takes it for one of the file's."""


def overtime(*_):
    raise Overtime(f"more than {MAX_SECONDS} seconds")


def run_case(corpus, folder, tiny, number, seed):
    """Return the case, the name of the damaged file, the message of its reader, and what is wrong with that."""
    draw = random.Random(f"{seed} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    shutil.copytree(corpus / kind, folder)
    victim = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    others = sorted(path for path in corpus.rglob("*") if path.is_file() and path.stat().st_size < 100_000)
    trace = folder.parent / "ran"
    what = draw.choice([damage_bytes, damage_content])(victim, draw, others, trace)
    case = f"case {number} of seed {seed}: {kind}, {victim.relative_to(folder)}, {what}"
    os.chdir(folder)
    message = ""
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind][1](folder, tiny, draw)
    except UserError as error:
        message = last_message(error)
    except (Exception, Overtime) as error:
        frames = traceback.extract_tb(error.__traceback__)
        return case, victim.name, "", f"{error!r:.300} in {frames[-1].filename}:{frames[-1].lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    shown = message.replace(str(folder), "folder")
    problem = "code was run" if trace.exists() else ""
    if len(message.splitlines()) > MAX_LINES or len(shown) > MAX_CHARACTERS:
        problem = f"long: {message}"
    return case, victim.name, message, problem


def check_cases(corpus, tmp_path, tiny, monkeypatch, count, seed):
    def metrics(options, size, protocol, judges):
        return [GenerationMetrics(tiny.Pixels(), precision_recall=True, kid=True, protocol=protocol)]

    monkeypatch.setattr(evaluation, "make_metrics", metrics)  # Inception's weights are not here
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, overtime)
    messages, problems = [], []
    try:
        for number in range(count):
            case, name, message, problem = run_case(corpus, tmp_path / f"{number}", tiny, number, seed)
            problems += [(case, problem)] if problem else []
            os.chdir(tmp_path)
            shutil.rmtree(tmp_path / f"{number}")
            messages += [(case, name, message)] if message else []
    finally:
        signal.signal(signal.SIGALRM, before)
    unnamed = [(case, message) for case, name, message in messages if name not in message]
    print(f"seed {seed}: {count} cases, {len(messages)} errors, {len(unnamed)} of them without the file's name")
    for case, message in [*problems, *unnamed]:
        print(f"  {case}: {message}")
    assert not problems, problems
    assert len(messages) > count / 3  # or nothing was damaged
    assert len(unnamed) <= (1 - NAMED) * len(messages), unnamed


def test_good_folders_are_read(corpus, tmp_path, tiny, monkeypatch):
    metrics = GenerationMetrics(tiny.Pixels(), precision_recall=True, kid=True)
    monkeypatch.setattr(evaluation, "make_metrics", lambda *_: [metrics])
    for kind, (_, read) in KINDS.items():
        shutil.copytree(corpus / kind, tmp_path / kind)
        monkeypatch.chdir(tmp_path / kind)
        read(tmp_path / kind, tiny, random.Random(0))


def test_damaged_files(corpus, tmp_path, tiny, monkeypatch):
    check_cases(corpus, tmp_path, tiny, monkeypatch, SMALL, SEED)


@pytest.mark.slow
def test_many_damaged_files(corpus, tmp_path, tiny, monkeypatch):
    check_cases(corpus, tmp_path, tiny, monkeypatch, LARGE, SEED + 1)
