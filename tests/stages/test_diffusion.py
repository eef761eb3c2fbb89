"""A generator learns its latents, a sample is a function of its id, and parts that do not fit are named."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from aligntok.callbacks import EMA, SampleGrid, SaveCheckpoint
from aligntok.data import Augmentation, ClassLabels, LatentDataModule, Shapes
from aligntok.errors import UserError
from aligntok.flow import Euler, FlowMatching, Guidance, TimeSampling
from aligntok.losses import RepresentationAlignment
from aligntok.stages import LatentAlignment, LatentDiffusion, Optimization
from aligntok.weights import load_network
from aligntok.weights.lightningdit import to_lightningdit
from tests.ranks import run_ranks
from tests.stages.generation_worker import generate

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),  # steps are called without a trainer
    pytest.mark.filterwarnings("ignore:.*overridden `on_before_batch_transfer`"),  # stage and data both have a say
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),  # runs without validation
]


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory):
    """Latents of 64 ``Shapes``, with mirrored ones."""
    return tiny.cache(tmp_path_factory.mktemp("cache") / "latents", tiny.measured(), flips=True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(16, 4, 4, 4, generator=generator)
    return {"latent": latent, "label": torch.arange(16) % 12, "id": torch.arange(16)}


class Rows(torch.utils.data.Dataset):
    """Two classes, each of one latent; somebody else's dataset."""

    def __init__(self, count=64, labels=2):
        self.count, self.labels = count, labels

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % self.labels
        return {"latent": torch.full((4, 4, 4), 1.0 - 2 * label), "label": label, "id": index}


class Lines(DummyLogger):
    """Keeps what was logged."""

    def __init__(self):
        super().__init__()
        self.lines = {}

    def log_metrics(self, metrics, step=None):
        self.lines.setdefault(step, {}).update(metrics)


def states(checkpoint):
    """Return what must be the same bit for bit."""
    keys = ("state_dict", "current_model_state", "averaging_state", "global_step")
    return {key: checkpoint[key] for key in keys} | {"optimizer": checkpoint["optimizer_states"][0]["state"]}


# --- the loss


def test_the_exact_velocity_has_no_loss(tiny, batch):
    stage = tiny.generator()
    latent = batch["latent"]
    stage.network.forward = lambda x, t, label: (latent - x) / (1 - t).view(-1, 1, 1, 1)
    assert stage.training_step(batch, 0) < 1e-5
    assert stage.network(latent, torch.zeros(16), batch["label"]).abs().max() == 0


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_loss_is_mean_squared_error_plus_weighted_cosine(tiny, batch, weight):
    stage = tiny.generator(cosine_weight=weight, label_dropout=0.0)
    loss = stage.training_step(batch, 0)
    noise = stage.normal(batch, "noise", (4, 4, 4))
    t = stage.normal(batch, "time").sigmoid()
    at = t.view(-1, 1, 1, 1)
    predicted = stage.network((1 - at) * noise + at * batch["latent"], t, batch["label"])
    wanted = batch["latent"] - noise
    cosine = 1 - torch.nn.functional.cosine_similarity(predicted, wanted, dim=1).mean()
    torch.testing.assert_close(loss, (predicted - wanted).square().mean() + weight * cosine)


@pytest.mark.parametrize("block", [1, 2])
def test_the_term_of_repa_is_added_with_its_weight_at_its_block(tiny, batch, block):
    def loss(**options):
        stage = tiny.generator(label_dropout=0.0, **options)
        torch.manual_seed(5)
        return stage.training_step({**batch, "image": image}, 0)

    image = tiny.images(16)
    alignment = RepresentationAlignment(tiny.encoder(5), 16, hidden_width=8, block=block, weight=0.25)
    given = []
    alignment.register_forward_hook(lambda module, args, value: given.append((*args, value)))
    network, seen = tiny.dit(), []
    network.blocks[block - 1].register_forward_hook(lambda module, args, tokens: seen.append(tokens))
    term = loss(network=network, representation_alignment=alignment) - loss()
    ((tokens, aligned, value),) = given
    torch.testing.assert_close(term, 0.25 * value, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens, seen[0])
    assert aligned is image


