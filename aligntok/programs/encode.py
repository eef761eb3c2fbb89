"""``aligntok encode``: what a tokenizer makes of images, written once, for generators and decoders to train on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image

from aligntok import preemption
from aligntok.cache import CacheReader, CacheWriter, Manifest, code_counts, latent_statistics
from aligntok.cache.manifest import CROPS
from aligntok.cache.shards import LABELS, LATENTS, MIRRORED, TEXT_FEATURES, TEXT_IDS, TOKENS
from aligntok.callbacks.grids import tiled
from aligntok.data.dataset import ImageDataset
from aligntok.data.loaders import as_it_is
from aligntok.data.sources import Batch, batch_source, crop_id, length, spread_over
from aligntok.errors import check, check_positive
from aligntok.files import write_atomically
from aligntok.messages import building
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.networks.text import TextEncoder
from aligntok.networks.tokenizer import Tokenizer
from aligntok.programs.command import make_parser, read, split_values, started
from aligntok.programs.fabric import dealt, held, make_fabric, on_first_rank, progress_of, unfinished, until_signal

DESCRIPTION = """\
Write what a tokenizer makes of images, latents or tokens, into a cache. The same command goes on with it, or repairs.

  aligntok encode --config cache.yaml --tokenizer runs/stage3/checkpoints/last.ckpt
  aligntok encode --tokenizer CHECKPOINT --images aligntok.data.ImageFolder --images.root FOLDER --output FOLDER

