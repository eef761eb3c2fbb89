"""Low-rank updates instead of full fine-tuning."""

import pytest
import torch
from torch import nn

from aligntok.errors import UserError
from aligntok.networks import VisionEncoder
from aligntok.networks.lora import LoRALinear, add_lora, merge_lora
from aligntok.stages import PerceptualAlignment


def randomise(network):
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter)


def test_nothing_changes_at_the_start(tiny):
    encoder, image = tiny.encoder(depth=2).eval(), tiny.images(2)
    before = encoder(image)
    add_lora(encoder, 2)
    assert torch.equal(encoder(image), before)
    assert sum(isinstance(module, LoRALinear) for module in encoder.modules()) == 2 * 4  # qkv, proj, fc1, fc2
    randomise(encoder)
    assert (encoder(image) - before).abs().max() > 1e-2


def test_the_update_has_the_rank_and_only_it_learns(tiny):
    encoder = tiny.encoder()
    add_lora(encoder, 2)
    assert all(
        name.rsplit(".", 1)[1] in ("lora_up", "lora_down") for name, p in encoder.named_parameters() if p.requires_grad
    )
    randomise(encoder)
    layer = encoder.backbone.blocks[0].mlp.fc1
    merged = merge_lora(layer.state_dict())["weight"]
    assert torch.linalg.matrix_rank(merged - layer.weight) == 2


def test_the_merged_state_is_the_same_plain_network(tiny):
    encoder, image = tiny.encoder().eval(), tiny.images(2)
    add_lora(encoder, 3)
    randomise(encoder)
    plain = tiny.encoder(seed=4).eval()
    plain.load_state_dict(merge_lora(encoder.state_dict()))
    torch.testing.assert_close(plain(image), encoder(image), rtol=1e-5, atol=1e-5)


def test_in_stage_2_updates_adapter_and_decoder_learn_and_nothing_else(tiny, tmp_path):
    stage = tiny.stage(PerceptualAlignment, lora_rank=2, learning_rate=1e-2)
    start = tiny.copies(stage)
    tiny.trainer(tmp_path, 3).fit(stage, datamodule=tiny.data())
    moved = {name for name, p in stage.named_parameters() if not torch.equal(p, start[name])}
    encoder = {name for name in moved if name.startswith("tokenizer.encoder")}
    assert encoder == {name for name in start if "lora" in name}
    assert {name.split(".")[1] for name in moved} == {"encoder", "adapter", "decoder"}
    assert not any("lora" in name for name, _ in stage.anchor.named_parameters())


def test_what_would_have_no_effect_is_refused(tiny):
    with pytest.raises(UserError, match="no linear layers"):
        add_lora(VisionEncoder("tf_efficientnet_lite0", 32, 16, weights=None), 2)
    with pytest.raises(UserError, match="rank=0"):
        add_lora(tiny.encoder(), 0)
