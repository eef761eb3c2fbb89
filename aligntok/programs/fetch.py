"""``aligntok fetch``: the published weights that configs need, brought where runs look for them before any network."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from aligntok.errors import UserError, check, words_of
from aligntok.files import hash_file, write_text
from aligntok.layers import read_configs
from aligntok.losses.perceptual import CONVNEXT_URL, VGG16_URL
from aligntok.metrics.fidelity import published_source
from aligntok.programs.parser import Parser
from aligntok.published import find_published, weights_folder

DESCRIPTION = """\
Bring the published weights that configs need into $ALIGNTOK_HOME (else into torch's cache), before a job runs where
there is no internet. The SHA-256 of each is kept in SHA256SUMS beside them; what is there is compared with it.

  aligntok fetch stage2.yaml dit.yaml fdr6.yaml"""

URLS = {"LPIPS": VGG16_URL, "LogitDistance": CONVNEXT_URL, "InceptionFeatures": URL_INCEPTION_V3}
SUMS = "SHA256SUMS"  # in the form that `sha256sum --check` reads


class Weights(NamedTuple):
    """A published file: its name where runs look for it, and its address."""

    name: str
    url: str


def parts_of(config: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield class and arguments, defaults too, of all that a config names by class path."""
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    if isinstance(config, dict) and isinstance(config.get("class_path"), str):
        kind: Any = locate(config["class_path"])
        parameters = inspect.signature(kind).parameters if callable(kind) else {}
        given = config.get("init_args") or {}
        yield (
            kind,
            {name: p.default for name, p in parameters.items()}
            | dict(vars(given) if isinstance(given, argparse.Namespace) else given),
        )
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from parts_of(value)


def published_weights(kind: Any, arguments: dict[str, Any]) -> Weights | None:
    """Return the published file that a part of a config needs, if it needs one."""
    name, given = getattr(kind, "__name__", ""), arguments.get("weights")
    if name in URLS and given is None:
        return Weights(URLS[name].rsplit("/", 1)[-1], URLS[name])
    if name == "FidelityFeatures" and given is None:
        url, file = published_source(arguments["name"])
        return Weights(file or url.rsplit("/", 1)[-1], url)
    model = arguments.get("model") or arguments.get("name")
    if given != "hub" or not isinstance(model, str):
        return None
    repository = timm.get_pretrained_cfg_value(model, "hf_hub_id") or f"timm/{model}"
    return Weights(f"{model}.safetensors", hf_hub_url(repository, "model.safetensors"))


def fetch(weights: Weights) -> str:
    """Bring a file into the folder, or compare the one that is there with what is known of it; return a line.

    Raises:
        UserError: It cannot be downloaded, or is not what it was.
    """
    path = find_published(weights.name)
    target, digits = path or weights_folder() / weights.name, re.search(r"-([0-9a-f]{8,})\.\w+$", weights.name)
    sums, expected = read_sums(target.parent), digits[1] if digits else ""
    if path is None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if weights.name.endswith(".safetensors"):  # the hub says the SHA-256 of its large files
                etag = get_hf_file_metadata(weights.url, timeout=10).etag or ""
                expected = etag if re.fullmatch("[0-9a-f]{64}", etag) else ""
            torch.hub.download_url_to_file(weights.url, str(target), expected or None)
        except Exception as error:  # each library raises its own kind
            known = f", SHA-256 {expected}..." if expected else ""
            raise UserError(
                f"{weights.name}: {words_of(error, 90)}. Put {weights.url}{known} there as {target}"
            ) from error
    digest = hash_file(target)
    whole = digest.startswith(expected) and sums.get(weights.name, digest) == digest
    check(whole, f"{target} is not what was published, or fetched before: remove it and fetch again")
    write_text(target.parent / SUMS, "".join(f"{v}  {k}\n" for k, v in sorted({**sums, weights.name: digest}.items())))
    return f"{target}  {target.stat().st_size / 1e6:,.0f} MB  {digest[:16]}  {'was there' if path else 'fetched'}"


def read_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that was fetched into a folder."""
    lines = (folder / SUMS).read_text().splitlines() if (folder / SUMS).is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def fetch_command(arguments: list[str]) -> None:
    """Run ``aligntok fetch`` with the words that follow it.

    Raises:
        UserError: Some of the files cannot be had; each is in a line of its own.
    """
    parser = Parser("fetch", DESCRIPTION)
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="YAML files, or names of shipped ones")
    parts = [part for name in parser.parse_args(arguments).configs for part in parts_of(read_configs(name))]
    needed = dict.fromkeys(filter(None, (published_weights(*part) for part in parts)))
    failed = 0
    for weights in needed:
        try:
            print(fetch(weights), flush=True)
        except UserError as error:
            failed += 1
            print(error, flush=True)
    check(not failed, f"{failed} of {len(needed)} files could not be had, see above")
    if not needed:
        print("these configs need no published weights")