def test_two_classes_are_learned_and_sampled_under_somebody_elses_trainer(tiny, tmp_path):
    stage = LatentDiffusion(tiny.dit(scale=0, num_classes=2), optimization=Optimization(1e-2), sampler=Euler(8))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"limit_val_batches": 1, "default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 12}
    loader = DataLoader(Rows(512), batch_size=32, shuffle=True)
    pl.Trainer(**options).fit(stage, loader, DataLoader(Rows(), batch_size=8))
    label = torch.arange(20) % 2
    samples = stage.sample(torch.arange(20), label)
    wanted = torch.where(label == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    assert (samples - wanted).abs().mean() < 0.2  # noise is at 1.2


def test_frozen_parts_neither_change_nor_are_saved(tiny, tmp_path, cache):
    alignment = RepresentationAlignment(tiny.encoder(5), 16, hidden_width=8, block=1)
    guide = tiny.dit(4)
    stage = tiny.generator(representation_alignment=alignment, guidance=Guidance(guide=guide), learning_rate=0.1)
    frozen = (stage.tokenizer, guide, alignment.encoder.network)
    before = [tiny.copies(part) for part in frozen]
    start = tiny.copies(stage)
    data = tiny.cached(cache, images=Shapes(64, 16))
    tiny.trainer(tmp_path, 3, [SaveCheckpoint(), EMA(0.5)]).fit(stage, datamodule=data)
    for part, copies in zip(frozen, before, strict=True):
        assert all(torch.equal(value, copies[name]) for name, value in tiny.copies(part).items())
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
        assert not part.training
    for name in ("network.blocks.0.mlp.proj_in.weight", "representation_alignment.project.0.weight"):
        assert not torch.equal(dict(stage.named_parameters())[name], start[name])
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    for state in ("state_dict", "current_model_state"):
        parts = {".".join(key.split(".")[:2]) for key in checkpoint[state] if not key.startswith("network.")}
        assert parts == {"representation_alignment.project"}
    assert checkpoint["tokenizer_fingerprint"] == stage.tokenizer.fingerprint()


# --- times, labels, logs


def test_share_of_dropped_labels(tiny):
    label = torch.arange(20_000) % 12
    dropped = tiny.generator(label_dropout=0.3).drop({"label": label})
    assert 0.28 < (dropped == 12).float().mean() < 0.32
    assert torch.equal(dropped[dropped != 12], label[dropped != 12])
    assert torch.equal(tiny.generator(label_dropout=0.0).drop({"label": label}), label)
    network = tiny.dit(null_class=False)
    assert torch.equal(tiny.generator(network=network, label_dropout=0.0).drop({"label": label}), label)


def test_the_network_sees_dropped_labels_in_training_but_not_in_validation(tiny, batch):
    stage = tiny.generator(label_dropout=1.0)
    seen = []
    stage.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    stage.training_step(batch, 0)
    stage._trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    stage.log_mean = lambda *args: None
    stage.validation_step(batch, 0)
    assert seen[0].tolist() == [12] * 16
    assert seen[1].tolist() == batch["label"].tolist()


def test_times_become_uniform_at_a_step_and_keep_their_shift(tiny, tmp_path, cache):
    stage = tiny.generator(uniform_from=2, time_sampling=TimeSampling(shift=0.5))
    torch.manual_seed(0)
    for step, low in ((0, 0.02), (1, 0.02), (2, 0.1), (3, 0.1)):  # shares of t < 1/11, that is of s < 1/6 before shift
        share = (stage.objective.times(step)(torch.randn(50_000)) < 1 / 19).float().mean()
        assert abs(share - {0.02: 0.0142, 0.1: 0.1}[low]) < 0.01
    asked = []

    class Asked(FlowMatching):
        def times(self, step):
            asked.append(step)
            return super().times(step)

    stage.objective = Asked()
    tiny.trainer(tmp_path, 3, accumulate_grad_batches=2).fit(stage, datamodule=tiny.cached(cache))
    assert asked == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bins_of_training_are_the_error_since_the_last_line(tiny, tmp_path, cache, accumulate):
    stage, logger, seen = tiny.generator(), Lines(), []
    fill = stage.fill_bins
    stage.fill_bins = lambda prefix, t, error: seen.append((t, error)) or fill(prefix, t, error)
    options = {"logger": logger, "log_every_n_steps": 3, "accumulate_grad_batches": accumulate}
    tiny.trainer(tmp_path, 7, **options).fit(stage, datamodule=tiny.cached(cache))
    assert sorted(logger.lines) == [2, 5]
    for step, line in logger.lines.items():
        parts = seen[(step - 2) * accumulate : (step + 1) * accumulate]
        t, error = (torch.cat(column).double() for column in zip(*parts, strict=True))
        index = (t * 10).long()
        wanted = {f"train/mse_t{i / 10}": float(error[index == i].mean()) for i in set(index.tolist())}
        found = {key: value for key, value in line.items() if "mse_t" in key}
        late = {key: found.get(key) for key in wanted}  # a bin that is empty now keeps its last value
        assert late == pytest.approx(wanted, rel=1e-5)
    assert len(wanted) > 4


def validate(tiny, folder, data, stage=None, **options):
    stage = stage or tiny.generator()
    trainer = tiny.trainer(folder, 1, limit_val_batches=1.0, **options)
    trainer.validate(stage, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_validation_is_the_same_at_any_batch_size_and_bins_add_up(tiny, tmp_path, cache):
    ids = torch.arange(16)
    stage, seen = tiny.generator(cosine_weight=0.5), []
    fill = stage.fill_bins
    stage.fill_bins = lambda prefix, t, error: seen.append((t, error)) or fill(prefix, t, error)
    values = validate(tiny, tmp_path, tiny.cached(cache, 8), stage)
    t, error = (torch.cat(column) for column in zip(*seen, strict=True))
    counts = torch.bincount((t * 10).long(), minlength=10).tolist()
    assert sum(counts) == len(ids)
    assert max(counts) <= 2  # times are spread evenly
    bins = sum(n * values[f"val/mse_t{i / 10}"] for i, n in enumerate(counts) if n)
    assert bins / 16 == pytest.approx(values["val/mse"], rel=1e-5)
    assert float(error.mean()) == pytest.approx(values["val/mse"], rel=1e-5)
    assert values["val/loss"] > values["val/mse"]
    torch.manual_seed(99)
    again = validate(tiny, tmp_path, tiny.cached(cache, 3), tiny.generator(cosine_weight=0.5))
    assert again == pytest.approx(values, rel=1e-5)
    other = validate(tiny, tmp_path, tiny.cached(cache, 8), tiny.generator(cosine_weight=0.5, seed=1))
    assert other["val/loss"] != pytest.approx(values["val/loss"], rel=1e-3)


def test_test_measures_the_same(tiny, tmp_path, cache):
    trainer = tiny.trainer(tmp_path, 1, limit_test_batches=1.0)
    trainer.test(tiny.generator(), datamodule=tiny.cached(cache), verbose=False)
    values = validate(tiny, tmp_path, tiny.cached(cache))
    assert {k.replace("test/", "val/"): float(v) for k, v in trainer.callback_metrics.items()} == pytest.approx(values)


# --- resume


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_equals_uninterrupted(tiny, tmp_path, cache, accumulate):
    def fit(folder, max_steps, seed=0, ckpt_path=None):
        alignment = RepresentationAlignment(tiny.encoder(5), 16, hidden_width=8, block=2)
        options = {"representation_alignment": alignment, "uniform_from": 5, "label_dropout": 0.5}
        stage = tiny.generator(network=tiny.dit(seed), learning_rate={0: 0.0, 3: 1e-2, 9: 1e-3}, **options)
        callbacks = [SaveCheckpoint(every_n_steps=4), EMA(0.8), SampleGrid(every_n_steps=2, per_class=1)]
        trainer = tiny.trainer(
            folder,
            max_steps,
            callbacks,
            accumulate_grad_batches=accumulate,
            val_check_interval=3,
            limit_val_batches=1.0,
        )
        data = tiny.cached(cache, images=Shapes(64, 16), augmentation=Augmentation(), num_workers=0 if seed else 1)
        torch.manual_seed(seed + 50)
        trainer.fit(stage, datamodule=data, ckpt_path=ckpt_path)
        return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)

    straight = fit(tmp_path / "straight", 9)  # an epoch has 6 steps
    assert fit(tmp_path / "cut", 4)["global_step"] == 4
    resumed = fit(tmp_path / "cut", 9, seed=3, ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt"))
    torch.testing.assert_close(states(resumed), states(straight), rtol=0, atol=0)
    name = "network.head.proj.weight"
    assert not torch.equal(straight["state_dict"][name], straight["current_model_state"][name])


# --- samples


@pytest.mark.parametrize("guide", [False, True])
def test_a_sample_is_a_function_of_seed_id_and_label(tiny, guide):
    network = tiny.dit(2) if guide else None
    stage = tiny.generator(sampler=Euler(6, shift=0.5), guidance=Guidance(3.0, start=0.2, guide=network))
    ids = torch.arange(64)
    label = ids % 12
    whole = stage.sample(ids, label)
    parts = torch.cat([stage.sample(i, k) for i, k in zip(ids.split(7), label.split(7), strict=True)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    order = torch.randperm(64)
    torch.testing.assert_close(stage.sample(ids[order], label[order]), whole[order], rtol=1e-5, atol=1e-5)
    for other in (
        stage.sample(ids + 64, label),
        stage.sample(ids, (label + 1) % 12),
        tiny.generator(sampler=stage.sampler, guidance=stage.guidance, seed=1).sample(ids, label),
        tiny.generator(sampler=stage.sampler, guidance=Guidance(guide=network)).sample(ids, label),
        stage.sample(ids, label, Euler(2)),
    ):
        assert (other - whole).flatten(1).abs().max(1).values.min() > 1e-3
    assert whole.flatten(1).std(0).mean() > 0.1


def test_sampling_leaves_the_random_state_alone_and_wants_no_gradient(tiny):
    stage = tiny.generator()
    state = torch.get_rng_state()
    assert not stage.sample(torch.arange(2), torch.arange(2)).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_prediction_decodes_the_samples_that_are_asked_for(tiny, tmp_path, cache):
    stage = tiny.generator(sampler=Euler(3))
    data = tiny.cached(cache, 4, predict=ClassLabels(10, 12, classes=[3, 5]))
    batches = tiny.trainer(tmp_path, 1).predict(stage, datamodule=data)
    latent = stage.sample(torch.arange(10), torch.tensor([3, 5] * 5))
    torch.testing.assert_close(torch.cat([b["latent"] for b in batches]), latent, rtol=1e-5, atol=1e-5)
    image = torch.cat([b["image"] for b in batches])
    torch.testing.assert_close(image, stage.tokenizer.decode(latent), rtol=1e-4, atol=1e-5)


def test_the_grid_is_drawn_with_the_average_at_validation(tiny, tmp_path, cache):
    stage = tiny.generator(sampler=Euler(2))
    callbacks = [EMA(0.5), SampleGrid(), SampleGrid(every_n_steps=2)]
    drawn, alone = [], []
    callbacks[2].start = lambda trainer, module: alone.append(trainer.global_step)
    callbacks[1].start = lambda trainer, module: drawn.append((trainer.global_step, tiny.copies(module.network)))
    options = {"val_check_interval": 3, "limit_val_batches": 1, "enable_checkpointing": False}
    tiny.trainer(tmp_path, 3, callbacks, **options).fit(stage, datamodule=tiny.cached(cache))
    assert alone == [2, 3]
    ((step, weights),) = drawn
    assert step == 3
    assert all(torch.equal(value, weights[name]) for name, value in stage.network.named_parameters())
    grid = SampleGrid(num_classes=3, per_class=2)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    picture = grid.picture(trainer, stage)
    assert picture.shape == (3, 3 * 66 + 2, 2 * 66 + 2)
    image = stage.tokenizer.decode(stage.sample(torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])))
    larger = torch.nn.functional.interpolate(image, scale_factor=4)
    torch.testing.assert_close(picture[:, 2 + 66 : 66 + 66, 2 : 2 + 64], larger[2], rtol=1e-4, atol=1e-5)


# --- data


def test_images_are_encoded_on_the_fly_to_the_latents_of_the_cache(tiny, tmp_path, cache):
    def fit(data):
        stage, losses, latents = tiny.generator(), [], []
        code_of = stage.code_of
        stage.code_of = lambda batch: latents.append(code_of(batch)) or latents[-1]
        step = stage.training_step
        stage.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
        tiny.trainer(tmp_path, 8, limit_val_batches=1.0, val_check_interval=4).fit(stage, datamodule=data)
        return torch.cat(latents), torch.stack(losses).detach()

    images = LatentDataModule(Shapes(64, 16), 8, 16, val=0.25, augmentation=Augmentation("center", flip=False))
    ours, theirs = fit(images), fit(tiny.cached(cache))
    assert len(ours[0]) == 8 * 8 + 16  # of validation
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_bf16_computes_in_bf16_and_keeps_fp32(tiny, tmp_path, cache):
    stage = tiny.generator(sampler=Euler(2))
    dtypes = set()
    stage.network.head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    data = tiny.cached(cache, predict=ClassLabels(6, 12))
    options = {"precision": "bf16-mixed", "limit_val_batches": 1.0, "val_check_interval": 2}
    trainer = tiny.trainer(tmp_path, 2, [EMA(0.5)], **{**options, "enable_checkpointing": False})
    trainer.fit(stage, datamodule=data)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in stage.parameters()} == {torch.float32}
    assert all(torch.tensor(float(value)).isfinite() for value in trainer.callback_metrics.values())
    (output,) = tiny.trainer(tmp_path, 1, precision="bf16-mixed").predict(stage, datamodule=data)
    assert output["latent"].dtype == output["image"].dtype == torch.float32
    assert output["latent"].isfinite().all()
    assert output["image"].min() >= 0
    assert output["image"].max() <= 1
    exact = stage.sample(torch.arange(6), torch.arange(6))
    torch.testing.assert_close(output["latent"], exact, rtol=0.1, atol=0.1)


# --- weights of others


def test_starts_from_a_file_of_lightningdit(tiny, tmp_path):
    theirs = tiny.dit(7)
    torch.save({"model": {}, "ema": to_lightningdit(theirs)}, tmp_path / "lightningdit.pt")
    stage = tiny.generator()
    stage.init_from(tmp_path / "lightningdit.pt")
    torch.testing.assert_close(dict(stage.network.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"lightningdit\.pt .*width"):
        tiny.generator(network=tiny.dit(width=32)).init_from(tmp_path / "lightningdit.pt")


def test_starts_from_the_average_of_another_run(tiny, tmp_path, cache):
    first = tiny.generator(learning_rate=0.1)
    tiny.trainer(tmp_path, 3, [SaveCheckpoint(), EMA(0.9)]).fit(first, datamodule=tiny.cached(cache))
    stage = tiny.generator(network=tiny.dit(5))
    path = tmp_path / "checkpoints/last.ckpt"
    stage.init_from(path)
    average = torch.load(path, weights_only=True)["state_dict"]
    for name, value in stage.network.state_dict().items():
        assert torch.equal(value, average[f"network.{name}"])
    tokenizer_run = tmp_path / "tokenizer.ckpt"
    torch.save({"state_dict": {}, "aligntok_stage": "DecoderRefinement"}, tokenizer_run)
    with pytest.raises(
        UserError, match=r"of stage DecoderRefinement and holds no weights network\.\*, which LatentDiffusion"
    ):
        stage.init_from(tokenizer_run)
    with pytest.raises(UserError, match="no recipe of the network"):  # the test built it without the command line
        load_network(path)


# --- errors


def message(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"network": {"latent_shape": (8, 4, 4)}},
            ["network.latent_shape [8, 4, 4]", "tokenizer [4, 4, 4]"],
        ),
        (
            {"network": {"latent_shape": (4, 8, 4)}},
            ["network.latent_shape [4, 8, 4]", "tokenizer [4, 4, 4]"],
        ),
        ({"network": {"null_class": False}}, ["label_dropout 0.1", "network.null_class true"]),
        ({"label_dropout": 1.5}, ["label_dropout 1.5"]),
        ({"label_dropout": -0.1}, ["label_dropout -0.1"]),
        (
            {"network": {"null_class": False}, "label_dropout": 0, "guidance": {"scale": 2.0}},
            ["guidance", "scale=2.0", "no null class", "guide"],
        ),
        ({"guidance": {"channels": 5}}, ["guidance", "channels=5", "4 channels"]),
        ({"guide": {"latent_shape": (4, 2, 2)}}, ["guide.latent_shape (4, 2, 2)", "latent_shape (4, 4, 4)"]),
        ({"guide": {"num_classes": 3}}, ["guide.num_classes 3", "network.num_classes 12"]),
        ({"representation_alignment": 8}, ["representation_alignment.width 8", "network.width 16"]),
    ],
)
def test_parts_that_do_not_fit(tiny, options, words):
    options = dict(options)
    makers = {"network": tiny.dit, "guide": tiny.dit, "guidance": Guidance}
    for key in makers.keys() & options.keys():
        options[key] = makers[key](**options[key])
    if "guide" in options:
        options["guidance"] = Guidance(guide=options.pop("guide"))
    if "representation_alignment" in options:
        width = options["representation_alignment"]
        options["representation_alignment"] = RepresentationAlignment(tiny.encoder(), width, hidden_width=8, block=1)
    text = message(tiny.generator, **options)
    assert all(word in text for word in words), text


