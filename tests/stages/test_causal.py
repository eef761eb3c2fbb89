"""AliTok's two stages: the loss of the prefix, the quantizer in the step, phases that resume, the hand-over."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aligntok.callbacks import LinearProbe, SaveCheckpoint
from aligntok.data import Augmentation
from aligntok.errors import UserError
from aligntok.losses import AdversarialLoss, Reference
from aligntok.networks import BlurDiscriminator
from aligntok.stages import CausalTokenization, DecoderRefinement, LatentAlignment
from aligntok.stages.causal import prefix_target

END = 9
PHASES = {  # LPIPS and logits, logits alone, logits and GAN
    "learning_rate": {0: 0.0, 2: 2e-3, 5: 1e-3, 6: 2e-4},
    "perceptual_weight": {2: 0.1, 3: 1.0},
    "lpips_weight": {2: 1.0, 3: 0.0},
}


class Distance(nn.Module):
    """A judge that counts its calls; what it sees is not the pixels one by one."""

    def __init__(self, power=2):
        super().__init__()
        self.calls, self.power = 0, power

    def forward(self, image, reference):
        self.calls += 1
        blurred = [F.avg_pool2d(x, 4, 2, padding=2) for x in (image, reference)]
        return (blurred[0] - blurred[1]).abs().pow(self.power).mean()


def gan():
    torch.manual_seed(1)
    discriminator = BlurDiscriminator(width=8, num_stages=1, logit_size=4)
    return AdversarialLoss(discriminator, weight={5: 0.0, 6: 0.1}, adaptive=False, discriminator_start=5)


def stage_of(tiny, tokenizer=None, cls=CausalTokenization, **options):
    if cls is CausalTokenization:
        options = {"auxiliary": "mse", **options}
    stage = tiny.stage(cls, tokenizer=tokenizer or tiny.causal(), pixel_loss="mse", **options)
    stage.logged = {}
    stage.log_dict = lambda values, **_: stage.logged.update(values)
    return stage.train()


@pytest.mark.parametrize(("num_prefix", "columns"), [(6, [0, 1, 2, 3, 4, 5]), (7, [0, 0, 1, 2, 3, 4, 5])])
def test_the_prefix_must_give_the_first_row_after_the_first_patch_if_there_is_one_more(num_prefix, columns):
    image = torch.rand(2, 3, 8, 24)
    wanted = torch.cat([image[:, :, :4, 4 * column : 4 * column + 4] for column in columns], dim=-1)
    assert torch.equal(prefix_target(image, 4, num_prefix), wanted)


@pytest.mark.parametrize("num_prefix", [4, 5])
def test_loss_and_gradients_are_those_that_autograd_gives_to_the_whole_sum(tiny, num_prefix):
    tokenizer = tiny.causal(num_prefix=num_prefix, update="gradient")
    stage = stage_of(tiny, tokenizer, perceptual=Distance(), perceptual_weight=0.3, lpips=Distance(1), lpips_weight=0.7)
    image = tiny.images(4)
    latent = tokenizer.adapter(tokenizer.encoder(image))
    codes = tokenizer.quantizer.lookup(tokenizer.quantizer.tokens(latent))[:, :, None]
    reconstruction, prefix = tokenizer.decoder.with_prefix(latent + (codes - latent).detach())
    wanted = (
        F.mse_loss(reconstruction, image)
        + 10 * num_prefix / 16 * F.mse_loss(prefix, prefix_target(image, 4, num_prefix))
        + 0.3 * Distance()(reconstruction, image)
        + 0.7 * Distance(1)(reconstruction, image)
        + 0.25 * F.mse_loss(latent, codes.detach())
        + F.mse_loss(codes, latent.detach())
    )
    parameters = list(tokenizer.parameters())
    gradients = torch.autograd.grad(wanted, parameters)
    loss = stage.training_step({"image": image}, 0)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    terms = {"mse", "prefix_mse", "perceptual", "lpips", "commitment", "codebook", "loss"}
    assert {f"train/{name}" for name in terms} == stage.logged.keys()


def test_the_judge_of_the_prefix_sees_the_whole_image_and_moves_the_prefix_alone(tiny):
    tokenizer = tiny.causal(num_prefix=5)
    judge = Distance()
    stage = stage_of(tiny, tokenizer, auxiliary="perceptual", perceptual=judge, perceptual_weight=0.5)
    image = tiny.images(4)
    latent, _ = stage.encode({"image": image})
    reconstruction, prefix = tokenizer.decoder.with_prefix(latent)
    weight, value = stage.prefix_terms(Reference(image), reconstruction, prefix)["prefix_perceptual"]
    composed = reconstruction.clone()
    composed[..., :4, :] = prefix[..., 4:]
    assert weight == 0.5
    torch.testing.assert_close(value, judge(composed, image))
    on_prefix, on_rows = torch.autograd.grad(value, [prefix, reconstruction], allow_unused=True, retain_graph=True)
    assert on_rows is None
    assert not on_prefix[..., :4].any()  # the first patch of the first version is no part of the image
    assert on_prefix[..., 4:].abs().sum() > 0
    head, prefix_head = tokenizer.decoder.head.proj.weight, tokenizer.decoder.prefix_head.proj.weight
    gradients = torch.autograd.grad(value, [head, prefix_head], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].abs().sum() > 0


@pytest.mark.parametrize("auxiliary", ["mse", "perceptual"])
def test_the_decoder_runs_once_and_no_parameter_is_unused(tiny, auxiliary):
    stage = stage_of(tiny, auxiliary=auxiliary, perceptual=Distance(), adversarial=tiny.gan(weight=0.1))
    calls = []
    for part in (stage.tokenizer.decoder.transformer, stage.tokenizer.encoder):
        part.register_forward_hook(lambda *_: calls.append(1))
    stage.training_step({"image": tiny.images(2)}, 0).backward()
    assert len(calls) == 2
    assert stage.loss.perceptual["perceptual"].calls == (2 if auxiliary == "perceptual" else 1)
    assert [name for name, p in stage.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_term_without_weight_is_not_computed(tiny):
    judges = [Distance(), Distance()]
    stage = stage_of(tiny, perceptual=judges[0], perceptual_weight=0.0, lpips=judges[1], lpips_weight={0: 1.0, 1: 0.0})
    stage.training_step({"image": tiny.images(2)}, 0)
    assert [judge.calls for judge in judges] == [0, 1]
    assert "train/lpips" in stage.logged
    assert "train/perceptual" not in stage.logged


def test_pixel_loss(tiny):
    for pixel_loss, wanted in (("l1", F.l1_loss), ("mse", F.mse_loss)):
        stage = tiny.stage(LatentAlignment, pixel_loss=pixel_loss)
        image, other = tiny.images(2), tiny.images(2, seed=1)
        assert stage.loss.terms(Reference(image), other, 0) == {pixel_loss: (1.0, wanted(other, image))}


def test_a_distance_sees_the_real_images_once_per_step(tiny):
    judge = tiny.judge()
    stage, seen = stage_of(tiny, auxiliary="perceptual", perceptual=judge), []
    intermediates = judge.judge.network.intermediates
    judge.judge.network.intermediates = lambda image, layers: seen.append(image) or intermediates(image, layers)
    image = tiny.images(4)
    stage.training_step({"image": image}, 0)
    assert sum(torch.equal(x, image) for x in seen) == 1
    assert len(seen) == 3  # and the reconstruction, and that with the first row of the prefix


@pytest.mark.parametrize(
    ("tokenizer", "options", "words"),
    [
        ({"num_prefix": 3}, {}, r"num_prefix 3 .* it is 4, the patches of the first row, or 5"),
        ({"prefix_head": False}, {}, r"auxiliary mse does not go with .* with no prefix_head"),
        ({}, {"auxiliary": "none"}, r"auxiliary none does not go with .* with a prefix_head"),
        ({}, {"auxiliary": "perceptual"}, r"auxiliary perceptual needs a perceptual term of the loss"),
    ],
)
def test_parts_that_do_not_fit_the_loss_are_refused(tiny, tokenizer, options, words):
    with pytest.raises(UserError, match=words):
        stage_of(tiny, tiny.causal(**tokenizer), **options)


def test_a_continuous_tokenizer_is_refused(tiny):
    with pytest.raises(UserError, match=r"needs tokenizer\.quantizer"):
        stage_of(tiny, tiny.tokenizer(), auxiliary="none")


def test_what_validation_gives_is_what_the_tokens_decode_to(tiny):
    stage = stage_of(tiny).eval()
    stage.log_mean = lambda *_: None
    stage._trainer = type("Trainer", (), {"testing": False, "global_step": 0, "sanity_checking": False})()
    batch = {"image": tiny.images(2)}
    outputs = stage.validation_step(batch, 0)
    tokens = stage.predict_step(batch, 0)
    assert torch.equal(outputs["tokens"], tokens)
    assert tokens.shape == (2, 20)
    assert outputs["latent"].shape == (2, 4, 1, 20)
    assert torch.equal(outputs["latent"][1, :, 0, 7], stage.tokenizer.quantizer.codebook[tokens[1, 7]])
    assert torch.equal(outputs["reconstruction"], stage.tokenizer.decode(tokens))


def test_the_linear_probe_takes_the_codes_of_the_tokens(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, 1, [LinearProbe()], limit_val_batches=1.0, enable_checkpointing=False)
    stage = tiny.stage(CausalTokenization, tokenizer=tiny.causal(), auxiliary="mse")
    values = trainer.validate(stage, tiny.data(), verbose=False)[0]
    assert {"val/probe", "val/probe_pooled"} <= values.keys()


def test_a_quantizer_learns_in_alignment_too(tiny, tmp_path):
    """AlignTok's stages with codes between adapter and decoder."""
    tokenizer = tiny.tokenizer()
    tokenizer.quantizer = tiny.causal().quantizer
    start = tokenizer.quantizer.codebook.detach().clone()
    tiny.trainer(tmp_path, 2).fit(tiny.stage(LatentAlignment, tokenizer=tokenizer), datamodule=tiny.data())
    assert not torch.equal(tokenizer.quantizer.codebook, start)
    assert torch.equal(tokenizer.latent_std, torch.ones(4, 1, 1))


