"""Several feature networks that judge the same images: FDr, the mean of their Fréchet distances in common units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from aligntok.errors import check
from aligntok.layers import read_configs
from aligntok.metrics import Reference


@dataclass
class Judge:
    """A feature network, and the unit of its distances.

    Attributes:
        features: As ``GenerationMetrics`` takes them.
        validation: Fréchet distance of held out real images from the same reference, above 0; None: not measured yet.
    """

    features: nn.Module
    validation: float | None = None


def read_judges(name: str) -> list[Judge]:
    """Return the judges of a YAML file, or of a shipped config; their weights are not read yet.

    >>> path = getfixture("tmp_path") / "judges.yaml"
    >>> text = "judges: {mine: {features: {class_path: aligntok.metrics.InceptionFeatures}, validation: 2.5}}"
    >>> _ = path.write_text(text)
    >>> [judge.validation for judge in read_judges(str(path))]
    [2.5]

    Raises:
        UserError: No such file, or one that names no judges, or two alike.
    """
    from aligntok.messages import ShortErrors  # with jsonargparse, which one network does without

    parser = ShortErrors(prog="aligntok evaluate")
    parser.add_argument("--judges", type=dict[str, Judge], required=True)
    config = read_configs(name)
    check(config.keys() == {"judges"}, f"{name}: give `judges` and nothing else, as the shipped fdr6.yaml does")
    judges: dict[str, Judge] = parser.instantiate(parser.parse_object(config)).judges
    names = {getattr(judge.features, "name", key) for key, judge in judges.items()}
    check(0 < len(judges) == len(names), f"{name}: `judges` needs one or more, each with features of another `name`")
    for key, judge in judges.items():
        positive = judge.validation is None or judge.validation > 0
        check(positive, f"{name}: judges.{key}.validation is {judge.validation}: give a Fréchet distance above 0")
    return list(judges.values())


def frechet_ratio(distances: Iterable[float], judges: list[Judge]) -> dict[str, float]:
    """Return ``fdr<number of judges>``, the mean of their distances in units of ``validation``; nothing without these.

    1 is as far from the reference as held out images are.

    >>> frechet_ratio([3.0, 1.0], [Judge(nn.Identity(), 1.5), Judge(nn.Identity(), 1.0)])
    {'fdr2': 1.5}

    Reference:
        Yang et al., Representation Fréchet Loss for Visual Generation, arXiv:2604.28190: FDr^k.
    """
    pairs = zip(distances, judges, strict=True)
    ratios = [distance / judge.validation for distance, judge in pairs if judge.validation]
    return {f"fdr{len(ratios)}": sum(ratios) / len(ratios)} if len(ratios) == len(judges) else {}


def shared_reference(references: list[Reference], judges: list[Judge]) -> Reference:
    """Return the first judge's reference, with the names of all features, each with its unit, and of all sources."""
    pairs = zip(references, judges, strict=True)
    named = [f"{x.features} (unit {judge.validation})" if judge.validation else x.features for x, judge in pairs]
    sources = dict.fromkeys(reference.source for reference in references)
    return replace(references[0], features=", ".join(named), source=", ".join(sources))