def test_a_guide_stands_in_for_the_null_class(tiny):
    network = tiny.dit(null_class=False)
    stage = tiny.generator(network=network, label_dropout=0, guidance=Guidance(2.0, guide=tiny.dit(1, width=32)))
    assert stage.sample(torch.arange(2), torch.arange(2)).isfinite().all()


def test_a_discrete_tokenizer_is_refused(tiny, monkeypatch):
    from dataclasses import replace

    tokenizer = tiny.measured()
    spec = replace(tokenizer.spec, kind="discrete")
    monkeypatch.setattr(type(tokenizer), "spec", property(lambda self: spec))
    assert "tokenizer is discrete" in message(tiny.generator, tokenizer=tokenizer)


def test_classes_that_the_network_does_not_have_are_named_before_the_first_step(tiny, tmp_path, cache):
    stage = tiny.generator(network=tiny.dit(num_classes=11))
    for verb, data in (
        ("fit", tiny.cached(cache)),
        ("validate", tiny.cached(cache)),
        ("fit", tiny.data()),
        ("predict", tiny.cached(cache, predict=ClassLabels(20, 12))),
    ):
        text = message(getattr(tiny.trainer(tmp_path, 1), verb), stage, datamodule=data)
        assert "has 12 classes, but network.num_classes is 11" in text