# Phases and stages


def fit(tiny, folder, max_steps, seed=0, cls=CausalTokenization, previous=None, ckpt_path=None, every=None, **options):
    sizes = {"num_prefix": 5, "update": "clustering", "decay": 0.5}
    if cls is DecoderRefinement:
        sizes |= {"causal": False, "prefix_head": False, "num_buffer": 3}
    else:
        options = {"auxiliary": "perceptual", **options}
    stage = tiny.stage(
        cls,
        tokenizer=tiny.causal(seed, **sizes),
        pixel_loss="mse",
        perceptual=Distance(),
        lpips=Distance(1),
        adversarial=gan(),
        **{**PHASES, **options},
    )
    if previous is not None:
        stage.init_from(previous)
    callbacks = [SaveCheckpoint(every_n_steps=every or max_steps)]
    trainer = tiny.trainer(folder, max_steps, callbacks, gradient_clip_val=1.0)
    torch.manual_seed(seed + 77)  # a new process has another state of the generator
    trainer.fit(stage, datamodule=tiny.data(26, augmentation=Augmentation("random_resized")), ckpt_path=ckpt_path)
    return stage, torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A run of stage 1 through all phases, and where its checkpoint is."""
    folder = tmp_path_factory.mktemp("first")
    _, checkpoint = fit(tiny, folder, END)
    return checkpoint, folder / "checkpoints/last.ckpt"


@pytest.mark.parametrize("cut", [2, 4, 7])  # in the middle of each phase
def test_a_run_resumed_in_any_phase_equals_the_uninterrupted_one(tiny, tmp_path, first, cut):
    straight, _ = first
    _, half = fit(tiny, tmp_path, cut)
    assert half["global_step"] == cut
    _, resumed = fit(tiny, tmp_path, END, seed=5, ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    assert {"tokenizer.quantizer.codebook", "tokenizer.quantizer.usage"} <= resumed["state_dict"].keys()
    assert any(key.startswith("loss.adversarial.discriminator.") for key in resumed["state_dict"])
    assert not torch.equal(
        half["state_dict"]["tokenizer.quantizer.usage"], resumed["state_dict"]["tokenizer.quantizer.usage"]
    )
    for key in straight.keys() - {"callbacks", "hparams_name", "pytorch-lightning_version", "loops"}:
        tiny.assert_same(resumed[key], straight[key], key)


def test_the_refined_decoder_starts_from_the_causal_one_and_the_tokens_stay(tiny, tmp_path, first):
    checkpoint, path = first
    old = {key.removeprefix("tokenizer."): value for key, value in checkpoint["state_dict"].items()}
    stage = tiny.stage(
        DecoderRefinement,
        tokenizer=tiny.causal(3, num_prefix=5, causal=False, prefix_head=False, num_buffer=3),
    )
    own = tiny.copies(stage.tokenizer)
    stage.init_from(path)
    for name, value in stage.tokenizer.state_dict().items():
        kept = name in ("decoder.buffer_tokens", "decoder.positions")  # of another count there
        assert torch.equal(value, own[name] if kept else old[name]), name

    before, fingerprint = tiny.copies(stage.tokenizer), stage.tokenizer.fingerprint()
    refined, _ = fit(tiny, tmp_path, END, seed=3, cls=DecoderRefinement, previous=path)
    after = tiny.copies(refined.tokenizer)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder"}
    assert refined.tokenizer.fingerprint() == fingerprint
    assert not refined.tokenizer.quantizer.training
    assert torch.equal(refined.tokenizer.latent_std, torch.ones(4, 1, 1))  # tokens are not measured


def test_the_quantizer_has_no_term_where_it_is_frozen(tiny):
    tokenizer = tiny.causal(causal=False, prefix_head=False, num_buffer=3)
    stage = stage_of(tiny, tokenizer, cls=DecoderRefinement)
    stage.training_step({"image": tiny.images(2)}, 0).backward()
    assert stage.logged.keys() == {"train/mse", "train/loss"}
    assert {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None} == {"decoder"}


def test_a_stage_goes_on_from_its_own_kind_and_other_sizes_are_named(tiny, tmp_path, first):
    _, path = first
    stage = stage_of(tiny, tiny.causal(8, num_prefix=5))
    stage.init_from(path)
    assert torch.equal(stage.tokenizer.quantizer.codebook, first[0]["state_dict"]["tokenizer.quantizer.codebook"])
    fit(tiny, tmp_path, 1, cls=DecoderRefinement, previous=path)
    other = tiny.causal(num_prefix=5, causal=False, prefix_head=False, num_buffer=2)
    with pytest.raises(UserError, match=r"decoder\.buffer_tokens is \(3, 16\) there and \(2, 16\) here"):
        tiny.stage(DecoderRefinement, tokenizer=other).init_from(tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(
        UserError, match="is of stage DecoderRefinement, whose decoder is not causal, but CausalTokenization"
    ):
        stage.init_from(tmp_path / "checkpoints/last.ckpt")
