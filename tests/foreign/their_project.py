"""Somebody else's project: their own encoder, loss term, second stage and data module, named in their YAML."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import to_tensor

from aligntok.data import Shapes
from aligntok.stages import PerceptualAlignment


class PatchEncoder(nn.Module):
    def __init__(self, width: int = 16, image_size: int = 16) -> None:
        super().__init__()
        self.width, self.image_size, self.downsampling = width, image_size, 4  # what the other parts ask for
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1]
        return self.patches(image).tanh()  # (B, width, H / 4, W / 4)


class Edges(nn.Module):
    def forward(self, image: Tensor, reference: Tensor) -> Tensor:  # both (B, 3, H, W)
        return (image.diff(dim=-1) - reference.diff(dim=-1)).abs().mean()  # ()


class Decorrelation(PerceptualAlignment):
    def __init__(self, *args, decorrelation: float = 0.1, **others) -> None:
        super().__init__(*args, **others)
        self.decorrelation = decorrelation

    def latent_terms(self, image, features, latent):
        covariance = torch.cov(latent.transpose(0, 1).flatten(1))  # (C, C)
        own = {"decorrelation": (self.decorrelation, covariance.triu(1).square().mean())}
        return super().latent_terms(image, features, latent) | own


class Images(pl.LightningDataModule):
    def __init__(self, image_size: int = 16, batch_size: int = 4) -> None:
        super().__init__()
        self.images, self.batch_size = Shapes(64, image_size), batch_size

    def train_dataloader(self):
        return self.loader(Subset(self.images, range(len(self.images) // 2)))

    def val_dataloader(self):
        return self.loader(Subset(self.images, range(len(self.images) // 2, len(self.images))))

    calibration_dataloader = train_dataloader  # what the second stage asks for, see aligntok.protocols

    def loader(self, images):
        return DataLoader(
            images, self.batch_size, collate_fn=lambda items: {"image": torch.stack([to_tensor(x) for x, _ in items])}
        )
