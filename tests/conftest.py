"""What many tests share: networks of a few thousand parameters, a real Trainer, data module, checkpoint writer."""

from dataclasses import fields
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import vgg as vgg16

from aligntok.__main__ import main
from aligntok.callbacks.checkpoint_io import AtomicCheckpointIO
from aligntok.data import Augmentation, LatentDataModule, LatentShards
from aligntok.data.shapes import Shapes
from aligntok.flow import FlowMatching
from aligntok.losses import (
    AdversarialLoss,
    FeatureDistance,
    PerceptualTerm,
    ReconstructionLoss,
    SemanticPreservation,
)
from aligntok.losses.perceptual import CONVNEXT_URL, VGG16_URL
from aligntok.metrics import InceptionFeatures, inception
from aligntok.networks import (
    AutoregressiveTransformer,
    ConvDecoder,
    DiT,
    LinearAdapter,
    PatchDiscriminator,
    QueryEncoder,
    TokenDecoder,
    Tokenizer,
    VectorQuantizer,
    VisionEncoder,
)
from aligntok.programs.encode import Views, encode
from aligntok.programs.fabric import make_fabric
from aligntok.stages import AutoregressiveGeneration, LatentAlignment, LatentDiffusion, Optimization

WIDTH, LATENT = 16, 4


def pytest_collection_modifyitems(items):
    """On a GPU, what torch, Triton and Lightning warn of is no error, before a test either.

    Modules of whole commands come first: they are long, and short ones at the end keep both workers busy.
    """
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
        if item.name.endswith("ShardedStrategy") and torch.__version__ < "2.9":
            item.add_marker(pytest.mark.skip("the strategy needs torch 2.9"))


