"""A cache of captioned images: latents with ids or features of their texts."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aligntok.data import Augmentation, LatentDataModule, LatentShards
from aligntok.errors import UserError
from aligntok.files import hash_file
from aligntok.networks import TextEncoder
from aligntok.programs.encode import Views, encode
from aligntok.programs.fabric import make_fabric
from tests.data.test_captions import Captioned
from tests.programs.test_encode_latents import BATCH, SHARD, contents, lossless, write

CAPTIONS = [f"caption {i}" if i % 5 else "" for i in range(20)]


class Letters(TextEncoder):
    """A token for each byte, with features that tell it."""

    def __init__(self, max_tokens=12, scale=1.0):
        super().__init__(width=2, max_tokens=max_tokens)
        self.scale = scale

    def token_ids(self, captions, cut):
        return [[*caption.encode()][: self.max_tokens if cut else None] for caption in captions]

    def features(self, ids, mask):
        return torch.stack([ids, ids * self.scale], dim=-1) * mask[..., None]

    def fingerprint(self):
        return f"letters {self.max_tokens} {self.scale}"


def encoded(folder, source=None, encoder=None, **options):
    images = Captioned(CAPTIONS) if source is None else source
    options = {"shard_size": SHARD, "batch_size": BATCH, "min_psnr": 0.0, **options}
    encode(lossless(), images, folder, fabric=make_fabric("cpu", 1), text_encoder=encoder or Letters(), **options)
    return LatentShards(str(folder))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    encoded(folder, text_features=True)
    return folder


def test_rows_hold_the_texts_of_their_images(cache):
    ids = np.array([17, 0, 5, 3, 9])
    batch = LatentShards(str(cache)).batch(ids, np.zeros_like(ids))
    expected = Letters().tokenize([CAPTIONS[i] for i in ids])
    assert batch.keys() == {"latent", "text_ids", "text_features"}
    assert batch["text_ids"].dtype == torch.int32
    assert torch.equal(batch["text_ids"].long(), expected)
    text = Letters()(expected)
    assert torch.equal(batch["text_features"], text.features.to(torch.bfloat16))
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["text"] == {"fingerprint": "letters 12 1.0", "max_tokens": 12, "width": 2, "features": True}
    assert not manifest["flips"]


def test_ids_alone_are_the_default_and_an_encoder_gives_the_same_features(cache, tmp_path):
    ids = np.arange(20)
    alone = encoded(tmp_path).batch(ids, ids * 0)
    both = LatentShards(str(cache)).batch(ids, ids * 0)
    assert alone.keys() == {"latent", "text_ids"}
    assert torch.equal(alone["latent"], both["latent"])
    assert torch.equal(Letters()(alone["text_ids"]).features.to(torch.bfloat16), both["text_features"])


def test_the_data_module_serves_texts_and_no_labels(cache):
    data = LatentDataModule(LatentShards(str(cache)), 4, val=0.2, augmentation=Augmentation(flip=False), num_workers=1)
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    rows = data.source_indices("train", batch["id"].tolist())
    assert torch.equal(batch["text_ids"].long(), Letters().tokenize([CAPTIONS[i] for i in rows]))
    assert "label" not in batch
    assert data.classes == []
    data.check_text(Letters())
    with pytest.raises(
        UserError, match=r"was written by text encoder letters 12 1.0, but the model's is letters 8 1.0"
    ):
        data.check_text(Letters(8))
    with pytest.raises(UserError, match="train has captions, no classes"):
        data.check_labels(10, "network.num_classes")


def test_a_cache_goes_on_and_is_not_mixed_with_another_encoder(cache, tmp_path):
    encoded(tmp_path, text_features=True)
    whole = contents(tmp_path)
    name = sorted(name for name in whole if name.endswith(".safetensors"))[1]
    (tmp_path / name).write_bytes(b"broken")
    encoded(tmp_path, text_features=True)
    assert contents(tmp_path) == whole
    with pytest.raises(
        UserError, match=r"text encoder fingerprint letters 12 1.0, but this run's .* is letters 12 2.0"
    ):
        encoded(tmp_path, encoder=Letters(scale=2.0), text_features=True)
    with pytest.raises(UserError, match=r"text encoder features True, but this run's .* is False"):
        encoded(tmp_path)


def test_labelled_caches_are_as_they_were(tmp_path):
    write(tmp_path)
    assert "text" not in json.loads((tmp_path / "manifest.json").read_text())
    tensors = load_file(next(iter(sorted(tmp_path.glob("*.safetensors")))))
    assert tensors.keys() == {"latents", "latents_flip", "labels"}
    data = LatentDataModule(LatentShards(str(tmp_path)), 4)
    data.setup()
    with pytest.raises(UserError, match="holds no texts"):
        data.check_text(Letters())


def test_texts_of_another_size_than_the_manifest_says_are_refused(cache, tmp_path):
    encoded(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["text"]["max_tokens"] = 11
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is altered: of texts it holds"):
        len(LatentShards(str(tmp_path)))


def test_what_contradicts_captions_is_refused(tmp_path):
    with pytest.raises(UserError, match="these images have captions: name a --text_encoder"):
        write(tmp_path, Captioned(CAPTIONS), flips=False)
    with pytest.raises(UserError, match=r"views\.flips must be false"):
        encoded(tmp_path, views=Views(flips=True))
    with pytest.raises(UserError, match="these images have labels, no captions"):
        encoded(tmp_path, source=Captioned([1, 2, 3]))
    with pytest.raises(UserError, match="text_features without a text_encoder"):
        write(tmp_path, text_features=True)
    assert not (tmp_path / "manifest.json").exists()


def test_bad_captions_have_no_row(tmp_path):
    captions = [*CAPTIONS * 10]
    captions[6] = None
    source = encoded(tmp_path, source=Captioned(captions))
    assert len(source) == 199
    ids = np.array([5, 6])
    batch = source.batch(ids, ids * 0)
    assert torch.equal(batch["text_ids"].long(), Letters().tokenize([captions[5], captions[7]]))
    assert hash_file(tmp_path / source.manifest.shards[0].file) == source.manifest.shards[0].sha256
