"""``aligntok evaluate SAMPLES --reference REFERENCE``: measure stored images as papers do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.data.prompts import hash_prompts, read_prompts, stored_prompts
from aligntok.data.stored import Images, StoredFile, StoredFolder, open_images
from aligntok.errors import UserError, check, check_positive
from aligntok.files import check_writable, read_json, write_text
from aligntok.metrics import (
    CaptionAlignment,
    EncoderFeatures,
    FidelityFeatures,
    GenerationMetrics,
    InceptionFeatures,
    Reference,
    find_protocol,
)
from aligntok.metrics.fidelity import CLIP, DINOV2
from aligntok.metrics.protocol import FREE, Protocol
from aligntok.networks import VisionEncoder
from aligntok.networks.frozen import Frozen, load_frozen
from aligntok.programs.judges import Judge, frechet_ratio, read_judges, shared_reference
from aligntok.programs.parser import Parser, check_device

DESCRIPTION = """\
Measure images that are stored in an .npz (arr_0, uint8 of N x H x W x 3, as ADM's evaluator takes it) or in a folder.

  aligntok evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --protocol gfid-adm50k
  aligntok evaluate FOLDER --reference PHOTOS --image_size 256 --save_reference photos.safetensors
  aligntok evaluate samples.npz --reference photos.safetensors --encoder vit_large_patch14_dinov2.lvd142m --pool class
  aligntok evaluate samples.npz --reference IMAGENET/train --image_size 256 --protocol fdr6
  aligntok evaluate PROMPTED --clip openai/clip-vit-large-patch14 --reference COCO/val2014 --image_size 256 --fid

Inception features unless there is an --encoder. Without a measure named: FID, IS, sFID, precision, recall; of an
encoder's features the Frechet distance, precision, recall. Of --judges the Frechet distances and FDr, their mean in
units of that of held out images; each judge's reference is REFERENCE/<its name>.safetensors or .npz, if it is there.
With --clip, of samples of prompts: CLIP score, and R@1, how often a sample is nearer to its prompt than to 99 others.
The prompts are those that `aligntok sample` and GenEval keep beside their samples, or in --prompts.
The numbers, the line that says what they depend on, and the reference's hash are kept in evaluation.json beside the
samples."""

MEASURES = {  # those of Inception alone last
    "precision_recall": "precision and recall with 3 neighbours; keeps all features in memory",
    "kid": "kernel distance",
    "mind": "Monge distance, better of 5,000 samples than FID of 50,000",
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
    check_writable(output, *([options.save_reference] if options.save_reference else []))
    earlier = read_records(output)
    protocol = find_protocol(options.protocol) if options.protocol else FREE
    if not (options.image_size or (options.reference and options.reference.name.startswith("VIRTUAL_imagenet"))):
        protocol = replace(protocol, crop="as stored")  # ADM's own is cropped
    prompts = prompts_of(samples, options.prompts) if options.clip or protocol.prompts == "" else None
    protocol = replace(protocol, prompts=None if prompts is None else hash_prompts(prompts))
    protocol.check_count(samples.count)
    file: str | None = options.judges or protocol.judges
    judges = read_judges(file) if file else []
    measured = make_metrics(options, size, protocol, judges) if options.reference else []
    alignment = CaptionAlignment(options.clip).load() if options.clip else None
    values: dict[str, float] = {}
    for metrics in measured:
        load_frozen(metrics.network)  # the last one's weights may be missing: say so before the first one measures
    for metrics in measured:
        values |= evaluate(metrics, samples, options, bool(judges))
    values |= frechet_ratio([values[metrics.names[0]] for metrics in measured], judges) if judges else {}
    if alignment and prompts:
        values |= measure_alignment(alignment, samples, prompts, options)
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.4f}")
    conditions, source = (measured[0].conditions, measured[0].reference().source) if measured else ("", "")
    if judges:
        reference = shared_reference([metrics.reference() for metrics in measured], judges)
        labels = torch.full((samples.count,), -1) if samples.labels is None else samples.labels
        conditions, source = protocol.describe(size, labels, reference), reference.source
    if alignment:
        conditions += f"{'; ' if conditions else ''}{alignment.conditions}, prompts sha256:{protocol.prompts}"
    print(conditions, flush=True)
    about = {"samples": samples.path.name, "conditions": conditions}
    record = {**about, "count": samples.count, "values": values, "reference": source}
    others = [other for other in earlier if about != {key: other.get(key) for key in about}]
    write_text(output, json.dumps([*others, record], indent=1))
    print(output)


def prompts_of(samples: Images, file: str | None) -> list[str]:
    """Return the prompts of the samples, in their order: of a file, or of what is kept beside them."""
    if file is None:
        named = isinstance(samples, StoredFolder)
        check(named, f"{samples.path} does not say what its images were asked to show: give --prompts FILE")
        return stored_prompts(samples.path, samples.names) if isinstance(samples, StoredFolder) else []
    prompts = [prompt.text for prompt in read_prompts(file)]
    many = f"--prompts {file} has {len(prompts):,} prompts for {samples.count:,} samples: give one for each"
    check(len(prompts) == samples.count, many)
    return prompts


def measure_alignment(
    alignment: CaptionAlignment, samples: Images, prompts: list[str], options: argparse.Namespace
) -> dict[str, float]:
    """Return CLIP score and R@1 of the samples of prompts."""
    check_device(options.device)
    alignment.to(options.device)
    start = 0
    for image in samples.images(options.batch_size):
        ids = torch.arange(start, start + len(image))
        alignment.update(image, prompts[start : start + len(image)], ids)
        start += len(image)
    return alignment.compute()


def evaluate(
    metrics: GenerationMetrics, samples: Images, options: argparse.Namespace, is_judge: bool
) -> dict[str, float]:
    """Return the numbers in the features of one network."""
    check_device(options.device)
    metrics.to(options.device)
    find_reference(metrics, samples.image_size or (), options)
    if options.save_reference:
        path = options.save_reference / f"{metrics.features.name}.safetensors" if is_judge else options.save_reference
        metrics.reference().save(path)
        print(path, flush=True)
    if metrics.inception_score and sorted_by_class(samples.labels):
        print("  note: the samples are sorted by class, which lowers the Inception Score of consecutive splits")
    measure(metrics, samples, options.batch_size)
    values = metrics.compute()
    for part in metrics.network.modules():
        if isinstance(part, Frozen):
            part.on(torch.device("cpu"))  # room for the next judge
    return values


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; refuse those that have no effect."""
    parser = Parser("evaluate", DESCRIPTION)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", type=Path, help="an .npz, or a folder of images of one size")
    add("--reference", type=Path, help=".npz as ADM's, .safetensors (--save_reference), or a folder")
    add("--clip", metavar="MODEL", help="CLIP score and R@1 of prompts: a CLIP's folder, or its name on the hub")
    add("--prompts", metavar="FILE", help="of the samples, in their order, where nothing beside them says it")
    add("--image_size", type=int, metavar="N", help="ADM's centre crop to N x N, of the images of a reference folder")
    add("--save_reference", type=Path, metavar="FILE.safetensors", help="keep what was measured of the reference")
    add(
        "--protocol",
        help="gfid-adm50k, rfid-val50k, mind-5k, fdr6, fd-coco or fd-<features>: its conditions are checked",
    )
    add("--inception_weights", metavar="PATH", help="by default $ALIGNTOK_HOME, torch.hub's folder, then a download")
    add("--encoder", metavar="NAME", help="timm model, clip-vit-l-14, dinov2-vit-l-14, ... in Inception's place")
    add("--encoder_weights", default="hub", help="hub, offline, or a path (default: hub)")
    add("--pool", choices=["mean", "class"], default="mean", help="of the encoder's tokens (default: mean)")
    add("--judges", metavar="FILE.yaml", help="several feature networks, as in the shipped fdr6.yaml")
    add("--fid", action="store_true", help="nothing but the Frechet distance, and what else is named")
    for name, text in MEASURES.items():
        add(f"--{name}", action="store_true", help=text)
    add("--all", action="store_true", help="all of them")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    options = parser.parse_args(arguments)
    size, kept = options.image_size, options.save_reference
    check_positive(batch_size=options.batch_size, image_size=size)
    words = "--reference is missing: name what the samples are compared with, or give --clip without other measures"
    named = [
        name
        for name in ("protocol", "encoder", "judges", "save_reference", "fid", "all", *MEASURES)
        if getattr(options, name)
    ]
    check(bool(options.reference or (options.clip and not named)), words)
    of_prompts = bool(options.clip) or (options.protocol or "").startswith("fd-coco")
    check(of_prompts or not options.prompts, "--prompts has no effect without --clip or protocol fd-coco")
    check(
        size is None or bool(options.reference and options.reference.is_dir()),
        f"--image_size {size} crops the images of a reference folder",
    )
    several = options.judges or options.protocol == "fdr6"
    words = f"--save_reference {kept}: name a file that ends in .safetensors"
    check(not kept or bool(several) or kept.suffix == ".safetensors", words)
    either = not (options.inception_weights and options.encoder)
    check(either, "--inception_weights has no effect on an --encoder: give one of the two")
    timms = options.encoder and options.encoder not in CLIP | DINOV2
    check(bool(timms) or options.pool == "mean", "--pool has no effect without an --encoder of timm")
    check(
        bool(options.encoder) or options.encoder_weights == "hub",
        "--encoder_weights has no effect without an --encoder",
    )
    return options


def make_metrics(
    options: argparse.Namespace, image_size: tuple[int, int], protocol: Protocol, judges: Sequence[Judge] = ()
) -> list[GenerationMetrics]:
    """Return what is to be measured, in which features."""
    chosen = [name for name in MEASURES if getattr(options, name)]
    if judges:
        only = "--judges and protocol fdr6 measure Fréchet distances alone, in features of their own: leave out"
        others = [*chosen, *(name for name in ("all", "encoder", "inception_weights") if getattr(options, name))]
        check(not others, f"{only} --{' --'.join(others)}")
        both = f"protocol {protocol.name} has judges of its own: leave out --judges, or the protocol"
        check(not (options.judges and protocol.judges), both)
        return [GenerationMetrics(judge.features, protocol=replace(protocol, judges=None)) for judge in judges]
    possible = ["precision_recall", "kid", "mind"]
    if options.encoder in CLIP | DINOV2:
        weights = None if options.encoder_weights == "hub" else options.encoder_weights
        features: nn.Module = FidelityFeatures(options.encoder, weights)
    elif options.encoder:
        encoder = VisionEncoder(options.encoder, image_size, DOWNSAMPLING, options.encoder_weights)
        features = EncoderFeatures(encoder, pool=options.pool)
    else:
        features, possible = InceptionFeatures(options.inception_weights), list(MEASURES)
    if options.all:
        chosen = possible
    elif not chosen and not options.fid:
        chosen = [name for name in possible if name not in ("kid", "mind")]
    return [GenerationMetrics(features, **dict.fromkeys(chosen, True), protocol=protocol)]


def find_reference(metrics: GenerationMetrics, image_size: tuple[int, ...], options: argparse.Namespace) -> None:
    """Read the reference, or measure it; its images must have the samples' size."""
    path = options.reference
    own = (path / f"{metrics.features.name}{suffix}" for suffix in (".safetensors", ".npz"))
    path = next((file for file in own if file.is_file()), path)
    if path.suffix == ".safetensors":
        metrics.set_reference(Reference.load(path))
        return
    images = open_images(path, options.image_size if path == options.reference else None)
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
