"""The adversarial step: one optimizer, one pass, the gradients of the textbook's two losses."""

import pytest
import torch
import torch.nn.functional as F

from aligntok.callbacks import EMA
from aligntok.losses import AdversarialLoss, hinge
from aligntok.networks import BlurDiscriminator, GaussianAdapter, PatchDiscriminator
from aligntok.stages import DecoderRefinement, LatentAlignment, PerceptualAlignment

PERCEPTUAL_WEIGHT, GAN_WEIGHT = 0.7, 0.5


def textbook(stage, image):
    """Return lambda and the gradients of VQGAN's two losses, each from its own passes, by full autograd."""
    discriminator = stage.loss.adversarial.discriminator
    reconstruction = stage.tokenizer.decode(stage.tokenizer.encode(image), clamp=False)
    rec = F.l1_loss(reconstruction, image)
    rec = rec + PERCEPTUAL_WEIGHT * stage.loss.perceptual["perceptual"](reconstruction, image)
    adv = -discriminator(reconstruction).mean()
    last = stage.tokenizer.decoder.last_layer
    rec_norm, adv_norm = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (rec, adv))
    scale = (
        (rec_norm / (adv_norm + 1e-4)).clamp(0, 1e4).detach() if stage.loss.adversarial.adaptive else torch.tensor(1.0)
    )
    generator = [p for p in stage.tokenizer.parameters() if p.requires_grad]
    gradients = list(torch.autograd.grad(rec + GAN_WEIGHT * scale * adv, generator))
    judged = hinge(discriminator(image), discriminator(reconstruction.detach()))
    gradients += torch.autograd.grad(judged, list(discriminator.parameters()))
    return scale, gradients, rec + GAN_WEIGHT * scale * adv + judged


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(
    "discriminator",
    [
        lambda: PatchDiscriminator(width=8, num_layers=2, norm="batch"),
        lambda: PatchDiscriminator(width=8, num_layers=1, norm="group"),
        lambda: BlurDiscriminator(width=8, num_stages=2, logit_size=4),
    ],
)
def test_gradients_are_those_of_the_two_textbook_losses(tiny, discriminator, adaptive):
    torch.manual_seed(3)
    adversarial = AdversarialLoss(discriminator(), weight=GAN_WEIGHT, adaptive=adaptive, discriminator_start=0)
    options = {"perceptual": tiny.judge(), "perceptual_weight": PERCEPTUAL_WEIGHT, "adversarial": adversarial}
    stage = tiny.stage(PerceptualAlignment, semantic_weight=0.0, **options)
    stage.train()
    image = tiny.images(4)
    scale, wanted, value = textbook(stage, image)
    logs = {}
    stage.log_dict = lambda values, **_: logs.update(values)
    loss = stage.training_step({"image": image}, 0)
    loss.backward()
    parameters = [p for p in stage.tokenizer.parameters() if p.requires_grad] + list(
        adversarial.discriminator.parameters()
    )
    torch.testing.assert_close(logs["train/gan_adaptive_weight"], scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, value, rtol=1e-4, atol=1e-6)
    assert len(wanted) == len(parameters)
    for ours, theirs in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-7)
    assert all(p.grad is None for p in stage.loss.perceptual["perceptual"].parameters())