@pytest.mark.parametrize("label", [-1, 12, 13])
def test_a_label_that_nobody_announced_is_named_at_its_batch(tiny, tmp_path, batch, label):
    """12 is the null class: such images would teach it."""
    batch["label"][5] = label
    rows = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    loader = DataLoader(rows, batch_size=8)
    assert f"label {label} " in message(tiny.trainer(tmp_path, 1).fit, tiny.generator(), loader)
    assert f"label {label} " in message(tiny.trainer(tmp_path, 1).predict, tiny.generator(), loader)


def test_a_label_out_of_range_is_not_sampled(tiny):
    assert "label 13 " in message(tiny.generator().sample, torch.arange(1), torch.tensor([13]))
    tiny.generator().sample(torch.arange(1), torch.tensor([12]))  # no class: that is one


def test_a_cache_of_another_tokenizer_or_shape_is_refused(tiny, tmp_path, cache):
    other = tiny.generator(tokenizer=tiny.measured(1))
    for verb in ("fit", "validate", "test"):
        text = message(getattr(tiny.trainer(tmp_path, 1), verb), other, datamodule=tiny.cached(cache))
        assert other.tokenizer.fingerprint() in text
        assert tiny.measured().fingerprint() in text
    network = tiny.dit(latent_shape=(4, 2, 2))
    text = message(
        tiny.trainer(tmp_path, 1).fit,
        LatentDiffusion(network, optimization=Optimization(1e-3)),
        datamodule=tiny.cached(cache),
    )
    assert "(4, 4, 4)" in text
    assert "network.latent_shape is (4, 2, 2)" in text


