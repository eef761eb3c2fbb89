"""Generators in pieces on two ranks are those of one process, and their checkpoints are read anywhere."""

import os
import pickle
import shutil
import signal
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.tensor import DTensor

import aligntok.sharding
from aligntok import preemption
from aligntok.__main__ import main
from aligntok.callbacks import EMA, SampleGrid, SaveCheckpoint
from aligntok.cli import ChangeBlocks
from aligntok.errors import UserError
from aligntok.files import locked
from aligntok.flow import Euler
from aligntok.losses import RepresentationAlignment
from aligntok.networks import compile_blocks
from aligntok.preemption import Preempted
from aligntok.sharding import ShardedStrategy, publish
from aligntok.stages import DecoderRefinement
from aligntok.stages.generator import load_generator
from aligntok.weights import load_network, read_checkpoint
from aligntok.weights.sharded import META
from tests.conftest import Tiny
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*overridden `on_before_batch_transfer`"),  # stage and data both do
    pytest.mark.skipif(torch.__version__ < "2.9", reason="the strategy needs torch 2.9"),
]
SAVED, STEPS = 2, 4
STATES = ("state_dict", "current_model_state", "averages")


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, fused=True)


def stage(name):
    options = {"optimizer": adamw, "learning_rate": 1e-3}
    if name == "ar":
        return Tiny.autoregressive(Tiny.ar(dropout=0.0), **options)
    torch.manual_seed(9)
    alignment = RepresentationAlignment(Tiny.encoder(), width=16, hidden_width=8, block=1)
    return Tiny.generator(representation_alignment=alignment, sampler=Euler(2), **options)


class Watch(SaveCheckpoint):
    """Notes the norms of the gradient, and whether weights are in pieces."""

    def __init__(self, keep_every_n_steps):
        super().__init__(every_n_steps=STEPS, keep_every_n_steps=keep_every_n_steps)
        self.norms, self.pieces = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.norms.append(float(trainer.callback_metrics["train/grad_norm_model"]))
        self.pieces.append(all(isinstance(p, DTensor) for p in pl_module.network.parameters()))
        super().on_train_batch_end(trainer, pl_module, *args)


def fit(folder, name="dit", steps=STEPS, ckpt_path=None, measured=False, compiled=False, callbacks=(), **options):
    """Train; if measured, validate at the end, and draw samples there and once before."""
    watch = Watch(SAVED if measured else None)
    callbacks = [*callbacks, EMA([0.5, 0.9]), watch, *([ChangeBlocks("compile", compile_blocks)] if compiled else [])]
    if measured:
        options |= {"limit_val_batches": 1, "val_check_interval": STEPS, "check_val_every_n_epoch": None}
        callbacks.append(SampleGrid(every_n_steps=3, num_classes=2, per_class=3))
    options = {"gradient_clip_val": 0.05, "log_every_n_steps": 1, **options}
    trainer = Tiny.trainer(folder, steps, callbacks, **options)
    trainer.fit(stage(name), Tiny.data(), ckpt_path=ckpt_path)
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"norms": watch.norms, "pieces": watch.pieces, "values": values}


def sharded(devices=2, **options):
    return {"strategy": ShardedStrategy(**options), "devices": devices}


def checkpoint(folder, name="last.ckpt"):
    return folder / "checkpoints" / name


def refused(function, *args, **options):
    with pytest.raises(UserError) as error:
        function(*args, **options)
    return str(error.value)


