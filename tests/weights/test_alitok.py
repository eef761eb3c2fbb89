"""Parity with the official AliTok tokenizer, and its checkpoints: golden/README.md, cases a and b."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from aligntok.errors import UserError
from aligntok.networks import LinearAdapter, QueryEncoder, TokenDecoder, Tokenizer, VectorQuantizer
from aligntok.weights.alitok import from_alitok, load_alitok, to_alitok

# Outputs of the official code at commit 093e957, of the weights that `draw` gives; latents[::7], of the first
# reconstruction the pixels `recon_at`.
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "a_alitok_tokenizer.npz")
SCALES = {  # else 0.02
    "quantize.embedding.weight": 1.0,
    "attn.in_proj.weight": 0.05,
    "encoder.conv_out.weight": 0.05,
    "encoder.positional_embedding": 0.3,
    "decoder.conv_out.weight": 1.0,
    "decoder.conv_out_aux.weight": 1.0,
}
FULL = {"image_size": 256, "patch_size": 16, "width": 768, "depth": 12, "decoder_width": 1024, "decoder_depth": 24}
SMALL = {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2, "decoder_width": 128, "decoder_depth": 1}
STAGES = {1: {"num_buffer": 1, "causal": True, "prefix_head": True}, 2: {"num_buffer": 32}}


def build(stage, image_size, patch_size, width, depth, decoder_width, decoder_depth, num_prefix=17, codes=4096):
    return Tokenizer(
        QueryEncoder(image_size, patch_size, width, depth, width // 64, num_prefix),
        LinearAdapter(width, 32),
        TokenDecoder(
            32, image_size, patch_size, decoder_width, decoder_depth, decoder_width // 64, num_prefix, **STAGES[stage]
        ),
        VectorQuantizer(codes, 32, update="clustering" if stage == 1 else "gradient"),
    )


def official(stage, **sizes):
    """Return an official state dict: what a file of that stage holds."""
    state = to_alitok(build(stage, **sizes))
    if stage == 2:
        del state["quantize.embed_prob"]
    return state


def draw(stage):
    """Return the official state dict by the rule of the golden vectors: sorted key number i has seed 1000 + i."""
    with torch.device("meta"):
        state = official(stage, **FULL)
    for i, key in enumerate(sorted(state)):
        shape = state[key].shape
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + i))
        if key == "quantize.embed_prob":
            state[key] = torch.zeros(shape)
            continue
        scale = next((scale for name, scale in SCALES.items() if key.endswith(name)), 0.02)
        state[key] = value.mul_(scale if len(shape) > 1 else 0.02).add_(len(shape) == 1 and key.endswith("weight"))
    return state


def rand(seed):
    return torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(seed))


def randint(seed):
    return torch.randint(0, 4096, (2, 273), generator=torch.Generator().manual_seed(seed))


def check(ours, name, **tolerance):
    torch.testing.assert_close(ours, torch.from_numpy(GOLDEN[name]), **{"rtol": 0, **tolerance})


@pytest.fixture(scope="module")
def encoded():
    """The published sizes with the drawn weights, and what becomes of the images."""
    tokenizer = from_alitok(draw(2))
    with torch.no_grad():
        latent = tokenizer.adapter(tokenizer.encoder(rand(11)))
        return tokenizer, latent, tokenizer.quantizer(latent)


def test_latents_tokens_and_losses(encoded):
    tokenizer, latent, quantized = encoded
    assert latent.shape == (2, *tokenizer.spec.latent_shape) == (2, 32, 1, 273)
    check(latent.flatten()[::7], "latents", atol=1e-4)
    assert torch.equal(quantized.tokens, torch.from_numpy(GOLDEN["indices"]).long())
    assert torch.equal(tokenizer.quantizer.tokens(latent), quantized.tokens)
    check(0.25 * quantized.commitment[None], "commitment_loss", rtol=1e-5, atol=0)
    check(quantized.codebook[None], "codebook_loss", rtol=1e-5, atol=0)
    check((0.25 * quantized.commitment + quantized.codebook)[None], "quantizer_loss", rtol=1e-5, atol=0)


@torch.no_grad()
def test_reconstructions(encoded):
    tokenizer, _, quantized = encoded
    image = tokenizer.decode_latent(quantized.latent[:1], clamp=False)
    check(image.flatten()[GOLDEN["recon_at"]], "recon", atol=2e-5)
    image = tokenizer.decode(randint(12)[:1], clamp=False)
    check(image.flatten()[GOLDEN["recon_at"]], "recon_from_tokens", atol=2e-5)
    check(image[0, :, :16, 16:32], "recon_from_tokens_patch_r0c1", atol=2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_first_stage_has_no_shift():
    """Zeroing token 100 first changes patch 83 = 100 - 17; in eval mode codebook and usage stay (case b)."""
    tokenizer = from_alitok(draw(1))
    before = {key: value.clone() for key, value in tokenizer.quantizer.state_dict().items()}
    latent = tokenizer.quantizer(tokenizer.adapter(tokenizer.encoder(rand(21)[:1]))).latent
    changed = latent.index_fill(3, torch.tensor(100), 0)
    (image, prefix), (image_changed, prefix_changed) = (tokenizer.decoder.with_prefix(z) for z in (latent, changed))
    patches = (image != image_changed).unfold(2, 16, 16).unfold(3, 16, 16).flatten(4).any(4).any(1).flatten()
    assert int(patches.nonzero()[0]) == 83
    assert prefix.shape == (1, 3, 16, 272)
    assert torch.equal(prefix, prefix_changed)
    for key, value in tokenizer.quantizer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("stage", "entries", "parameters", "buffers"), [(1, 461, 390_623_032, 4096), (2, 456, 389_899_308, 0)]
)
def test_published_sizes(stage, entries, parameters, buffers):
    """Ours are fewer by one table of queries: the official code adds two of the same shape."""
    with torch.device("meta"):
        state = official(stage, **FULL)
        ours = sum(parameter.numel() for parameter in build(stage, **FULL).parameters())
    assert len(state) == entries
    assert sum(value.numel() for value in state.values()) == parameters + buffers
    assert ours == parameters - 273 * 768


@pytest.mark.parametrize("form", ["plain", "model", "ddp"])
@pytest.mark.parametrize("stage", [1, 2])
def test_round_trip_through_a_file(stage, form, tmp_path):
    theirs = build(stage, **SMALL, num_prefix=3, codes=20).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = to_alitok(theirs)
    state["latent_tokens"] = torch.randn(19, 64)  # the sum of both counts
    state["encoder.latent_token_positional_embedding"] = theirs.encoder.queries - state["latent_tokens"]
    if stage == 1:
        theirs.quantizer.usage.uniform_()
    else:
        del state["quantize.embed_prob"]
    content = {
        "plain": state,
        "model": {"model": state, "step": 3},
        "ddp": {f"module.{key}": value for key, value in state.items()},
    }[form]
    torch.save(content, tmp_path / "AliTok.pth")
    ours = load_alitok(tmp_path / "AliTok.pth")
    assert ours.spec == theirs.spec
    assert (ours.decoder.causal, ours.quantizer.update) == ((True, "clustering") if stage == 1 else (False, "gradient"))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=1e-6, msg=key)
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours(image), theirs(image))
    assert torch.equal(ours.quantizer.counts, torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.transformer.0.mlp.c_fc.bias": None}, r"decoder\.transformer\.0\.mlp\.c_fc\.bias is missing there"),
        ({"decoder.ffn_aux.0.weight": torch.zeros(3)}, r"ffn_aux\.0\.weight is \(3,\) there"),
        ({"decoder.extra": torch.zeros(3)}, r"decoder\.extra is unknown here"),
        ({"latent_tokens": torch.zeros(18, 64)}, r"encoder\.latent_token_positional_embedding is \(19, 64\) there"),
        (
            {"decoder.class_embedding": None},
            r"neither the names of AliTok's tokenizer.*lacks 'decoder\.class_embedding'",
        ),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    state = official(2, **SMALL, num_prefix=3, codes=20) | changes
    with pytest.raises(UserError, match=message):
        from_alitok({key: value for key, value in state.items() if value is not None})


def test_refuses_code_and_other_files(tmp_path):
    path = tmp_path / "AliTok.pth"
    torch.save({"model": official(2, **SMALL, codes=20), "config": Namespace(lr=1)}, path)
    with pytest.raises(UserError, match=r"refused.*weights_only=False"):
        load_alitok(path)
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(UserError, match="neither the names of AliTok's tokenizer"):
        load_alitok(path)


def test_other_parts_are_not_alitok(tiny):
    with pytest.raises(UserError, match="encoder VisionEncoder is not AliTok's"):
        to_alitok(tiny.tokenizer())