def test_going_on_with_another_tokenizer_is_refused_but_not_with_another_decoder(tiny, tmp_path, cache):
    path = tmp_path / "checkpoints/last.ckpt"
    tiny.trainer(tmp_path, 1, [SaveCheckpoint()]).fit(tiny.generator(), datamodule=tiny.cached(cache))
    other = tiny.generator(tokenizer=tiny.measured(1))
    for verb, data in (("fit", tiny.data()), ("predict", tiny.cached(cache, predict=ClassLabels(2, 12)))):
        text = message(getattr(tiny.trainer(tmp_path, 2), verb), other, datamodule=data, ckpt_path=path)
        assert tiny.measured().fingerprint() in text
        assert other.tokenizer.fingerprint() in text
    refined = tiny.measured()
    torch.nn.init.normal_(refined.decoder.conv_out.weight)
    for tokenizer in (refined, None):
        trainer = tiny.trainer(tmp_path, 2)
        trainer.fit(tiny.generator(tokenizer=tokenizer), datamodule=tiny.cached(cache), ckpt_path=path)
        assert trainer.global_step == 2


def test_a_checkpoint_of_a_tokenizer_is_refused(tiny, tmp_path, cache):
    tiny.trainer(tmp_path, 1, [SaveCheckpoint()]).fit(tiny.stage(LatentAlignment), datamodule=tiny.data())
    path = tmp_path / "checkpoints/last.ckpt"
    text = message(tiny.trainer(tmp_path, 2).fit, tiny.generator(), datamodule=tiny.cached(cache), ckpt_path=path)
    assert "stage LatentAlignment, this run is LatentDiffusion" in text


