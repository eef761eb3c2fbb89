"""Captions to features: the static table, and transformers' own models through our door."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from aligntok.errors import UserError
from aligntok.networks.text import StaticTextEncoder
from aligntok.networks.text_models import PretrainedTextEncoder

CAPTIONS = ["two foxes on a blue ground", "a pizza", "", "  "]
WORDS = ["<pad>", "<end>", "two", "foxes", "on", "a", "blue", "ground", "pizza", "red"]


@pytest.fixture(scope="module")
def static():
    return StaticTextEncoder(max_tokens=8)


def test_ids_are_padded_with_minus_one_and_an_empty_caption_has_none(static):
    ids = static.tokenize(CAPTIONS)
    assert (ids.shape, ids.dtype) == ((4, 8), torch.int64)
    assert (ids >= 0).sum(1).tolist() == [7, 3, 0, 0]
    assert torch.equal(ids >= 0, (ids >= 0).sort(1, descending=True).values)
    assert ids[1, :3].tolist() == static.tokenizer.encode("a pizza", add_special_tokens=False).ids
    assert static.tokenize([]).shape == (0, 8)
    assert torch.equal(static.tokenize([" a pizza\n"]), ids[1:2])


def test_features_are_the_rows_of_the_table(static):
    ids = static.tokenize(CAPTIONS)
    text = static(ids)
    assert torch.equal(text.mask, ids >= 0)
    assert torch.equal(text.features[text.mask], static.table[ids[ids >= 0]])
    assert text.features.shape == (4, 8, static.width)
    assert not static.state_dict()  # the table is in no checkpoint


def test_a_long_caption_is_cut_and_said_once(static, capsys):
    long = "a red pizza and a red pizza and a red pizza"
    ids = StaticTextEncoder(max_tokens=64).tokenize([long])
    encoder = StaticTextEncoder(max_tokens=8)
    assert torch.equal(encoder.tokenize([long, "a pizza"]), torch.cat([ids[:, :8], encoder.tokenize(["a pizza"])]))
    encoder.tokenize([long])
    assert capsys.readouterr().err.count("is cut to max_tokens=8") == 1


def test_fingerprint_tells_tables_and_lengths_apart(static, tmp_path):
    for name, source in (("table.safetensors", static.path), ("tokenizer.json", static.tokenizer_path)):
        shutil.copy(source, tmp_path / name)
    same = StaticTextEncoder(8, str(tmp_path))
    assert same.fingerprint() == static.fingerprint()
    assert StaticTextEncoder(9).fingerprint() != static.fingerprint()
    same.table[5, 5] += 1
    assert same.fingerprint() != static.fingerprint()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"there is no .*tokenizer.json"):
        StaticTextEncoder(8, str(tmp_path))


# --- transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return what saves a model of transformers at random weights into a folder, with a tokenizer of ten words."""
    from transformers import PreTrainedTokenizerFast

    def save(model):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("model")
        model.eval().save_pretrained(path)
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(path)
        return str(path)

    return save


def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4))


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(vocab_size=10, eos_token_id=1, max_position_embeddings=16, **sizes))


def t5gemma():
    from transformers import T5GemmaConfig, T5GemmaModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 4}
    part = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    return T5GemmaModel(T5GemmaConfig(encoder=part, decoder=part, vocab_size=10))


def whole_clip():
    from transformers import CLIPConfig, CLIPModel

    model = clip()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    whole = CLIPModel(
        CLIPConfig(text_config=model.config.to_dict(), vision_config={**small, "image_size": 32, "patch_size": 16})
    )
    whole.text_model.load_state_dict(getattr(model, "text_model", model).state_dict())
    return whole


