"""Values in YAML that follow from others, so that each number is said once.

``${data.init_args.image_size}`` is the value of another key. ``${spec:${...tokenizer},latent_shape}`` is what the
tokenizer three levels up says in its ``spec``, ``${num_classes:${data.init_args.train}}`` the number of classes of a
source, ``${text_width:${...text_encoder}}`` the channels of a text encoder,
``${recipe:PATH,encoder.init_args.name}`` what the model of a checkpoint was built with. What the command line gives in
such a value's place is taken as it is.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError
from torch.utils.data import Dataset

from aligntok.errors import UserError, check
from aligntok.layers import to_text
from aligntok.networks.text import TextEncoder
from aligntok.networks.tokenizer import Tokenizer, TokenizerSpec
from aligntok.weights.checkpoint import build, read_checkpoint

CLASSES_OF_MISSING: ContextVar[Callable[[Any], int] | None] = ContextVar("CLASSES_OF_MISSING", default=None)
"""For ``aligntok plan``: gives the number of classes of a source whose files are not there."""


def built(recipe: Any, kind: Any) -> Any:
    """Return the module or data set that a node of the config describes."""
    return build(cast(Any, OmegaConf.to_container(recipe, resolve=True)), kind)


def spec(tokenizer: Any, key: str) -> Any:
    """Return an attribute of the ``spec`` of the tokenizer that a recipe describes; its weights take no memory."""
    check(tokenizer is not None, "there is no tokenizer that would say it: give one of the two")
    value = getattr(spec_of(to_text(cast(Any, OmegaConf.to_container(tokenizer, resolve=True)))), key)
    return list(value) if isinstance(value, tuple) else value


@cache
def spec_of(recipe: str) -> TokenizerSpec:
    """Return the ``spec`` of the tokenizer that a recipe, as YAML, describes; each is built once."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: that no weight is copied
        return build(yaml.safe_load(recipe), Tokenizer).spec


def recipe(checkpoint: str, key: str) -> Any:
    """Return what the run of a checkpoint was given for ``model.<key>``."""
    return OmegaConf.select(OmegaConf.create(read_checkpoint(checkpoint, weights=False)["hyper_parameters"]), key)


def num_classes(source: Any) -> int:
    """Return the number of classes of the source that a recipe describes; 1 where it names none.

    >>> num_classes(OmegaConf.create({"class_path": "aligntok.data.Digits", "init_args": {"split": "val"}}))
    10
    """
    check(source is not None, "there is no data.train that would say it: give one")
    try:
        return max(1, len(getattr(built(source, Dataset), "classes", [])))
    except UserError:
        classes_of = CLASSES_OF_MISSING.get()
        if classes_of is None:
            raise
        return classes_of(built(source, Dataset))


def text_width(text_encoder: Any) -> int:
    """Return the channels of the text encoder that a recipe describes; its weights are not read.

    >>> recipe = {"class_path": "aligntok.networks.StaticTextEncoder", "init_args": {"max_tokens": 16}}
    >>> text_width(OmegaConf.create(recipe))
    256
    """
    check(text_encoder is not None, "there is no text_encoder that would say it: give one of the two")
    width: int = built(text_encoder, TextEncoder).width
    return width


for resolver in (spec, recipe, num_classes, text_width):
    OmegaConf.register_resolver(resolver.__name__, resolver, replace=True, annotation_validation="off")


@contextmanager
def followed() -> Iterator[None]:
    """Around the reading of values that follow others.

    Raises:
        UserError: What a value follows is missing or wrong.
    """
    try:
        yield
    except InterpolationResolutionError as error:
        key, problem = short_key(str(error.full_key)), str(error.msg).partition("\n    full_key")[0]
        if isinstance(error, InterpolationKeyError):
            other = short_key(re.findall(r"'([\w.]+)'", problem)[-1])
            raise UserError(f"{key} follows {other}, which is missing: give one of the two") from error
        cause = " ".join(problem.partition("interpolation: ")[2].split())
        raise UserError(f"{key} follows from another part: {cause}") from error
    finally:
        spec_of.cache_clear()  # a checkpoint may be another one by the next time


def short_key(key: str) -> str:
    """Return a key as users write it, without the verb and ``init_args``."""
    return re.sub(r"^(fit|validate|test|predict)\.|init_args\.", "", key)
