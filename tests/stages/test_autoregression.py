"""A generator learns its tokens, a sample is a function of its id, and parts that do not fit are named."""

import csv
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from aligntok.callbacks import (
    GenerationQuality,
    ReconstructionGrid,
    SampleGrid,
    SaveCheckpoint,
)
from aligntok.data import ClassLabels, LatentDataModule, TokenShards
from aligntok.data.shapes import Shapes
from aligntok.decoding import TokenSampler, graph, sampler
from aligntok.errors import UserError
from aligntok.metrics import GenerationMetrics
from aligntok.programs.fabric import make_fabric
from aligntok.programs.sample import sample
from aligntok.schedule import CosineDecay
from aligntok.stages import AutoregressiveGeneration, Optimization
from tests.conftest import Tiny
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),  # steps are called without a trainer
    pytest.mark.filterwarnings("ignore:.*overridden `on_before_batch_transfer`"),  # stage and data both have a say
]

LENGTH = 18


def write_cache(tiny, folder, **options):
    """Write the tokens of the training images of ``Tiny.data``."""
    return tiny.cache(folder, tiny.discrete(), **options)


def cached(folder, global_batch_size=8, **options):
    return LatentDataModule(TokenShards(folder), global_batch_size, **{"val": 0.25, **options})


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    return write_cache(tiny, tmp_path_factory.mktemp("cache") / "tokens", flips=True)


@pytest.fixture
def batch():
    tokens = torch.randint(0, 32, (16, LENGTH), generator=torch.Generator().manual_seed(3))
    return {"tokens": tokens, "label": torch.arange(16) % 12, "id": torch.arange(16)}