Of a checkpoint with several averages --ema 0.9999 takes another than the first, --ema 0 the raw weights."""

MAX_CODES = 1 << 16  # that uint16 can name
ENLARGED = 1.1  # of the image that the ten crops are cut from: arXiv:2406.06525, arXiv:2506.05289
PLACES = ("centre", "top left", "top right", "bottom left", "bottom right")
NUM_CHECKED = 16  # images of the self-check
MAX_LOSS = 1.0  # dB that cached rows may decode to below fresh ones ...
INVISIBLE = 40.0  # ... unless they reach this much: rounding costs more of an almost perfect reconstruction
CHECK = "check.png"
CHECKPOINTS = (".ckpt", ".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Views:
    """The crops of an image that are encoded; evaluation takes the first, ADM's centre crop.

    Attributes:
        crops: ``center``, or, for tokens, ``ten``: of the image at 1.1 times the size the centre and the four corners,
            then the same mirrored (five without ``flips``).
        flips: Whether the mirrored crops are encoded too.

    Example:
        >>> [tuple(view.shape) for view in Views("ten", flips=False).of(torch.zeros(1, 3, 22, 22), (20, 20))]
        [(1, 3, 20, 20), (1, 3, 20, 20), (1, 3, 20, 20), (1, 3, 20, 20), (1, 3, 20, 20)]

    Reference:
        Sun et al., LlamaGen, arXiv:2406.06525, the ten crops of ``extract_codes_c2i.py``; AliTok, arXiv:2506.05289.
    """

    crops: Literal["center", "ten"] = "center"
    flips: bool = True

    def image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the image that crops of ``size`` are cut from."""
        return size if self.crops == "center" else (int(size[0] * ENLARGED), int(size[1] * ENLARGED))

    def of(self, image: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Return the views (B, 3, *size) of images (B, 3, H, W), mirrored ones last."""
        (h, w), down, right = size, image.shape[2] - size[0], image.shape[3] - size[1]
        corners = ((round(down / 2), round(right / 2)), (0, 0), (0, right), (down, 0), (down, right))
        crops = [image[:, :, top : top + h, left : left + w] for top, left in corners[: CROPS[self.crops]]]
        return crops + [crop.flip(-1) for crop in crops] if self.flips else crops

    def name(self, view: int, kind: str) -> str:
        """Return what messages call the rows of a view."""
        if kind == "continuous":
            return (LATENTS, MIRRORED)[view]
        mirrored, place = divmod(view, CROPS[self.crops])
        return f"{TOKENS} ({PLACES[place]}{', mirrored' * mirrored})"


@torch.no_grad()
def encode(
    tokenizer: Tokenizer,
    images: Dataset,  # type: ignore[type-arg]  # jsonargparse takes any subclass of the bare class
    folder: str | Path,
    views: Views | None = None,
    fabric: Fabric | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    shard_size: int = 10_000,
    batch_size: int = 50,
    num_workers: int = 0,
    min_psnr: float = 10.0,
    text_encoder: TextEncoder | None = None,
    text_features: bool = False,
) -> None:
    """Write the latents or tokens of images as safetensors shards with a manifest.

    The same call goes on where it was killed, and writes again what is broken. Any number of ranks writes the same
    bytes. At the end some rows are read back, decoded and compared with their images (``check.png``: images above
    reconstructions, then the same of the mirrored ones).

    >>> encode(load_tokenizer("stage3.ckpt"), ImageFolder("photos"), "runs/latents")  # doctest: +SKIP

    Args:
        tokenizer: Of measured latents, or a discrete one; it is left on the device, in eval mode.
        images: Items (PIL image, label or captions), e.g. an ``ImageFolder``; those that cannot be read are named and
            left out.
        folder: Where the cache is, or will be.
        views: What is encoded of each image: by default its centre crop and the same mirrored; of captioned images not
            mirrored, because a caption may say left and right.
        fabric: Device, precision and ranks; by default one process on whatever there is.
        dtype: Of the latents in the files, by default float32; tokens are 16-bit integers.
        shard_size: Images of a shard; 10,000 in LightningDiT.
        batch_size: Images of a batch on one device; each view is a batch of its own.
        num_workers: Processes per rank that read images.
        min_psnr: Decibels that decoded rows must reach on average. The default is about what one flat colour in place
            of the image reaches: below it, nothing of the images is left.
        text_encoder: Of captioned images: what makes ids of their captions, which are stored beside the latents; of
            several captions, the one of epoch 0.
        text_features: Whether the text encoder's features are stored too, in bfloat16: that costs disk (max_tokens x
            width x 2 bytes an image) and saves running it in training.

    Raises:
        UserError: The folder holds something else, no generator could use the rows, or they do not decode to the
            images.
    """
    check_positive(shard_size=shard_size, batch_size=batch_size)
    nothing = f"images: {images} gives no images to encode, name a source of (PIL image, label)"
    check(batch_source(images) is None, nothing)
    fabric, views = fabric or make_fabric(devices=1), views or Views(flips=text_encoder is None)
    check(text_encoder is not None or not text_features, "text_features without a text_encoder: name one")
    if text_encoder is not None:
        text_encoder = text_encoder.to(fabric.device).eval()
    tokenizer = tokenizer.to(fabric.device).eval()
    spec = tokenizer.spec
    size = views.image_size(spec.image_size)
    dataset = ImageDataset(images, size)

    def begin() -> tuple[CacheWriter, list[range]]:
        check_usable(tokenizer, views, dtype)
        dataset.check_readable()
        check_texts(dataset, views, tokenizer, text_encoder)
        fields = json.loads(json.dumps(asdict(spec)))  # tuples are lists, as in the file
        known = {key: value for key, value in fields.items() if value is not None}
        written_by = {"fingerprint": tokenizer.fingerprint(), **known}
        source = {
            "source": crop_id(images, size),
            "crop": views.crops,
            "count": length(images),
            "classes": [str(name) for name in getattr(images, "classes", [])],
        }
        stored = dtype or ("float32" if spec.kind == "continuous" else "uint16")
        text = about_texts(text_encoder, text_features)
        writer = CacheWriter(Path(folder), Manifest(written_by, source, stored, views.flips, shard_size, text=text))
        return writer, unfinished("shards", writer.blocks, writer.is_finished)

    def conclude() -> None:
        written = writer.written()
        statistics, about = measured(written, tokenizer)
        words = self_check(written, dataset, tokenizer, views, fabric, min_psnr)
        writer.finish(statistics)
        count = f"{len(written.labels):,}"
        what = f"{count} latents" if spec.kind == "continuous" else f"tokens of {count} images"
        print(f"{folder}: {what} in {len(written.shards)} shards, {words}, {about}", flush=True)

    with held(fabric, folder):
        writer, left = on_first_rank(fabric, begin)
        batches = dealt(fabric, left, batch_size)
        loader: Any = DataLoader(
            dataset,
            batch_sampler=[list(ids) for _, ids in batches],
            num_workers=num_workers,
            collate_fn=as_it_is,
            worker_init_fn=preemption.ignore,
            pin_memory=fabric.device.type == "cuda",
        )
        progress = progress_of(fabric, "images", left)
        rows: list[dict[str, Tensor]] = []
        for (shard, ids), batch in until_signal(fabric, zip(batches, loader, strict=True)):
            if batch is not None:  # else none of its images can be read
                image = to_floats(batch["image"], fabric)
                with fabric.autocast():
                    codes = [tokenizer.encode(view) for view in views.of(image, spec.image_size)]
                about = texts_of(batch, text_encoder, text_features, fabric.device)
                rows.append({**as_stored(codes, writer.manifest), **about, "id": batch["id"]})
            if ids[-1] == shard[-1]:
                check(
                    bool(rows), f"none of the images {shard.start} to {shard.stop - 1} can be read: remove these files"
                )
                writer.write(shard, {key: torch.cat([batch.pop(key) for batch in rows]) for key in list(rows[0])})
                rows = []
            progress.add(len(ids))
        on_first_rank(fabric, conclude)


def check_usable(tokenizer: Tokenizer, views: Views, dtype: str | None) -> None:
    """Refuse rows that no generator could use, with a ``UserError``."""
    size = tokenizer.spec.codebook_size
    if tokenizer.spec.kind == "continuous":
        many = f"views.crops {views.crops} is for tokens, but this tokenizer is continuous: use center"
        check(views.crops == "center", many)
        check(
            tokenizer.is_measured,
            "the latents of this tokenizer were never measured, so they would be cached unscaled: stages 2 and 3"
            " measure them; run one, e.g. aligntok fit --config stage3.yaml --init_from CHECKPOINT",
        )
        return
    check(dtype is None, f"dtype {dtype} has no effect on tokens, which are 16-bit integers: leave it out")
    check(
        size is not None and size <= MAX_CODES,
        f"tokenizer.quantizer.codebook_size {size}: the cache holds 16-bit tokens, at most {MAX_CODES:,} codes; train"
        " on images instead",
    )


def check_texts(dataset: ImageDataset, views: Views, tokenizer: Tokenizer, text_encoder: TextEncoder | None) -> None:
    """Refuse captions without a text encoder and the reverse, and what contradicts them, with a ``UserError``."""
    captioned = dataset.has_captions
    if text_encoder is None:
        check(not captioned, "these images have captions: name a --text_encoder, whose ids are stored with the latents")
        return
    check(captioned, "these images have labels, no captions: leave out --text_encoder")
    check(not views.flips, "of captioned images views.flips must be false: a mirrored one contradicts left and right")
    check(tokenizer.spec.kind == "continuous", "captions are stored beside latents, but this tokenizer makes tokens")


def about_texts(text_encoder: TextEncoder | None, features: bool) -> dict[str, Any] | None:
    """Return what the manifest says of texts."""
    if text_encoder is None:
        return None
    sizes = {"max_tokens": text_encoder.max_tokens, "width": text_encoder.width}
    return {"fingerprint": text_encoder.fingerprint(), **sizes, "features": features}


def texts_of(batch: Batch, text_encoder: TextEncoder | None, features: bool, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a shard beside the rows: labels, of captioned images 0, and texts."""
    if text_encoder is None:
        return {LABELS: batch["label"]}
    ids = text_encoder.tokenize(batch["caption"])
    texts = {LABELS: torch.zeros(len(ids), dtype=torch.int64), TEXT_IDS: ids.to(torch.int32)}
    if features:
        texts[TEXT_FEATURES] = text_encoder(ids.to(device)).features.to(torch.bfloat16).cpu()
    return texts