class Tiny:
    """Factories; everything is 16 px, f4, and a function of ``seed``."""

    OBJECTIVE = ("time_sampling", "uniform_from", "cosine_weight")

    @staticmethod
    def encoder(seed=0, image_size=16, downsampling=4, weights=None, **model_args):
        torch.manual_seed(seed)
        args = {"patch_size": 4, "embed_dim": WIDTH, "depth": 1, "num_heads": 2, **model_args}
        return VisionEncoder("vit_tiny_patch16_224", image_size, downsampling, weights=weights, model_args=args)

    @staticmethod
    def tokenizer(seed=0, adapter=LinearAdapter, latent_dim=LATENT, image_size=16, **model_args):
        encoder = Tiny.encoder(seed, image_size, **model_args)
        decoder = ConvDecoder(latent_dim=latent_dim, width=8, multipliers=[1, 1, 2], num_blocks=1, num_groups=4)
        return Tokenizer(encoder, adapter(encoder.width, latent_dim), decoder)

    @staticmethod
    def gan(seed=0, norm="group", **options):
        torch.manual_seed(seed + 1000)
        return AdversarialLoss(
            PatchDiscriminator(width=8, num_layers=1, norm=norm), **{"discriminator_start": 0, **options}
        )

    @staticmethod
    def judge(seed=7):
        return FeatureDistance(Tiny.encoder(seed))

    @staticmethod
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)

    @staticmethod
    def stage(cls=LatentAlignment, seed=0, tokenizer=None, **options):
        """Return a tokenizer stage; numbers of its loss, optimization and semantic term may be given one by one."""
        tokenizer = tokenizer or Tiny.tokenizer(seed)
        loss = options.pop("loss", None) or Tiny.loss(options)
        parts = Tiny.optimization(options)
        semantic = {key.removeprefix("semantic_"): options.pop(key) for key in list(options) if "semantic_" in key}
        if semantic:
            parts["semantic"] = SemanticPreservation(**semantic)
        torch.manual_seed(seed + 2000)
        return cls(tokenizer, loss, **parts, **options)

    @staticmethod
    def loss(options):
        """Take what belongs to a loss out of ``options`` and return it."""
        terms = {}
        for name in ("perceptual", "lpips"):
            distance, weight = options.pop(name, None), options.pop(f"{name}_weight", 1.0)
            if distance is not None:
                terms[name] = PerceptualTerm(distance, weight)
        adversarial = options.pop("adversarial", None)
        if "discriminator_learning_rate" in options:
            adversarial.learning_rate = options.pop("discriminator_learning_rate")
        return ReconstructionLoss(options.pop("pixel_loss", "l1"), terms, adversarial)

    @staticmethod
    def optimization(options):
        """Take what belongs to an optimization out of ``options`` and return it as an argument of a stage."""
        numbers = {"learning_rate": 1e-3}
        for key in (field.name for field in fields(Optimization)):
            if key in options:
                numbers[key] = options.pop(key)
        return {"optimization": options.pop("optimization", None) or Optimization(**numbers)}

    @staticmethod
    def measured(seed=0, **options):
        """Return a tokenizer whose latents were measured, as far as others can tell."""
        tokenizer = Tiny.tokenizer(seed, **options)
        tokenizer.set_latent_statistics(torch.full((LATENT,), 0.1), torch.full((LATENT,), 0.5))
        return tokenizer

    @staticmethod
    def discrete(seed=0, codebook_size=32, num_prefix=2, image_size=16):
        """Return a tokenizer that writes 2 prefix tokens and a grid of 4 x 4."""
        torch.manual_seed(seed + 4000)
        encoder = QueryEncoder(image_size, 4, WIDTH, 1, 2, num_prefix)
        decoder = TokenDecoder(LATENT, image_size, 4, WIDTH, 1, 2, num_prefix)
        return Tokenizer(encoder, LinearAdapter(WIDTH, LATENT), decoder, VectorQuantizer(codebook_size, LATENT))

    @staticmethod
    def causal(seed=0, num_prefix=4, prefix_head=True, causal=True, num_buffer=1, **quantizer):
        """Return the tokenizer of AliTok's first stage: a causal decoder with a head for the prefix."""
        torch.manual_seed(seed + 4000)
        decoder = TokenDecoder(LATENT, 16, 4, WIDTH, 2, 2, num_prefix, num_buffer, causal, prefix_head)
        encoder = QueryEncoder(16, 4, WIDTH, 1, 2, num_prefix)
        return Tokenizer(encoder, LinearAdapter(WIDTH, LATENT), decoder, VectorQuantizer(32, LATENT, **quantizer))

    @staticmethod
    def ar(seed=0, scale=0.2, **options):
        """Return a network whose logits are far from those of a fresh one, which are zero."""
        torch.manual_seed(seed + 5000)
        sizes = {"codebook_size": 32, "grid": (4, 4), "num_prefix": 2, "num_classes": 12}
        network = AutoregressiveTransformer(**{**sizes, "width": 16, "depth": 2, "num_heads": 2, **options})
        return Tiny.shaken(network, scale)

    @staticmethod
    def shaken(network, scale=0.2):
        """Return a network with noise on its weights: fresh ones are zero where its output is made."""
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += scale * torch.randn_like(parameter)
        return network

    @staticmethod
    def autoregressive(network=None, **options):
        """Return a stage; its ``seed`` is that of the samples."""
        tokenizer = options.pop("tokenizer") if "tokenizer" in options else Tiny.discrete()
        network = network or Tiny.ar()
        return AutoregressiveGeneration(network, tokenizer, **Tiny.optimization(options), **options)

    @staticmethod
    def dit(seed=0, scale=0.2, **options):
        """Return a network whose velocity is far from that of a fresh one, which is zero."""
        torch.manual_seed(seed + 3000)
        sizes = {"latent_shape": (LATENT, 4, 4), "num_classes": 12, "width": 16, "depth": 2, "num_heads": 2}
        return Tiny.shaken(DiT(**{**sizes, **options}), scale)

    @staticmethod
    def generator(network=None, **options):
        """Return a stage; its ``seed`` is that of the noise."""
        tokenizer = options.pop("tokenizer") if "tokenizer" in options else Tiny.measured()
        numbers = {key: options.pop(key) for key in Tiny.OBJECTIVE if key in options}
        parts = {"objective": FlowMatching(**numbers), **Tiny.optimization(options)}
        return LatentDiffusion(network or Tiny.dit(), tokenizer, **parts, **options)

    @staticmethod
    def cache(folder, tokenizer, num_images=64, **options):
        """Write the latents of the training images of ``Tiny.data`` and return the folder."""
        views, fabric = Views(flips=options.pop("flips", False)), make_fabric("cpu", 1)
        encode(tokenizer, Shapes(num_images, 16), folder, views, fabric, **{"min_psnr": 0.0, **options})
        return str(folder)

    @staticmethod
    def cached(folder, global_batch_size=8, images=None, **options):
        """Return the data of such a cache; every fourth is for validation."""
        source = LatentShards(folder, images=images)
        return LatentDataModule(
            source, global_batch_size, **{"val": 0.25, "augmentation": Augmentation(flip=False), **options}
        )

    @staticmethod
    def data(num_images=64, global_batch_size=8, **options):
        options = {"augmentation": Augmentation("center", flip=False), **options}
        return LatentDataModule(Shapes(num_images, 16), global_batch_size, 16, val=Shapes(8, 16, seed=1), **options)

    @staticmethod
    def images(count=8, seed=0, size=16):
        return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def trainer(folder, max_steps, callbacks=(), **options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": bool(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "max_epochs": -1,
        }
        return pl.Trainer(
            default_root_dir=str(folder),
            max_steps=max_steps,
            callbacks=list(callbacks),
            plugins=[AtomicCheckpointIO()],
            **{**defaults, **options},
        )

    @staticmethod
    def copies(module):
        """Return every tensor of a module, also those that no checkpoint holds."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {name: value.detach().clone() for name, value in tensors}


def assert_same(ours, theirs, where=""):
    """Compare two nested structures bit by bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