class Words(Dataset):
    """Each class is one sequence; somebody else's dataset."""

    def __init__(self, count=64):
        self.count = count
        self.tokens = torch.randint(0, 32, (2, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"tokens": self.tokens[index % 2], "label": index % 2, "id": index}


# --- the loss


def test_the_loss_is_the_mean_cross_entropy_of_each_token_given_those_before(tiny, batch):
    stage = tiny.autoregressive(network=tiny.ar(dropout=0.0), label_dropout=0.0)
    tokens, label = batch["tokens"], batch["label"]
    loss = stage.training_step(batch, 0)
    terms = [
        cross_entropy(stage.network(tokens[:, :i], label)[:, -1], tokens[:, i], reduction="none") for i in range(LENGTH)
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_images_are_encoded_where_nothing_is_cached(tiny, batch):
    stage = tiny.autoregressive(network=tiny.ar(dropout=0.0), label_dropout=0.0)
    image = tiny.images(16)
    tokens = stage.tokenizer.encode(image)
    expected = stage.training_step({**batch, "tokens": tokens}, 0)
    assert torch.equal(stage.training_step({"image": image, "label": batch["label"]}, 0), expected)
    with pytest.raises(UserError, match="holds images, no tokens"):
        tiny.autoregressive(tokenizer=None).training_step({"image": image, "label": batch["label"]}, 0)


def test_dropped_labels_become_the_null_class_in_training_alone(tiny, batch):
    seen = []
    stage = tiny.autoregressive(label_dropout=0.4)
    forward = stage.network.forward
    stage.network.forward = lambda tokens, label: seen.append(label) or forward(tokens, label)
    label = torch.arange(2000) % 12
    tokens = torch.zeros(2000, LENGTH, dtype=torch.int64)
    stage.training_step({"tokens": tokens, "label": label}, 0)
    dropped = seen[0] == 12
    assert abs(dropped.float().mean() - 0.4) < 0.05
    assert torch.equal(seen[0][~dropped], label[~dropped])
    stage.validation_step(batch, 0)
    assert torch.equal(seen[1], batch["label"])


def test_two_classes_are_learned_and_sampled_under_somebody_elses_trainer(tiny, tmp_path):
    network = tiny.ar(scale=0, num_classes=2, dropout=0.0)
    stage = AutoregressiveGeneration(network, optimization=Optimization(1e-2), sampler=TokenSampler(temperature=0))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"limit_val_batches": 1, "default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 5}
    trainer = pl.Trainer(**options, num_sanity_val_steps=0)
    trainer.fit(stage, DataLoader(Words(512), batch_size=32, shuffle=True), DataLoader(Words(), batch_size=8))
    label = torch.arange(6) % 2
    assert torch.equal(stage.sample(torch.arange(6), label), Words().tokens[label])
    assert trainer.callback_metrics["val/accuracy"] > 0.99
    assert trainer.callback_metrics["val/loss"] < 0.1


# --- what validation measures


class Fixed(nn.Module):
    """Logits that are the same for every image: of position p the likeliest tokens are p, p + 1, ..."""

    codebook_size, num_classes, null_label, num_prefix, grid, sequence_length = 32, 12, 12, 2, (4, 4), LENGTH
    has_null = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, label):
        order = (torch.arange(32)[None] - torch.arange(LENGTH)[:, None]) % 32
        return -order.float().expand(len(tokens), -1, -1) + self.weight

    def check_condition(self, label): ...


def test_accuracies_and_loss_are_exact_over_uneven_batches_and_written_per_position(tiny, tmp_path):
    shift = torch.arange(23) % 7  # of the tokens from the likeliest

    class Shifted(Dataset):
        def __len__(self):
            return 23

        def __getitem__(self, index):
            tokens = (torch.arange(LENGTH) + shift[index]) % 32
            tokens[:2] = torch.arange(2)  # the prefix is known
            return {"tokens": tokens, "label": 0, "id": index}

    stage = AutoregressiveGeneration(Fixed())
    trainer = tiny.trainer(tmp_path, 1, limit_val_batches=1.0)
    trainer.validate(stage, DataLoader(Shifted(), batch_size=4), verbose=False)
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    grid, best = float((shift == 0).float().mean()), float((shift < 5).float().mean())
    assert values["val/accuracy_prefix"] == 1
    assert values["val/accuracy_grid"] == pytest.approx(grid)
    assert values["val/accuracy"] == pytest.approx((2 + 16 * grid) / 18)
    assert values["val/accuracy_top5"] == pytest.approx((2 + 16 * best) / 18)
    base = float(torch.logsumexp(-torch.arange(32.0), 0))
    assert values["val/loss"] == pytest.approx(base + float(shift.float().mean()) * 16 / 18, rel=1e-5)
    with (tmp_path / "accuracy_per_position.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["prefix"] * 2 + ["grid"] * 16
    assert [int(row["position"]) for row in rows] == list(range(LENGTH))
    assert [float(row["accuracy"]) for row in rows] == pytest.approx([1.0] * 2 + [grid] * 16, abs=1e-6)
    assert [float(row["accuracy_top5"]) for row in rows] == pytest.approx([1.0] * 2 + [best] * 16, abs=1e-6)
    assert float(rows[5]["loss"]) == pytest.approx(base + float(shift.float().mean()), rel=1e-5)


def test_equal_logits_are_no_accuracy(tiny, batch, tmp_path):
    """As those of a fresh network are."""
    stage = tiny.autoregressive(tiny.ar(scale=0))
    stage.validation_step(batch, 0)
    assert stage.sums["positions"][1].sum() / stage.sums["positions"][3].sum() < 0.15
    assert stage.sums["positions"][2].sum() / stage.sums["positions"][3].sum() < 0.35


def measure(cache, folder, **options):
    """Validate, with 17 images, which two ranks cannot share evenly, and return the measures."""
    quality = GenerationQuality(GenerationMetrics(Tiny.Pixels()), 11, 4, reference=Shapes(20, 16))
    trainer = Tiny.trainer(folder, 1, [quality], limit_val_batches=1.0, enable_checkpointing=False, **options)
    stage = Tiny.autoregressive(sampler=TokenSampler(2.0))
    trainer.validate(stage, datamodule=cached(cache, val=17 / 64), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def measure_on_rank(*folders):
    return measure(*folders, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))


def test_two_ranks_measure_what_one_measures(cache, tmp_path):
    expected = measure(cache, tmp_path / "one")
    assert {"val/loss", "val/accuracy", "val/accuracy_top5", "val/accuracy_prefix", "val/gfd_tiny"} <= expected.keys()
    for values in run_ranks(2, measure_on_rank, cache, tmp_path / "two"):
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_sampling_keeps_is_freed_by_the_next_step(tiny, batch, monkeypatch):
    """The copy of the weights, keys and values of a graph, here without compiler and GPU."""
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    stage = tiny.autoregressive(sampler=TokenSampler(2.0, compile=True))
    stage.sample(torch.arange(2), torch.arange(2))
    assert stage.network in graph._kept
    stage.training_step(batch, 0)
    assert stage.network not in graph._kept


# --- resume


def test_a_run_resumed_in_mid_epoch_is_the_run_that_was_not_cut_off(tiny, tmp_path, cache):
    def fit(folder, ckpt_path=None):
        stage = tiny.autoregressive(learning_rate=CosineDecay(1e-2, 1e-3, 2, 9), label_dropout=0.3)
        trainer = tiny.trainer(folder, 9, [SaveCheckpoint(keep_every_n_steps=4)])
        trainer.fit(stage, datamodule=cached(cache), ckpt_path=ckpt_path)
        return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)

    whole = fit(tmp_path / "whole")
    middle = tmp_path / "whole/checkpoints/step_0000004.ckpt"
    again = fit(tmp_path / "again", middle)
    assert whole["global_step"] == again["global_step"] == 9
    for name, value in whole["state_dict"].items():
        assert name.startswith("network.")  # no tokenizer
        assert torch.equal(value, again["state_dict"][name]), name
    first, second = (run["optimizer_states"][0]["state"] for run in (whole, again))
    assert all(torch.equal(first[i]["exp_avg_sq"], second[i]["exp_avg_sq"]) for i in first)
    assert whole["tokenizer_fingerprint"] == tiny.discrete().fingerprint()


def test_the_tokenizer_of_a_checkpoint_must_be_the_same_and_its_own_kind_goes_on(tiny, tmp_path, cache):
    stage = tiny.autoregressive()
    tiny.trainer(tmp_path, 1, [SaveCheckpoint()]).fit(stage, datamodule=cached(cache))
    path = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    other = tiny.autoregressive(tokenizer=tiny.discrete(1))
    with pytest.raises(UserError) as caught:
        other.on_load_checkpoint(checkpoint)
    for words in ("learned on tokenizer", tiny.discrete().fingerprint(), tiny.discrete(1).fingerprint()):
        assert words in str(caught.value)
    refined = tiny.discrete()
    nn.init.zeros_(refined.decoder.last_layer)
    tiny.autoregressive(tokenizer=refined).on_load_checkpoint(checkpoint)
    fresh = tiny.autoregressive(tiny.ar(7))
    fresh.init_from(path)
    assert torch.equal(fresh.network.embed.weight, stage.network.embed.weight)
    with pytest.raises(UserError, match="does not fit this network"):
        tiny.generator().init_from(path)


# --- samples


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_sample_is_a_function_of_its_id_in_the_files_at_any_batch_size(tiny, tmp_path):
    def predict(folder, batch_size, count=64):
        stage = tiny.autoregressive(sampler=TokenSampler(3.0, 1.8, temperature=0.9, top_p=0.95), seed=5)
        sample(stage, ClassLabels(count, 12).labels, folder, make_fabric("cpu", 1), count, batch_size)
        assert json.loads((folder / "samples.json").read_text())["guide"] is None
        return {path.name: pixels(path) for path in (folder / "png").iterdir()}

    first, second = predict(tmp_path / "a", 7), predict(tmp_path / "b", 64)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert len({image.tobytes() for image in first.values()}) > 60
    record = json.loads((tmp_path / "a/samples.json").read_text())
    assert "guidance_scale=3.0" in record["sampler"]
    assert "guidance" not in record
    with pytest.raises(UserError, match=r"holds samples of count 64"):
        predict(tmp_path / "a", 7, count=8)


def test_predict_gives_tokens_and_their_image(tiny):
    stage = tiny.autoregressive(seed=1)
    ids, label = torch.tensor([5, 2]), torch.tensor([1, 0])
    outputs = stage.eval().predict_step({"id": ids, "label": label}, 0)
    assert torch.equal(outputs["tokens"], stage.sample(ids, label))
    assert torch.equal(outputs["image"], stage.tokenizer.decode(outputs["tokens"]))
    assert not torch.equal(outputs["tokens"], tiny.autoregressive(seed=2).eval().sample(ids, label))
    with pytest.raises(UserError, match="samples need a decoder"):
        tiny.autoregressive(tokenizer=None).predict_step({"id": ids, "label": label}, 0)


def test_a_network_without_classes_learns_and_is_measured_and_drawn(tiny, tmp_path, cache):
    stage = tiny.autoregressive(tiny.ar(num_classes=None), label_dropout=0.0)
    quality = GenerationQuality(GenerationMetrics(tiny.Pixels()), 8, 8, reference=Shapes(20, 16))
    trainer = tiny.trainer(tmp_path, 1, [quality, SampleGrid(per_class=3)], limit_val_batches=1, val_check_interval=1)
    trainer.fit(stage, datamodule=cached(cache))
    assert "val/gfd_tiny" in trainer.callback_metrics
    assert (tmp_path / "images/samples_0000001.png").is_file()
    with pytest.raises(UserError, match="has no classes to agree with"):
        GenerationQuality(quality.metrics, 8, classifier=nn.Identity()).setup(trainer, stage, "validate")


def test_grids_show_samples_and_the_codes_of_the_grid(tiny, tmp_path):
    stage = tiny.autoregressive()
    trainer = tiny.trainer(
        tmp_path, 1, [SampleGrid(per_class=3), ReconstructionGrid(0, 4)], limit_val_batches=1, val_check_interval=1
    )
    trainer.fit(stage, datamodule=tiny.data())
    assert pixels(tmp_path / "images/samples_0000001.png").shape[:2] == (2 + 10 * 66, 2 + 3 * 66)
    assert pixels(tmp_path / "images/step_0000001.png").shape[:2] == (2 + 3 * 66, 2 + 4 * 66)


def test_there_are_no_sampling_steps_to_sweep(tiny, tmp_path):
    quality = GenerationQuality(GenerationMetrics(tiny.Pixels()), 8, sweep=[2])
    with pytest.raises(UserError, match="sweep needs a sampler with num_steps"):
        quality.setup(tiny.trainer(tmp_path, 1), tiny.autoregressive(), "validate")


# --- what is refused


def refused(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "name", "theirs"),
    [
        ({"codebook_size": 31}, "codebook_size 31", "32"),
        ({"grid": (2, 8)}, "grid (2, 8)", "(4, 4)"),
        ({"grid": (4, 5)}, "grid (4, 5)", "(4, 4)"),
        ({"num_prefix": 1}, "num_prefix 1", "2"),
    ],
)
def test_a_network_for_another_tokenizer_is_refused_by_both_values(tiny, sizes, name, theirs):
    message = refused(tiny.autoregressive, tiny.ar(**sizes))
    assert f"network.{name} differs from the {name.split()[0]} of tokenizer {theirs}" in message


