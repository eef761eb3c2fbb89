"""How well images show what their captions say, by CLIP: mean cosine, and how often the right caption is nearest."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError, check, words_of
from aligntok.metrics.collected import Collected

NUM_CANDIDATES = 100  # of R@1, as R-precision has it: Xu et al., AttnGAN, arXiv:1711.10485, section 4.1


class CaptionAlignment:
    """CLIP score and R@1 of images with captions, with one pass of CLIP over each.

    The score is torchmetrics' ``CLIPScore``: 100 times the mean cosine of image and caption, at least 0; others
    multiply by 2.5 (Hessel et al.), and CLIPs differ: name both. R@1 is the share of images that are nearer to
    their own caption than to 99 others, chosen by a hash; images of one caption have the same candidates, and where
    there are fewer captions, all are candidates. Neither depends on batch size or number of ranks.

    >>> alignment = CaptionAlignment("clip-vit-large-patch14")  # a folder  # doctest: +SKIP
    >>> alignment.update(torch.rand(2, 3, 256, 256), ["two foxes", "a car"])  # doctest: +SKIP
    >>> alignment.compute()  # doctest: +SKIP
    {'clip_score': 26.3, 'clip_r1': 0.5}

    Args:
        model: A CLIP of transformers by its name on the hub or its folder; or a function that returns model and
            processor, which have ``get_image_features``, ``get_text_features``, and take images and texts.

    Attributes:
        conditions: One line on the conditions of the last ``compute``.

    Raises:
        UserError: transformers is not installed, or the model is nowhere; when it is loaded.

    Reference:
        Hessel et al., CLIPScore, arXiv:2104.08718.
    """

    def __init__(self, model: str | Callable[[], tuple[Any, Any]] = "openai/clip-vit-large-patch14") -> None:
        self.name = model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
        self.build: Callable[[], tuple[Any, Any]] = (lambda: load_clip(self.name)) if isinstance(model, str) else model
        self.network: Any = None
        self.processor: Any = None
        self.rows = Collected(0)
        self.conditions = ""

    def load(self) -> CaptionAlignment:
        """Read the model, if that was not done."""
        if self.network is None:
            network, self.processor = self.build()
            self.network = network.eval().requires_grad_(False)
            self.rows = Collected(2 * int(network.config.projection_dim))
        return self

    def to(self, device: torch.device | str) -> CaptionAlignment:
        """Measure on this device."""
        self.load().network.to(device)
        return self

    def reset(self) -> None:
        """Forget the images."""
        self.rows.clear()

    def update(self, image: Tensor, caption: Sequence[str], id: Tensor | None = None) -> None:
        """Add images (B, 3, H, W) in [0, 1], rounded to 8 bits, with their captions and ids (B,)."""
        check(len(image) == len(caption), f"{len(image)} images have {len(caption)} captions: give one for each")
        if not len(image):
            return
        image_features, text_features = self.image_features(image), self.text_features(caption)
        labels = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in caption]
        self.rows.add(id, torch.tensor(labels), torch.cat([image_features, text_features], dim=1))

    @torch.no_grad()
    def image_features(self, image: Tensor) -> Tensor:
        """Return the features (B, D), of length 1, of images (B, 3, H, W) in [0, 1]."""
        self.load()
        pixels = image.float().clamp(0, 1).mul(255).round().byte().cpu()
        inputs = self.processor(images=list(pixels), return_tensors="pt")
        return self.normed(self.network.get_image_features, pixel_values=inputs["pixel_values"])

    @torch.no_grad()
    def text_features(self, caption: Sequence[str]) -> Tensor:
        """Return the features (B, D), of length 1, of captions; what a CLIP cannot read of a long one is cut off."""
        self.load()
        longest = int(self.network.config.text_config.max_position_embeddings)
        words: dict[str, Any] = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        inputs = self.processor(text=list(caption), **words)
        return self.normed(
            self.network.get_text_features, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )

    def normed(self, function: Callable[..., Any], **inputs: Tensor) -> Tensor:
        """Return what a function of the model gives, in float32 and of length 1."""
        device = self.network.device
        with torch.autocast(device.type, enabled=False):
            output = function(**{key: value.to(device) for key, value in inputs.items()})
        features: Tensor = output if isinstance(output, Tensor) else output.pooler_output  # of transformers 5
        return F.normalize(features.float(), dim=-1)

    def compute(self) -> dict[str, float]:
        """Return ``clip_score`` and, of two captions or more, ``clip_r1``, over the images of all ranks.

        Raises:
            UserError: There are no images.
        """
        _, labels, features = self.load().rows.gather(self.network.device)
        check(len(labels) > 0, "no images were measured: the CLIP score needs one")
        image, text = features.chunk(2, dim=1)
        score = float(100 * (image * text).sum(dim=1).mean().clamp_min(0))
        recall, candidates = retrieval(image, text, labels)
        self.conditions = f"CLIP {self.name}: 100 x cosine of {len(labels):,} images, R@1 among {candidates} captions"
        return {"clip_score": score} | ({"clip_r1": recall} if candidates > 1 else {})


def retrieval(image: Tensor, text: Tensor, caption: Tensor, num_candidates: int = NUM_CANDIDATES) -> tuple[float, int]:
    """Return the share of images nearer to their caption than to all other candidates, and the number of candidates.

    >>> retrieval(torch.eye(3), torch.eye(3).roll(1, 0), torch.tensor([5, 6, 7]))
    (0.0, 3)

    Args:
        image: Features of length 1, (N, D).
        text: Those of their captions, (N, D).
        caption: Number of each caption, (N,); the candidates of a caption are those with the next higher numbers.
        num_candidates: The right one among them, at most as many as there are captions.
    """
    numbers, which = torch.unique(caption, return_inverse=True)
    first = torch.full_like(numbers, len(caption)).scatter_reduce(
        0, which, torch.arange(len(caption), device=which.device), "amin"
    )
    count = min(num_candidates, len(numbers))
    right = torch.zeros((), dtype=torch.int64, device=image.device)
    for rows, places, own in zip(*(torch.split(part, 1000) for part in (image, which, text)), strict=True):
        others = first[(places[:, None] + torch.arange(1, count, device=places.device)) % len(numbers)]
        nearest = torch.einsum("nd,nkd->nk", rows, text[others]).amax(1) if count > 1 else -torch.ones_like(rows[:, 0])
        right += ((rows * own).sum(1) > nearest).sum()
    return int(right) / len(image), count


def load_clip(name: str) -> tuple[Any, Any]:
    """Return a CLIP of transformers and its processor, from a folder or the hub.

    Raises:
        UserError: transformers is not installed, there is no such model, or it is no CLIP.
    """
    try:
        from transformers import AutoModel, AutoProcessor
    except ImportError as error:
        raise UserError("the CLIP score needs transformers: pip install 'aligntok[text]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of image processors that are fast or slow
            network, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    except Exception as error:  # of the hub, of files: each its own kind
        raise UserError(
            f"there is no CLIP {name} here ({words_of(error, 80)}). Without the hub, put its config.json,"
            " model.safetensors, preprocessor_config.json and tokenizer files into a folder, and give that"
        ) from error
    fits = hasattr(network, "get_image_features") and hasattr(network.config, "text_config")
    check(fits, f"{name} is a {type(network).__name__}, which has no features of images and texts: give a CLIP")
    return network, processor
