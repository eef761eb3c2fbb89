"""Which weights decay, and what becomes of checkpoints from before they were told apart."""

import pytest
import torch

from aligntok.callbacks import EMA, SaveCheckpoint
from aligntok.layers import read_configs
from aligntok.stages import CausalTokenization, LatentAlignment
from aligntok.stages.optimization import parameters_by_group
from aligntok.weights import alitok
from aligntok.weights.official import official_names

OFFICIAL = ("ln", "bias", "norm", "embed", "latent_tokens")  # AliTok, utils/train_utils.py


def words(*layers):
    return read_configs(*layers)["model"]["init_args"]["optimization"]["no_decay"]


def decaying(optimizer):
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def adamw(parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_what_does_not_decay_is_what_alitoks_code_exempts(tiny, kind):
    if kind == "tokenizer":
        no_decay = words("stage/causal_tokenization.yaml", "stage/discrete_tokenizer.yaml")
        stage = tiny.stage(
            CausalTokenization, tokenizer=tiny.causal(), auxiliary="mse", optimizer=adamw, no_decay=no_decay
        )
        names = {key: official_names(key, alitok.TOKENIZER_NAMES)[0] for key, _ in stage.tokenizer.named_parameters()}
        parameters = dict(stage.tokenizer.named_parameters())
    else:
        stage = tiny.autoregressive(optimizer=adamw, no_decay=words("stage/autoregressive.yaml"))
        parameters = dict(stage.network.named_parameters())
        names = {key: official_names(key, alitok.GENERATOR_NAMES)[0] for key in parameters}
    decay = decaying(stage.configure_optimizers()["optimizer"])
    for name, parameter in parameters.items():
        exempt = parameter.ndim < 2 or any(word in names[name] for word in OFFICIAL)
        assert decay[id(parameter)] == (0.0 if exempt else 0.1), name
    assert set(decay.values()) == {0.0, 0.1}


def test_a_norm_without_gradient_stays_where_it_is_and_a_matrix_shrinks(tiny):
    stage = tiny.stage(LatentAlignment, optimizer=adamw, no_decay=[], learning_rate=0.5)
    optimizer = stage.configure_optimizers()["optimizer"]
    before = tiny.copies(stage.tokenizer.decoder)
    for parameter in stage.tokenizer.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in stage.tokenizer.decoder.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.ndim < 2), name


def test_clipping_and_norms_are_of_the_whole_group(tiny, tmp_path):
    def plain(parameters):
        return torch.optim.SGD(parameters)

    stage = tiny.stage(learning_rate=1.0, optimizer=plain, no_decay=[], adversarial=tiny.gan(weight=0.5))
    start = tiny.copies(stage)
    trainer = tiny.trainer(tmp_path, 1, gradient_clip_val=1e-3)
    trainer.fit(stage, datamodule=tiny.data())
    assert len(trainer.optimizers[0].param_groups) == 4
    assert parameters_by_group(trainer.optimizers[0]).keys() == {"generator", "discriminator"}
    assert {"train/grad_norm_generator", "train/grad_norm_discriminator"} <= trainer.callback_metrics.keys()
    for prefix in ("tokenizer", "loss.adversarial"):
        steps = [(v - start[n]).flatten().double() for n, v in tiny.copies(stage).items() if n.startswith(prefix)]
        assert float(torch.cat(steps).norm()) == pytest.approx(1e-3, rel=2e-2)


# Checkpoints of earlier versions


def as_before(checkpoint):
    """Return a checkpoint in the key layout of the versions before there was a ``ReconstructionLoss``."""
    for states in ("state_dict", "current_model_state"):
        checkpoint[states] = {key.removeprefix("loss."): value for key, value in checkpoint[states].items()}
    return checkpoint


def fit(tiny, folder, steps, ckpt_path=None, seed=0, **options):
    adversarial = tiny.gan(seed, weight=0.5)
    stage = tiny.stage(LatentAlignment, seed, adversarial=adversarial, learning_rate={0: 1e-3, 6: 0.0}, **options)
    trainer = tiny.trainer(folder, steps, [SaveCheckpoint(1), EMA(0.5)])
    trainer.fit(stage, datamodule=tiny.data(), ckpt_path=ckpt_path)
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def test_a_checkpoint_with_the_old_keys_goes_on(tiny, tmp_path):
    straight = fit(tiny, tmp_path / "straight", 5)
    old = as_before(fit(tiny, tmp_path / "cut", 3))
    assert any(key.startswith("adversarial.discriminator.") for key in old["state_dict"])
    torch.save(old, tmp_path / "old.ckpt")
    resumed = fit(tiny, tmp_path / "resumed", 5, tmp_path / "old.ckpt", seed=1)
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        tiny.assert_same(resumed[key], straight[key], key)


def test_a_checkpoint_in_which_all_weights_decayed_keeps_its_moments(tiny, tmp_path):
    """Without weight decay it makes no difference which weights are exempt from it."""

    def plain(parameters):
        return torch.optim.AdamW(parameters, weight_decay=0.0)

    straight = fit(tiny, tmp_path / "straight", 5, optimizer=plain)
    old = as_before(fit(tiny, tmp_path / "cut", 3, optimizer=plain))
    assert [group["name"] for group in old["optimizer_states"][0]["param_groups"]] == ["generator", "discriminator"]
    torch.save(old, tmp_path / "old.ckpt")
    resumed = fit(tiny, tmp_path / "resumed", 5, tmp_path / "old.ckpt", seed=1, optimizer=plain, no_decay=["conv_in"])
    names = [group["name"] for group in resumed["optimizer_states"][0]["param_groups"]]
    assert names == ["generator", "generator_no_decay", "discriminator", "discriminator_no_decay"]
    tiny.assert_same(resumed["state_dict"], straight["state_dict"])