def test_other_parts_that_do_not_fit(tiny):
    assert "tokenizer is continuous" in refused(tiny.autoregressive, tokenizer=tiny.measured())
    assert "tokenizer is discrete" in refused(tiny.generator, tokenizer=tiny.discrete())
    assert "label_dropout 1.5" in refused(tiny.autoregressive, label_dropout=1.5)
    network = tiny.ar(null_class=False)
    assert "needs a null class" in refused(tiny.autoregressive, network)
    message = refused(tiny.autoregressive, network, label_dropout=0.0, sampler=TokenSampler(2.0))
    assert message.startswith("sampler: ")
    assert "33" in refused(tiny.autoregressive, sampler=TokenSampler(top_k=33))


def test_a_cache_of_another_codebook_or_size_is_refused_before_the_first_step(tiny, tmp_path, cache):
    other = tiny.discrete(1)
    message = refused(tiny.trainer(tmp_path, 1).fit, tiny.autoregressive(tokenizer=other), datamodule=cached(cache))
    assert other.fingerprint() in message
    assert tiny.discrete().fingerprint() in message
    network = tiny.ar(codebook_size=64)
    stage = tiny.autoregressive(network, tokenizer=None)
    message = refused(tiny.trainer(tmp_path, 1).fit, stage, datamodule=cached(cache))
    assert "codebook_size 32, but network.codebook_size is 64" in message


@pytest.mark.parametrize("wrong", [-1, 32])
def test_tokens_and_labels_out_of_range_are_named(tiny, batch, wrong):
    stage = tiny.autoregressive()
    batch["tokens"][3, 4] = wrong
    message = refused(stage.on_before_batch_transfer, batch, 0)
    assert f"token {wrong} in a batch, but network.codebook_size 32 means 0 .. 31" in message
    batch["tokens"][3, 4], batch["label"][0] = 0, wrong
    assert f"label {wrong} in a batch" in refused(stage.on_before_batch_transfer, batch, 0)