@pytest.mark.parametrize("layer", [None, -2, 1])
@pytest.mark.parametrize("make", [t5, clip, t5gemma])
def test_features_are_transformers_own(make, layer, folder):
    model = make()
    encoder = PretrainedTextEncoder(folder(model), max_tokens=8, layer=layer, dtype="float32")
    assert encoder.width == 16
    text = encoder(encoder.tokenize(CAPTIONS))
    assert text.mask.sum(1).tolist() == [7, 3, 0, 0]
    for row, words in ((0, CAPTIONS[0]), (1, CAPTIONS[1])):
        ids = torch.tensor([[WORDS.index(word) for word in words.split()] + [1]])
        reads = model if make is clip else model.encoder  # of which some have a decoder
        outputs = reads(input_ids=ids, output_hidden_states=True)
        own = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        torch.testing.assert_close(text.features[row, : ids.shape[1]], own[0].detach(), rtol=1e-4, atol=1e-5)


def test_the_text_model_of_a_clip_is_taken_from_its_folder(folder):
    one, other = (PretrainedTextEncoder(folder(make()), 8, dtype="float32") for make in (clip, whole_clip))
    ids = one.tokenize(CAPTIONS)
    torch.testing.assert_close(one(ids).features[:2], other(ids).features[:2])
    assert sum(value.numel() for value in other.model.network.parameters()) == sum(
        map(torch.numel, clip().parameters())
    )


def test_it_is_frozen_in_half_precision_and_in_no_checkpoint(folder):
    encoder = PretrainedTextEncoder(folder(t5()), max_tokens=8)
    text = encoder.train()(encoder.tokenize(CAPTIONS))
    assert text.features.dtype == torch.bfloat16
    assert not text.features.requires_grad
    assert not encoder.model.network.training
    assert not [*encoder.parameters()]
    assert not encoder.state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(encoder.tokenize(CAPTIONS)).features, text.features)


def test_a_cut_caption_keeps_its_end_token(folder, capsys):
    encoder = PretrainedTextEncoder(folder(t5()), max_tokens=4, dtype="float32")
    assert encoder.tokenize(["two foxes on a blue ground", "a pizza"]).tolist() == [[2, 3, 4, 1], [5, 8, 1, -1]]
    assert "a caption of 7 tokens is cut to max_tokens=4" in capsys.readouterr().err


def test_fingerprint_tells_models_apart(folder):
    model = t5()
    path = folder(model)
    first = PretrainedTextEncoder(path, 8).fingerprint()
    assert PretrainedTextEncoder(path, 8).fingerprint() == first
    assert (
        len(
            {
                first,
                *(
                    PretrainedTextEncoder(path, 8, **other).fingerprint()
                    for other in ({"layer": -2}, {"dtype": "float32"})
                ),
            }
        )
        == 3
    )
    model.shared.weight.data[3, 3] += 1
    assert PretrainedTextEncoder(folder(model), 8).fingerprint() != first


def test_minilm_of_the_wheel_knows_what_sentences_mean():
    """Its pooled features: those of two sentences on a dog are nearer to each other than to one on money."""
    encoder = PretrainedTextEncoder("offline", max_tokens=16, dtype="float32")
    text = encoder(
        encoder.tokenize(["a dog runs on the beach", "the puppy is playing in sand", "banks raise interest rates"])
    )
    pooled = (text.features * text.mask[..., None]).sum(1) / text.mask.sum(1, keepdim=True)
    similar = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert encoder.width == 384
    assert similar[0] > similar[1] + 0.3


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    path = folder(t5())
    encoder = PretrainedTextEncoder(path, 8, width=12)  # nothing is read so far
    with pytest.raises(UserError, match="has width 16, not 12: correct width"):
        encoder.load()
    with pytest.raises(UserError, match=r"layer=4: text encoder .* has 3 layers"):
        PretrainedTextEncoder(path, 8, layer=4).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty cannot be read \(no config.json\): it needs config.json, tokenizer"):
        PretrainedTextEncoder(str(tmp_path / "empty"), 8)
    monkeypatch.setenv("ALIGNTOK_HOME", str(tmp_path))
    shutil.copytree(path, tmp_path / "some-t5")
    assert PretrainedTextEncoder("somebody/some-t5", 8).width == 16
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot get text encoder google/t5gemma-9 from the hub") as error:
        PretrainedTextEncoder("google/t5gemma-9", 8)
    assert "$ALIGNTOK_HOME/t5gemma-9" in str(error.value)
    assert len(str(error.value)) <= 400