def to_floats(image: Tensor, fabric: Fabric) -> Tensor:
    """Return images (B, 3, H, W) of bytes on the device, in [0, 1]."""
    moved: Tensor = fabric.to_device(image)
    return moved.to(torch.float32, memory_format=torch.contiguous_format) / 255


def as_stored(codes: list[Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Return the tensors of a shard from what the tokenizer made of each view."""
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    if dtype == torch.uint16:
        return {TOKENS: torch.stack(codes, 1).to(dtype).cpu()}  # (B, V, L)
    return {key: code.to(dtype).cpu() for key, code in zip((LATENTS, MIRRORED), codes, strict=False)}


def measured(written: CacheReader, tokenizer: Tokenizer) -> tuple[dict[str, list[float]], str]:
    """Return the ``statistics`` of a cache's manifest, and the same in words."""
    size = tokenizer.spec.codebook_size
    if size is not None:
        health = VectorQuantizer.health(code_counts(written.shards, size))
        words = f"{health['usage']:.1%} of {size:,} codes used, perplexity {health['perplexity']:.1f}"
        return {key: [round(health[key], 6)] for key in ("usage", "perplexity")}, words
    mean, std = latent_statistics(written.shards)
    words = f"channels with mean {mean.min():.2f} to {mean.max():.2f} and std {std.min():.2f} to {std.max():.2f}"
    return {key: [round(x, 6) for x in value.tolist()] for key, value in (("mean", mean), ("std", std))}, words


def self_check(
    written: CacheReader, dataset: ImageDataset, tokenizer: Tokenizer, views: Views, fabric: Fabric, min_psnr: float
) -> str:
    """Decode some cached rows, draw them, and return their PSNR in words.

    Raises:
        UserError: They decode to something else than their images.
    """
    spec, folder = tokenizer.spec, written.folder
    rows = np.asarray(spread_over(len(written.labels), NUM_CHECKED))
    batch = dataset.__getitems__(written.image_ids[rows].tolist())
    assert batch is not None
    pictures, found = [], []
    for view, image in enumerate(views.of(to_floats(batch["image"], fabric), spec.image_size)):
        stored, _ = written.read(rows, np.full_like(rows, view))
        code = stored.to(torch.float32 if spec.kind == "continuous" else torch.int64)
        with fabric.autocast():
            decoded = tokenizer.decode(fabric.to_device(code)).float()
            fresh = tokenizer.decode(tokenizer.encode(image)).float()
        found.append((psnr(decoded, image), psnr(fresh, image)))
        pictures.append(torch.cat([image, decoded]))
    num_crops = CROPS[views.crops]
    picture = tiled(torch.cat(pictures[::num_crops]), len(rows))
    write_atomically(folder / CHECK, lambda path: save_image(picture, path, format="png"))
    for view, (quality, best) in enumerate(found):
        what = f"{views.name(view, spec.kind)} in {folder} decode to {quality:.2f} dB"
        check(
            quality >= min(best, INVISIBLE) - MAX_LOSS,
            f"{what}, but the tokenizer reaches {best:.2f} dB on the same images: these are not their"
            f" {written.layout.name} (see {CHECK}), write them into another --output",
        )
        remedy = f"look at {CHECK}, train the tokenizer further, or lower min_psnr"
        check(quality >= min_psnr, f"{what}, less than min_psnr {min_psnr}: {remedy}")
    means = [sum(q for q, _ in found[i : i + num_crops]) / num_crops for i in range(0, len(found), num_crops)]
    words = " and ".join(f"{mean:.2f} dB{' mirrored' * mirrored}" for mirrored, mean in enumerate(means))
    return f"PSNR {words} on {len(rows)} images ({CHECK})"


def psnr(image: Tensor, reference: Tensor) -> float:
    """Return the mean PSNR in dB of images (B, 3, H, W) in [0, 1], at most 100."""
    error = (image - reference).square().flatten(1).mean(1).clamp_min(1e-10)
    return float(-10 * error.log10().mean())


def encode_command(arguments: list[str]) -> None:
    """Run ``aligntok encode`` with the words that follow it."""
    parser = make_parser("encode", "runs/latents", DESCRIPTION)
    parser.add_argument("--tokenizer", type=Tokenizer, required=True, help="Checkpoint of a run, or a class path.")
    own = parser.add_function_arguments(encode, skip={"tokenizer", "folder", "fabric"})
    options = read(parser, named_checkpoint(arguments), own, {"tokenizer"})
    with started(parser, "encode", options) as fabric:
        with building():
            given = parser.instantiate(options)
        encode(given.tokenizer, folder=given.output, fabric=fabric, **{key: given[key] for key in own})


def named_checkpoint(arguments: list[str]) -> list[str]:
    """Return the arguments with ``--tokenizer PATH`` and ``--ema`` as those of ``load_tokenizer``.

    >>> named_checkpoint(["--tokenizer", "last.ckpt", "--ema", "0.99"])
    ['--tokenizer', 'aligntok.weights.load_tokenizer', '--tokenizer.path', 'last.ckpt', '--tokenizer.ema', '0.99']
    """
    words: list[str] = []
    for word in split_values(arguments):
        is_file = Path(word).suffix in CHECKPOINTS or Path(word).is_file()
        if words[-1:] == ["--tokenizer"] and is_file:
            words += ["aligntok.weights.load_tokenizer", "--tokenizer.path"]
        words.append("--tokenizer.ema" if word == "--ema" else word)
    return words
