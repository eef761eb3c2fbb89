"""``aligntok evaluate SAMPLES --reference REFERENCE``: measure stored images as papers do."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.data.stored import Images, StoredFile, open_images
from aligntok.errors import UserError, check, check_positive
from aligntok.files import read_json, write_text
from aligntok.metrics import EncoderFeatures, GenerationMetrics, InceptionFeatures, Reference, find_protocol
from aligntok.metrics.protocol import FREE, Protocol
from aligntok.networks import VisionEncoder
from aligntok.programs.parser import Parser

DESCRIPTION = """\
Measure images that are stored in an .npz (arr_0, uint8 of N x H x W x 3, as ADM's evaluator takes it) or in a folder.

  aligntok evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --protocol gfid-adm50k
  aligntok evaluate FOLDER --reference PHOTOS --image_size 256 --save_reference photos.safetensors
  aligntok evaluate samples.npz --reference photos.safetensors --encoder vit_large_patch14_dinov2.lvd142m --pool class

Inception features unless there is an --encoder. Without a measure named: FID, IS, sFID, precision, recall; of an
encoder's features the Frechet distance, precision, recall. The numbers, the line that says what they depend on, and
the reference's hash are kept in evaluation.json beside the samples."""

MEASURES = {  # those of Inception alone last
    "precision_recall": "precision and recall with 3 neighbours; keeps all features in memory",
    "kid": "kernel distance",
    "sfid": "FID of spatial features",
    "inception_score": "Inception Score, in the order of the samples",
}
DOWNSAMPLING = 16  # of an encoder: 256 px are 16 x 16 tokens, which a patch-14 one sees at 224 px (dgm-eval's DINOv2)


def evaluate_command(arguments: list[str]) -> None:
    """Run ``aligntok evaluate`` with the words that follow it.

    Raises:
        UserError: What the user can mend: files, sizes, counts, weights.
    """
    options = parse(arguments)
    samples = open_images(options.samples)
    size = samples.image_size
    if size is None:
        raise UserError(f"{samples.path} has no images `arr_0`: name the samples first, what they compare with after")
    output = (samples.path if samples.path.is_dir() else samples.path.parent) / "evaluation.json"
    earlier = read_records(output)
    protocol = find_protocol(options.protocol) if options.protocol else FREE
    if not (options.image_size or options.reference.name.startswith("VIRTUAL_imagenet")):  # ADM's own
        protocol = replace(protocol, crop="as stored")
    protocol.check_count(samples.count)
    metrics = make_metrics(options, size, protocol)
    find_reference(metrics, size, options)
    if options.save_reference:
        metrics.reference().save(options.save_reference)
        print(options.save_reference, flush=True)
    if metrics.inception_score and sorted_by_class(samples.labels):
        print("  note: the samples are sorted by class, which lowers the Inception Score of consecutive splits")
    measure(metrics, samples, options.batch_size)
    values = metrics.compute()
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4f}")
    print(metrics.conditions, flush=True)
    about = {"samples": samples.path.name, "conditions": metrics.conditions}
    record = {**about, "count": samples.count, "values": values, "reference": metrics.reference().source}
    others = [other for other in earlier if about != {key: other.get(key) for key in about}]
    write_text(output, json.dumps([*others, record], indent=1))
    print(output)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; refuse those that have no effect."""
    parser = Parser("evaluate", DESCRIPTION)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", type=Path, help="an .npz, or a folder of images of one size")
    add("--reference", required=True, type=Path, help=".npz as ADM's, .safetensors (--save_reference), or a folder")
    add("--image_size", type=int, metavar="N", help="ADM's centre crop to N x N, of the images of a reference folder")
    add("--save_reference", type=Path, metavar="FILE.safetensors", help="keep what was measured of the reference")
    add("--protocol", help="gfid-adm50k, rfid-val50k or fd-<features>: its conditions are checked")
    add("--inception_weights", metavar="PATH", help="by default $ALIGNTOK_HOME, torch.hub's folder, then a download")
    add("--encoder", metavar="NAME", help="timm model whose features take the place of Inception's")
    add("--encoder_weights", default="hub", help="hub, offline, or a path (default: hub)")
    add("--pool", choices=["mean", "class"], default="mean", help="of the encoder's tokens (default: mean)")
    add("--fid", action="store_true", help="nothing but the Frechet distance, and what else is named")
    for name, text in MEASURES.items():
        add(f"--{name}", action="store_true", help=text)
    add("--all", action="store_true", help="all of them")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    options = parser.parse_args(arguments)
    size, kept = options.image_size, options.save_reference
    check_positive(batch_size=options.batch_size, image_size=size)
    check(size is None or options.reference.is_dir(), f"--image_size {size} crops the images of a reference folder")
    check(not kept or kept.suffix == ".safetensors", f"--save_reference {kept}: name a file that ends in .safetensors")
    either = not (options.inception_weights and options.encoder)
    check(either, "--inception_weights has no effect on an --encoder: give one of the two")
    ours = options.encoder or (options.pool, options.encoder_weights) == ("mean", "hub")
    check(ours, "--pool and --encoder_weights have no effect without an --encoder")
    return options


def make_metrics(options: argparse.Namespace, image_size: tuple[int, int], protocol: Protocol) -> GenerationMetrics:
    """Return what is to be measured, in which features, on the device."""
    if options.encoder:
        encoder = VisionEncoder(options.encoder, image_size, DOWNSAMPLING, options.encoder_weights)
        features: nn.Module = EncoderFeatures(encoder, pool=options.pool)
        possible = ["precision_recall", "kid"]
    else:
        features, possible = InceptionFeatures(options.inception_weights), list(MEASURES)
    chosen = [name for name in MEASURES if getattr(options, name)]
    if options.all:
        chosen = possible
    elif not chosen and not options.fid:
        chosen = [name for name in possible if name != "kid"]
    metrics = GenerationMetrics(features, **dict.fromkeys(chosen, True), protocol=protocol)
    try:
        torch.zeros(1, device=options.device).item()  # meta holds no numbers
        return metrics.to(options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]:.200}") from error


def find_reference(metrics: GenerationMetrics, image_size: tuple[int, int], options: argparse.Namespace) -> None:
    """Read the reference, or measure it; its images must have the samples' size."""
    if options.reference.suffix == ".safetensors":
        metrics.set_reference(Reference.load(options.reference))
        return
    images = open_images(options.reference, options.image_size)
    ours, theirs = ("x".join(map(str, size or ())) for size in (image_size, images.image_size))
    check(
        theirs in ("", ours),
        f"the samples have {ours} pixels, the reference {images.path} has {theirs}: the distance would be that of the"
        " resize. --image_size crops the images of a reference folder",
    )
    if isinstance(images, StoredFile):
        metrics.set_reference(metrics.read_adm(images, options.batch_size))
    else:
        measure(metrics, images, options.batch_size, real=True)
        metrics.set_reference(metrics.reference(images.source))


def measure(metrics: GenerationMetrics, images: Images, batch_size: int, real: bool = False) -> None:
    """Show all images to the metrics."""
    start = 0
    for image in images.images(batch_size):
        ids = torch.arange(start, start + len(image))
        label = None if images.labels is None else images.labels[ids]
        metrics.update(image.to(metrics.device), ids, label, real)
        start += len(image)


def sorted_by_class(labels: Tensor | None) -> bool:
    """Tell whether the images of a class come one after the other, by the labels (N,) of all.

    >>> sorted_by_class(torch.tensor([1, 1, 0, 0])), sorted_by_class(torch.tensor([0, 1, 0, 1]))
    (True, False)
    """
    if labels is None:
        return False
    runs, classes = len(torch.unique_consecutive(labels)), len(torch.unique(labels))
    return 1 < runs == classes < len(labels)


def read_records(path: Path) -> list[dict[str, object]]:
    """Return what an earlier evaluation wrote."""
    try:
        records: list[dict[str, object]] = read_json(path, [dict]) if path.exists() else []
    except UserError as error:
        raise UserError(f"{path} was not written by `aligntok evaluate`: move it elsewhere") from error
    return records
