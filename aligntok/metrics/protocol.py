"""Named evaluation protocols: what must be equal for two numbers to compare."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aligntok.errors import UserError, check
from aligntok.metrics.reference import Reference


@dataclass(frozen=True)
class Protocol:
    """Conditions of a measurement, checked before and after it, and printed beside the number.

    >>> find_protocol("gfid-adm50k").check_count(10_000)
    Traceback (most recent call last):
    aligntok.errors.UserError: protocol gfid-adm50k wants 50,000 images, 10,000 were measured: ...

    Attributes:
        name: Of the protocol.
        features: Name of the feature network; None here and below: any.
        count: Number of images measured.
        reference: How the id (``source``) of the reference begins.
        reference_hash: Part of that id, to demand one certain reference.
        reference_count: Number of reference images.
        crop: Of the reference images.
        measure: What must be measured beside the Fréchet distance: ``mind`` or nothing.
        judges: Config of the feature networks that judge together, for ``aligntok evaluate``.
        prompts: Hash of the prompts that the samples were asked for; "": any, but they must be known; None: of classes.
    """

    name: str
    features: str | None = None
    count: int | None = None
    reference: str | None = None
    reference_hash: str | None = None
    reference_count: int | None = None
    crop: str = "ADM centre crop"
    measure: str | None = None
    judges: str | None = None
    prompts: str | None = None

    def check_reference(self, reference: Reference) -> None:
        """Raise a ``UserError`` if the reference is of other features, origin or size."""
        found = reference.source or "measured here, unnamed"
        if self.features not in (None, reference.features):
            problem = f"features {self.features!r}, the reference ({found}) has {reference.features!r}"
        elif not found.startswith(self.reference or ""):
            problem = f"the reference {self.reference}*, this one is: {found}"
        elif (self.reference_hash or "") not in found:
            problem = f"the reference with hash {self.reference_hash}, this one is: {found}"
        elif self.reference_count not in (None, reference.count):
            number = f"{reference.count:,}" if reference.count else "an unknown number"
            problem = f"a reference of {self.reference_count:,} images, this one ({found}) has {number}"
        else:
            return
        raise UserError(f"protocol {self.name} wants {problem}. Give that reference, or measure without a protocol")

    def check_count(self, count: int) -> None:
        """Raise a ``UserError`` if another number of images was measured."""
        check(
            self.count in (None, count),
            f"protocol {self.name} wants {self.count or 0:,} images, {count:,} were measured: measure as many, or "
            "without a protocol, for the distance depends on the number",
        )

    def describe(self, image_size: tuple[int, int] | None, labels: Tensor, reference: Reference) -> str:
        """Return one line that says all that a number depends on: images of this size, labels (N,), -1 if unknown."""
        asked = f"prompts sha256:{self.prompts}" if self.prompts else label_policy(labels)
        size = "x".join(map(str, image_size)) if image_size else "unknown size in"
        number = f"{reference.count:,} images" if reference.count else "number of images not in the file"
        return (
            f"{self.name}: {len(labels):,} images of {size} px, {asked}, features {reference.features}, "
            f"reference {reference.source or 'unnamed'} ({number}, {self.crop})"
        )


FREE = Protocol("no protocol")
NAMED = {
    # Statistics of ADM's file; 50,000 samples. Published labels are i.i.d. (ADM, DiT, REPA, LightningDiT, LlamaGen) or
    # equally many of each class (RAE, MAR, TiTok), which lowers the FID by about 0.1: both pass, the line says which.
    "gfid-adm50k": Protocol("gfid-adm50k", "inception", 50_000, reference="VIRTUAL_imagenet"),
    # Reconstructions of the 50,000 validation images of ImageNet against these images.
    "rfid-val50k": Protocol("rfid-val50k", "inception", 50_000, reference_count=50_000),
    # MIND of 5,000 samples, which the paper (arXiv:2605.06797) puts in the place of FID of 50,000.
    "mind-5k": Protocol("mind-5k", "inception", 5_000, measure="mind"),
    # FDr6 of arXiv:2604.28190: six feature networks, each with its FD of the validation images as the unit.
    "fdr6": Protocol("fdr6", None, 50_000, judges="fdr6.yaml"),
    # Samples of captions of COCO against its images: 30,000 in most papers, 6,000 in AlignTok (it does not say which).
    "fd-coco": Protocol("fd-coco", None, 30_000, prompts=""),
    "fd-coco6k": Protocol("fd-coco6k", None, 6_000, prompts=""),
}


def find_protocol(name: str, reference_hash: str | None = None) -> Protocol:
    """Return a protocol of ``NAMED``, or ``fd-<feature>`` (50,000 images, any reference).

    >>> find_protocol("fd-dinov2").features
    'dinov2'

    Args:
        name: Of the protocol.
        reference_hash: Digits that the id of the reference must contain.

    Raises:
        UserError: No such protocol.
    """
    feature = name.removeprefix("fd-")
    known = name in NAMED or feature not in (name, "")
    check(known, f"there is no protocol {name!r}: use {', '.join(NAMED)} or fd-<feature>")
    found = NAMED.get(name) or Protocol(name, feature, 50_000)
    return replace(found, reference_hash=reference_hash)


def label_policy(labels: Tensor) -> str:
    """Say how often each label (N,) occurs; -1 is unknown."""
    if not len(labels) or (labels < 0).any():
        return "labels unknown"
    counts = torch.unique(labels, return_counts=True)[1]
    least, most = int(counts.min()), int(counts.max())
    span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"labels {'' if least == most else 'not '}balanced ({span} of each of {len(counts):,})"