def test_a_checkpoint_of_another_size_is_refused(tiny, tmp_path, cache):
    tiny.trainer(tmp_path, 1, [SaveCheckpoint()]).fit(tiny.generator(), datamodule=tiny.cached(cache))
    path = tmp_path / "checkpoints/last.ckpt"
    for verb in ("fit", "validate"):
        run = getattr(tiny.trainer(tmp_path, 2, limit_val_batches=1), verb)
        text = message(run, tiny.generator(tiny.dit(width=32)), datamodule=tiny.cached(cache), ckpt_path=path)
        assert "network.embed_latent.weight is (16, 4) there and (32, 4) here" in text


def test_what_the_data_lack_is_named(tiny, tmp_path, cache):
    alignment = RepresentationAlignment(tiny.encoder(), 16, hidden_width=8, block=1)
    fit = tiny.trainer(tmp_path, 1).fit
    text = message(fit, tiny.generator(representation_alignment=alignment), datamodule=tiny.cached(cache))
    assert "representation_alignment needs images" in text
    text = message(fit, tiny.generator(tokenizer=tiny.tokenizer()), datamodule=tiny.data())
    assert "never measured" in text
    text = message(fit, tiny.generator(tokenizer=None), datamodule=tiny.data())
    assert "set tokenizer" in text
    data = tiny.cached(cache, predict=ClassLabels(2, 12))
    text = message(tiny.trainer(tmp_path, 1).predict, tiny.generator(tokenizer=None), datamodule=data)
    assert "set tokenizer" in text
    assert "num_steps=0" in message(Euler, 0)