def test_without_a_discriminator_it_is_plain_autograd(tiny):
    stage = tiny.stage(
        PerceptualAlignment, semantic_weight=0.0, perceptual=tiny.judge(), perceptual_weight=PERCEPTUAL_WEIGHT
    )
    image = tiny.images(4)
    reconstruction = stage.tokenizer.decode(stage.tokenizer.encode(image), clamp=False)
    loss = F.l1_loss(reconstruction, image) + PERCEPTUAL_WEIGHT * stage.loss.perceptual["perceptual"](
        reconstruction, image
    )
    parameters = [p for p in stage.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(loss, parameters)
    stage.log_dict = lambda *_, **__: None
    ours = stage.training_step({"image": image}, 0)
    ours.backward()
    torch.testing.assert_close(ours, loss)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_each_image_goes_once_through_judge_and_discriminator(tiny):
    stage = tiny.stage(adversarial=tiny.gan(weight=1.0), perceptual=tiny.judge())
    stage.log_dict = lambda *_, **__: None
    calls = {"discriminator": 0, "judge": 0}
    stage.loss.adversarial.discriminator.register_forward_hook(
        lambda *_: calls.update(discriminator=calls["discriminator"] + 1)
    )
    judge = stage.loss.perceptual["perceptual"]
    features = judge.features
    judge.features = lambda image: calls.update(judge=calls["judge"] + 1) or features(image)
    stage.training_step({"image": tiny.images(2)}, 0).backward()
    assert calls == {"discriminator": 2, "judge": 2}  # real and reconstruction


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (LatentAlignment, {}),
        (LatentAlignment, {"kl_weight": 1e-3}),
        (LatentAlignment, {"gaussian": True}),
        (PerceptualAlignment, {}),
        (PerceptualAlignment, {"kl_weight": 1e-3}),
        (PerceptualAlignment, {"gaussian": True}),
        (PerceptualAlignment, {"lora_rank": 2}),
        (DecoderRefinement, {}),
        (DecoderRefinement, {"gaussian": True}),
    ],
)
@pytest.mark.parametrize("discriminator_start", [0, 5])
def test_no_parameter_is_unused(tiny, cls, options, discriminator_start):
    """What DistributedDataParallel demands: every parameter that is handed to it takes part in each backward."""
    options = dict(options)
    gaussian = options.pop("gaussian", False) or "kl_weight" in options
    tokenizer = tiny.tokenizer(adapter=GaussianAdapter) if gaussian else None
    adversarial = tiny.gan(weight={99: 0.0, 100: 1.0}, discriminator_start=discriminator_start)
    stage = tiny.stage(cls, tokenizer=tokenizer, adversarial=adversarial, **options)
    stage.log_dict = lambda *_, **__: None
    stage.training_step({"image": tiny.images(2)}, 0).backward()
    assert [name for name, p in stage.named_parameters() if p.requires_grad and p.grad is None] == []
    grouped = {id(p) for group in stage.parameter_groups().values() for p in group.parameters.values()}
    assert grouped == {id(p) for p in stage.parameters() if p.requires_grad}


def run(tiny, tmp_path, accumulate=1, cls=LatentAlignment, steps=5, data=None, callbacks=(), **options):
    stage = tiny.stage(
        cls,
        **{
            "learning_rate": 0.1,
            "optimizer": tiny.sgd,
            "perceptual": tiny.judge(),
            "adversarial": tiny.gan(weight=0.5, adaptive=False),
            **options,
        },
    )
    start = tiny.copies(stage)
    trainer = tiny.trainer(tmp_path, steps, callbacks, accumulate_grad_batches=accumulate)
    trainer.fit(stage, datamodule=data or tiny.data())
    return stage, start, trainer


def moved(stage, start, prefix):
    return [
        name
        for name, value in tiny_copies(stage).items()
        if name.startswith(prefix) and not torch.equal(value, start[name])
    ]


def tiny_copies(stage):
    return {name: value.detach() for name, value in [*stage.named_parameters(), *stage.named_buffers()]}


def test_two_accumulated_batches_equal_one_of_twice_the_size(tiny, tmp_path):
    whole, start, trainer = run(tiny, tmp_path / "1")
    halves, _, trainer2 = run(tiny, tmp_path / "2", accumulate=2)
    assert trainer.global_step == trainer2.global_step == 5
    assert trainer2.fit_loop.total_batch_idx + 1 == 10
    for part in ("tokenizer.adapter", "tokenizer.decoder", "loss.adversarial"):
        change = max(float((v - start[n]).abs().max()) for n, v in tiny_copies(whole).items() if n.startswith(part))
        assert change > 1e-3, part  # it learned, so equality says something
    for (name, ours), theirs in zip(tiny_copies(halves).items(), tiny_copies(whole).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("cls", "still", "learning"),
    [
        (LatentAlignment, ["tokenizer.encoder"], ["tokenizer.adapter", "tokenizer.decoder"]),
        (PerceptualAlignment, ["anchor"], ["tokenizer.encoder", "tokenizer.adapter", "tokenizer.decoder"]),
        (DecoderRefinement, ["tokenizer.encoder", "tokenizer.adapter"], ["tokenizer.decoder"]),
    ],
)
def test_frozen_parts_stay_bit_equal_and_in_eval_mode(tiny, tmp_path, cls, still, learning):
    modes = {}

    class Watch(EMA):  # with an average in place, which must not touch them either
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.update({name: module.training for name, module in pl_module.named_modules()})

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer(drop_path_rate=0.5, depth=2)
    watch = Watch(0.9)
    stage, start, _ = run(tiny, tmp_path, cls=cls, tokenizer=tokenizer, callbacks=[watch], learning_rate=0.02)
    for prefix in [*still, "loss.perceptual.perceptual.judge"]:
        assert moved(stage, start, prefix) == []
        assert not any(mode for name, mode in modes.items() if name.startswith(prefix))
        assert not any(name.startswith(prefix) for name in watch.averages[0])
    for prefix in [*learning, "loss.adversarial"]:
        assert moved(stage, start, prefix), prefix
        assert modes[prefix]