class NaNAt(nn.Module):
    """A perceptual loss that is not a number at the given calls, counted from 0."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, image, reference):
        bad = self.count in self.calls
        self.count += 1
        return (image - reference).square().mean() * (float("nan") if bad else 1.0)


class Pixels(nn.Module):
    """Features that see every change of an image: averages on a grid of 4 x 4."""

    num_features = 48

    def __init__(self, name="tiny"):
        super().__init__()
        self.name = name

    def forward(self, image):
        return nn.functional.adaptive_avg_pool2d(10 * image, 4).flatten(1)


Tiny.NaNAt, Tiny.Pixels, Tiny.linear, Tiny.assert_same = NaNAt, Pixels, LinearAdapter, staticmethod(assert_same)


@pytest.fixture(scope="session")
def tiny():
    return Tiny


@pytest.fixture(scope="session")
def judge_home(tmp_path_factory):
    """A folder with other weights where VGG's, ConvNeXt's and Inception's would be."""
    home = tmp_path_factory.mktemp("home")
    vgg = vgg16.make_layers(vgg16.cfgs["D"], batch_norm=False).state_dict()
    torch.save({f"features.{key}": value for key, value in vgg.items()}, home / Path(VGG16_URL).name)
    with torch.device("meta"):
        convnext = torchvision.models.convnext_small().state_dict()
    torch.save(
        {key: torch.tensor(0.02).expand(value.shape) for key, value in convnext.items()}, home / Path(CONVNEXT_URL).name
    )
    network = inception.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.save({}, home / "empty.pth")
        untrained = network("inception", ["2048"], feature_extractor_weights_path=str(home / "empty.pth"))
    torch.save(untrained.state_dict(), home / InceptionFeatures.FILE)
    return home


@pytest.fixture(scope="module")
def judge_weights(judge_home):
    """Take those weights: no network, but all of the loading code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNTOK_HOME", str(judge_home))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and threads wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Let a test draw the same numbers whenever it runs, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys):
    """Run a command that a user got wrong; return its line on stderr."""

    def run(*args: str) -> str:
        assert main(list(args)) == 2
        text = capsys.readouterr().err
        (line,) = (line for line in text.splitlines() if line.startswith("aligntok: error:"))
        assert "Traceback" not in text
        assert len(line) <= 400
        return line

    return run