class Signal(pl.Callback):
    """Has one rank get a signal in the step before a validation, in which both then know of it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx + 1 == SAVED:
            preemption.note(signal.SIGTERM)

    def on_exception(self, trainer, *args):
        assert trainer.validating


def on_two_ranks(root):
    """Train on two ranks, go on from a checkpoint of two and from one of one process, and say what is refused."""
    results = {name: fit(root / name, name, measured=True, **sharded()) for name in ("dit", "ar")}
    saved = {"two on two": checkpoint(root / "dit", "step_0000002.ckpt"), "one on two": checkpoint(root / "one dit")}
    for name, path in saved.items():
        results[name] = fit(root / name, ckpt_path=path, steps=STEPS if "step" in path.name else 6, **sharded())
    results["bf16"] = fit(root / "bf16", precision="bf16-mixed", steps=2, **sharded())
    validation = {"limit_val_batches": 1, "val_check_interval": SAVED, "check_val_every_n_epoch": None}
    with pytest.raises(Preempted):
        fit(root / "stopped", callbacks=[Signal()], **validation, **sharded())
    trainer = Tiny.trainer(root, 1, **sharded())
    gan = refused(trainer.fit, Tiny.stage(DecoderRefinement), Tiny.data())
    results["refused"] = gan, refused(fit, root / "three", **sharded(shards=3))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    results = {f"one {name}": fit(root / f"one {name}", name, measured=True) for name in ("dit", "ar")}
    results["one bf16"] = fit(root / "one bf16", precision="bf16-mixed", steps=2)
    first, second = run_ranks(2, on_two_ranks, root)
    return {**results, **first}, second, root


def load(path):
    return read_checkpoint(path, optimizer=True)


def assert_close(ours, theirs, tolerance=2e-6, where=""):
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_close(ours[key], theirs[key], tolerance, f"{where}/{key}")
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text: f"{where}: {text}")


def assert_near(ours, theirs, start, share):
    """Compare what two runs learned, up to a share of it."""
    gap, change = (sum(float((a[k] - b[k]).square().sum()) for k in a) for a, b in ((ours, theirs), (theirs, start)))
    assert gap < share * change


def assert_same_run(ours, theirs):
    for key in STATES:
        assert_close(ours[key], theirs[key])
    assert_close(ours["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"])
    assert ours["loops"] == theirs["loops"]


@pytest.mark.parametrize("name", ["dit", "ar"])
def test_two_ranks_are_one_process(runs, name):
    """Weights, averages, optimizer, norms of gradients, and what validation and its samples see."""
    results, second, root = runs
    one, two = results[f"one {name}"], results[name]
    assert two["pieces"] == [True] * STEPS
    assert one["pieces"] == [False] * STEPS
    assert two["norms"] == second[name]["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert two["values"] == pytest.approx(one["values"], rel=1e-4)
    assert_same_run(*(load(checkpoint(root / run)) for run in (name, f"one {name}")))
    for step in (3, 4):
        pictures = [(root / run / f"images/samples_{step:07d}.png").read_bytes() for run in (name, f"one {name}")]
        assert pictures[0] == pictures[1]


def test_saved_under_two_goes_on_under_two_to_the_last_bit(runs):
    _, _, root = runs
    straight, resumed = (load(checkpoint(root / name)) for name in ("dit", "two on two"))
    for key in (*STATES, "optimizer_states"):
        Tiny.assert_same(resumed[key], straight[key], key)


def test_a_signal_in_a_validation_saves_the_step(runs):
    stopped, straight = checkpoint(runs[2] / "stopped"), checkpoint(runs[2] / "dit", "step_0000002.ckpt")
    for key in (*STATES, "optimizer_states"):
        Tiny.assert_same(load(stopped)[key], load(straight)[key], key)


def test_saved_under_two_goes_on_in_one_process_and_the_reverse(runs, tmp_path):
    _, _, root = runs
    fit(tmp_path, steps=6, ckpt_path=checkpoint(root / "dit"))
    assert_same_run(load(checkpoint(root / "one on two")), load(checkpoint(tmp_path)))


def test_bf16_on_two_ranks_is_bf16_in_one_process(runs):
    results, _, root = runs
    assert results["bf16"]["norms"] == pytest.approx(results["one bf16"]["norms"], rel=0.05)
    ours, theirs = (load(checkpoint(root / run))["state_dict"] for run in ("bf16", "one bf16"))
    assert_near(ours, theirs, stage("dit").state_dict(), 0.1)
    assert all(value.dtype == torch.float32 for value in ours.values())


def test_what_is_refused(runs):
    gan, three = runs[0]["refused"]
    assert gan.startswith("trainer.strategy sharded: DecoderRefinement cannot be sharded. A tokenizer's losses")
    assert "shards=3 does not divide the 2 ranks" in three


def test_old_checkpoints_make_room(runs):
    names = {path.name for path in (runs[2] / "dit/checkpoints").iterdir()}
    assert names == {"last.ckpt", "last_0000004", "step_0000002.ckpt", "step_0000004.ckpt"}


def test_damage_is_a_line_and_no_code_is_run(runs, tmp_path):
    whole, ours = checkpoint(runs[2] / "dit", "step_0000004.ckpt"), tmp_path / "ours.ckpt"
    shutil.copytree(whole, ours)
    (ours / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))  # what torch's own reader would load
    read_checkpoint(ours)
    shard = next(iter(sorted(ours.glob("*.safetensors"))))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert f"{shard} is missing or damaged: copy the folder again" in refused(read_checkpoint, ours)
    shard.unlink()
    assert f"{shard} is missing or damaged" in refused(read_checkpoint, ours)
    meta = torch.load(ours / META, weights_only=True)
    torch.save(meta | {"shard_files": {}}, ours / META)
    assert "it lists no files" in refused(read_checkpoint, ours)
    torch.save(meta | {"evil": Touch(tmp_path / "ran")}, ours / META)
    assert "is refused: it holds more than tensors" in refused(read_checkpoint, ours)
    assert not (tmp_path / "ran").exists()
    assert "it is a folder, name the file in it" in refused(read_checkpoint, tmp_path)


class Touch:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Killed(BaseException):
    pass


CALLS = ["torch.save", "os.fsync", "pathlib.Path.rename", "pathlib.Path.symlink_to", "os.replace", "shutil.rmtree"]


@pytest.mark.parametrize("call", CALLS)
def test_a_save_that_ends_in_its_middle_leaves_a_whole_checkpoint(runs, tmp_path, call):
    """After the pieces are written; before that, see the next test."""
    pieces, last = checkpoint(runs[2] / "dit", "step_0000002.ckpt"), tmp_path / "last.ckpt"

    def save(step):
        folder = tmp_path / ".last.ckpt.partial"
        shutil.copytree(pieces, folder)
        meta = torch.load(folder / META, weights_only=True) | {"global_step": step}
        (folder / META).unlink()
        publish(meta, folder, last)

    save(1)
    with mock.patch(call, side_effect=Killed), pytest.raises(Killed):
        save(2)
    assert load(last)["global_step"] == (2 if call == "shutil.rmtree" else 1)
    shutil.rmtree(tmp_path / ".last.ckpt.partial", ignore_errors=True)
    save(3)
    assert load(last)["global_step"] == 3
    assert sum(path.is_dir() and not path.is_symlink() for path in tmp_path.iterdir()) == 1


def killed_in_a_save(root):
    """End one of two ranks while it writes its pieces of the second checkpoint."""
    write, calls = aligntok.sharding.write_shards, []

    def kill(*args):
        calls.append(args)
        if len(calls) == 2 and os.environ.get("LOCAL_RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)

    with mock.patch.object(aligntok.sharding, "write_shards", kill):
        fit(root, steps=2 * STEPS, **sharded())


def test_a_rank_killed_in_a_save_leaves_the_old_checkpoint(tmp_path, runs):
    with pytest.raises(AssertionError, match=r"\[-9, -9\]"):
        run_ranks(2, killed_in_a_save, tmp_path)
    with locked(tmp_path):
        assert not list((tmp_path / "checkpoints").glob(".*"))
    resumed = load(checkpoint(tmp_path))
    assert resumed["global_step"] == STEPS
    Tiny.assert_same(resumed["state_dict"], load(checkpoint(runs[2] / "dit"))["state_dict"])


CONFIG = """
layers: [base.yaml, stage/latent_diffusion.yaml, size/dit_debug.yaml, run/debug.yaml]
output: run
model:
  init_args:
    tokenizer: null
    network: {init_args: {latent_shape: [4, 4, 4], num_classes: 12}}
    optimization: {learning_rate: 0.001}