def test_the_discriminators_loss_moves_the_discriminator_only(tiny, tmp_path):
    stage, start, _ = run(tiny, tmp_path, learning_rate=0.0, discriminator_learning_rate=0.1, steps=2)
    assert moved(stage, start, "tokenizer") == []
    assert moved(stage, start, "loss.adversarial")


def test_the_adversarial_term_does_not_move_the_discriminator(tiny, tmp_path):
    """With any weight of the generator's term the discriminator's step is the same."""
    steps = []
    for index, weight in enumerate((0.0, 5.0)):
        options = {"discriminator_learning_rate": 0.1, "adversarial": tiny.gan(weight=weight, adaptive=False)}
        stage, _, _ = run(tiny, tmp_path / str(index), learning_rate=0.0, steps=1, **options)
        steps.append(
            {name: value.clone() for name, value in tiny_copies(stage).items() if name.startswith("loss.adversarial")}
        )
    assert steps[0].keys() == steps[1].keys()
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-6, atol=1e-8)


def test_an_idle_discriminator_is_bit_equal_and_has_no_optimizer_state(tiny, tmp_path):
    options = {"optimizer": torch.optim.AdamW, "learning_rate": 1e-3}
    adversarial = tiny.gan(weight={3: 0.0, 4: 0.5}, discriminator_start=3)
    stage, start, trainer = run(tiny, tmp_path / "idle", steps=3, adversarial=adversarial, **options)
    optimizer = trainer.optimizers[0]
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert moved(stage, start, "loss.adversarial") == []
    assert not any(p in optimizer.state for p in groups["discriminator"])
    assert all(p in optimizer.state for p in groups["generator"])
    adversarial = tiny.gan(weight={3: 0.0, 4: 0.5}, discriminator_start=3)
    stage, start, _ = run(tiny, tmp_path / "learns", steps=4, adversarial=adversarial, **options)
    assert moved(stage, start, "loss.adversarial")


def test_before_the_generator_hears_the_discriminator_only_the_latter_learns_from_it(tiny, tmp_path):
    with_gan, _, _ = run(tiny, tmp_path / "a", steps=3, adversarial=tiny.gan(weight={3: 0.0, 4: 0.5}))
    without, start, _ = run(tiny, tmp_path / "b", steps=3, adversarial=None)
    assert moved(without, start, "tokenizer.decoder")
    assert moved(with_gan, {**start, **tiny.copies(without)}, "tokenizer") == []


def test_clipping_is_by_the_norm_of_each_group(tiny, tmp_path):
    def plain(parameters):
        return torch.optim.SGD(parameters)

    stage = tiny.stage(learning_rate=1.0, optimizer=plain, adversarial=tiny.gan(weight=0.5))
    start = tiny.copies(stage)
    tiny.trainer(tmp_path, 1, gradient_clip_val=1e-3).fit(stage, datamodule=tiny.data())
    for prefix in ("tokenizer", "loss.adversarial"):
        steps = [(v - start[n]).flatten().double() for n, v in tiny_copies(stage).items() if n.startswith(prefix)]
        assert float(torch.cat(steps).norm()) == pytest.approx(1e-3, rel=2e-2)


def test_learning_rates_follow_their_schedules(tiny, tmp_path):
    rates = []

    class Watch(EMA):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(tuple(group["lr"] for group in trainer.optimizers[0].param_groups))

    options = {"learning_rate": {0: 0.0, 2: 0.2}, "discriminator_learning_rate": {1: 0.1, 3: 0.0}}
    run(tiny, tmp_path, steps=4, accumulate=2, callbacks=[Watch()], **options)
    wanted = [(0.0, 0.1), (0.1, 0.1), (0.2, 0.05), (0.2, 0.0)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(wanted).repeat_interleave(2, 0))


def test_bfloat16_smoke(tiny, tmp_path):
    adversarial = tiny.gan(weight={0: 0.0, 1: 0.5})
    stage = tiny.stage(adversarial=adversarial, perceptual=tiny.judge())
    trainer = tiny.trainer(tmp_path, 4, precision="bf16-mixed")
    trainer.fit(stage, datamodule=tiny.data())
    assert trainer.global_step == 4
    assert stage.guard.bad_steps == 0
    assert float(trainer.callback_metrics["train/gan_adaptive_weight"]) > 0
    assert trainer.callback_metrics["train/gan_adaptive_weight"].dtype == torch.float32
