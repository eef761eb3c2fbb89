"""Somebody else's Lightning project, in 30 lines: our tokenizer, semantic loss and FID callback."""

import copy
import re
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import to_tensor

from aligntok.__main__ import main
from aligntok.callbacks import ReconstructionFID
from aligntok.data import Shapes
from aligntok.losses import semantic_preservation
from aligntok.metrics import EncoderFeatures
from aligntok.networks import ConvDecoder, Frozen, LinearAdapter, Tokenizer, VisionEncoder
from aligntok.weights import load_tokenizer

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


def test_the_chain_with_their_encoder_loss_stage_and_data(tmp_path, monkeypatch):
    """Stages 1, theirs and 3, `encode`, a generator and `sample`, from their folder, by the command line."""
    shutil.copytree(Path(__file__).parent / "foreign", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    few += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.log_every_n_steps", "1"]
    here = ["--accelerator", "cpu", "--devices", "1"]

    def fit(name, *options):
        assert main(["fit", "--config", f"{name}.yaml", *few, *options]) == 0
        return f"runs/{name}/checkpoints/last.ckpt"

    first = fit("stage1")
    second = fit("stage2", "--init_from", first)
    third = fit("stage3", "--init_from", second)
    images = ["--images", "aligntok.data.Shapes", "--images.num_images", "32", "--images.image_size", "16"]
    assert main(["encode", "--tokenizer", third, *images, "--output", "runs/latents", "--min_psnr", "0", *here]) == 0
    generator = fit("generator")
    words = ["--ckpt_path", generator, "--num_samples", "3", "--output", "runs/samples"]
    assert main(["sample", "--config", "generator.yaml", *words, *here]) == 0

    assert len(list(Path("runs/samples/png").iterdir())) == 3
    assert {"train/edges", "train/semantic", "train/decorrelation"} <= set(columns("runs/stage2/metrics.csv"))
    encoders = [load_tokenizer(path, ema=0).encoder.patches.weight for path in (first, second, third)]
    assert not torch.equal(encoders[0], encoders[1])  # their stage trained their encoder,
    assert torch.equal(load_tokenizer(second).encoder.patches.weight, encoders[2])  # and the next one held its average
    assert torch.load(second, weights_only=True)["aligntok_stage"] == "Decorrelation"
    assert load_tokenizer(generator).fingerprint() == load_tokenizer(third).fingerprint()


@pytest.mark.parametrize("page", ["encoder", "loss", "stage", "data"])
def test_the_pages_on_own_classes_show_this_project(page):
    text = (Path(__file__).parent.parent / f"docs/{page}.md").read_text()
    project = [path.read_text() for path in (Path(__file__).parent / "foreign").glob("*.*")]
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert any(block in text for text in project), block


def columns(path):
    return Path(path).read_text().splitlines()[0].split(",")