# --- ranks


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    """Results of one process and of two on gloo, and their folder."""
    root = tmp_path_factory.mktemp("ranks")
    tiny.cache(root / "cache", tiny.measured())
    return generate(root / "one", 1), *run_ranks(2, generate, root / "two", 2), root


def test_validation_and_quality_are_the_same_on_two_ranks(ranks):
    one, first, second, _ = ranks
    assert {"val/loss", "val/mse_t0.5", "val/gfd_tiny", "val/kid_tiny_steps2", "val/class_agreement"} <= one[
        "values"
    ].keys()
    assert first["values"] == pytest.approx(one["values"], rel=1e-5)
    assert second["values"] == pytest.approx(one["values"], rel=1e-5)


def test_samples_are_the_same_files_on_two_ranks(ranks):
    *_, root = ranks
    files = [{p.relative_to(root / n): p.read_bytes() for p in (root / n).rglob("*.png")} for n in ("one", "two")]
    assert len(files[0]) == 43 + 1
    assert Path("images/samples_0000000.png") in files[0]
    assert files[0] == files[1]
    arrays = [np.load(root / n / "samples_43x16x16x3.npz") for n in ("one", "two")]
    assert np.array_equal(arrays[0]["arr_0"], arrays[1]["arr_0"])


def test_each_rank_draws_its_share_of_a_grid(ranks):
    one, first, second, _ = ranks
    assert (one["decoded"], first["decoded"], second["decoded"]) == (15, 8, 8)


def test_two_ranks_train_the_model_of_one(ranks):
    """Noise, times and dropped labels belong to the images, whichever rank has them."""
    one, first, second, _ = ranks
    assert one["global_step"] == first["global_step"] == 4
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-3, atol=1e-5)
    bins = [key for key in first["logs"] if key.startswith("train/mse_t")]
    assert bins
    assert all(first["logs"][key] == second["logs"][key] for key in bins)  # of all ranks
    assert first["logs"]["train/mse"] == second["logs"]["train/mse"] == pytest.approx(one["logs"]["train/mse"], 1e-4)
