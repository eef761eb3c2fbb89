"""Somebody else's Lightning project, in 30 lines: our tokenizer, semantic loss and FID callback."""

import copy

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import to_tensor

from aligntok.callbacks import ReconstructionFID
from aligntok.data import Shapes
from aligntok.losses import semantic_preservation
from aligntok.metrics import EncoderFeatures
from aligntok.networks import ConvDecoder, Frozen, LinearAdapter, Tokenizer, VisionEncoder

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


class TheirModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        encoder = VisionEncoder("vit_tiny_patch16_224", image_size=32, downsampling=8, weights=None, model_args=SMALL)
        decoder = ConvDecoder(latent_dim=8, width=8, multipliers=[1, 1, 1, 1], num_blocks=1, num_groups=4)
        self.tokenizer = Tokenizer(encoder, LinearAdapter(32, 8), decoder)
        self.anchor = Frozen(copy.deepcopy(torch.nn.Sequential(encoder, self.tokenizer.adapter)))

    def training_step(self, batch, batch_idx):
        latent = self.tokenizer.encode(batch["image"])
        drift = semantic_preservation(latent, self.tokenizer.normalize(self.anchor(batch["image"])))
        return torch.nn.functional.l1_loss(self.tokenizer.decode(latent, clamp=False), batch["image"]) + drift

    def validation_step(self, batch, batch_idx):
        return {"reconstruction": self.tokenizer(batch["image"])}

    def configure_optimizers(self):
        return torch.optim.Adam(self.tokenizer.parameters(), 1e-3)


def batch_of(items):
    return {"image": torch.stack([to_tensor(image) for image, _ in items])}


def test_it_trains_and_measures(tmp_path):
    images = DataLoader(Subset(Shapes(96), range(64)), batch_size=8, collate_fn=batch_of)
    judge = VisionEncoder("vit_tiny_patch16_224", image_size=32, downsampling=8, weights=None, model_args=SMALL)
    module = TheirModule()
    before = {key: value.clone() for key, value in module.anchor.network.named_parameters()}
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[ReconstructionFID(EncoderFeatures(judge, "theirs"))],
    )
    first = trainer.validate(module, images, verbose=False)[0]["val/rfd_theirs"]
    trainer.fit(module, images, images)
    assert 0 < trainer.callback_metrics["val/rfd_theirs"] != first
    assert all(torch.equal(before[key], value) for key, value in module.anchor.network.named_parameters())
    assert not any(key.startswith("anchor") for key in module.state_dict())