data:
  train: {class_path: aligntok.data.LatentShards, init_args: {folder: latents}}
  val: 0.25
  global_batch_size: 8
  augmentation: {flip: false}
trainer: {devices: 2, strategy: sharded}
"""


def commands(folder):
    os.chdir(folder)
    fit, codes = ["fit", "--config", "dit.yaml"], []
    for words in (
        [*fit, "--gradient_checkpointing", "true"],
        fit,  # it holds a run
        [*fit, "--ckpt_path", "last", "--trainer.max_steps", "4"],
        ["validate", "--config", "dit.yaml", "--ckpt_path", "last"],
    ):
        codes.append(main(words))
    return codes


@pytest.mark.slow
def test_commands(tmp_path):
    Tiny.cache(tmp_path / "latents", Tiny.measured())
    (tmp_path / "dit.yaml").write_text(CONFIG)
    for codes in run_ranks(2, commands, tmp_path):
        assert codes == [0, 2, 0, 0]
    last = checkpoint(tmp_path / "run")
    saved = read_checkpoint(last)
    assert saved["global_step"] == 4
    network, generator = load_network(last), load_generator(last)
    for key, value in network.state_dict().items():
        assert torch.equal(value, saved["state_dict"][f"network.{key}"])
    assert generator.sample(torch.arange(2), torch.arange(2)).shape == (2, 4, 4, 4)


def compiled(root):
    for name, options in (("sharded", sharded()), ("ddp", {"strategy": "ddp", "devices": 2})):
        fit(root / name, measured=True, compiled=True, **options)


@pytest.mark.slow  # minutes of compiling
def test_compiled_on_two_ranks_is_eager_in_one_process(runs, tmp_path):
    run_ranks(2, compiled, tmp_path, seconds=1200)
    start, theirs = stage("dit").state_dict(), load(checkpoint(runs[2] / "one dit"))["state_dict"]
    for name in ("sharded", "ddp"):
        assert_near(load(checkpoint(tmp_path / name))["state_dict"], theirs, start, 1e-3)


def on_four_ranks(root):
    path = checkpoint(root / "dit", "step_0000002.ckpt")
    for shards in (None, 2):  # FSDP, HSDP
        fit(root / f"four {shards}", ckpt_path=path, **sharded(4, shards=shards))


@pytest.mark.slow
def test_saved_under_two_goes_on_under_four(runs):
    root = runs[2]
    run_ranks(4, on_four_ranks, root, seconds=600)
    for shards in (None, 2):
        assert_same_run(load(checkpoint(root / f"four {shards}")), load(checkpoint(root / "dit")))
