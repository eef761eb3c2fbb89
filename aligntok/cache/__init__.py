"""The files of a cache: safetensors shards, and a manifest beside them."""

from aligntok.cache.manifest import CROPS, Manifest, Record, open_shards
from aligntok.cache.reader import CacheReader, verify
from aligntok.cache.shards import (
    LABELS,
    LATENT_LAYOUT,
    LATENTS,
    MIRRORED,
    TOKEN_LAYOUT,
    TOKENS,
    Layout,
    Shard,
    shard_name,
)
from aligntok.cache.statistics import channel_statistics, code_counts, latent_statistics
from aligntok.cache.writer import CacheWriter

__all__ = [
    "CROPS",
    "LABELS",
    "LATENTS",
    "LATENT_LAYOUT",
    "MIRRORED",
    "TOKENS",
    "TOKEN_LAYOUT",
    "CacheReader",
    "CacheWriter",
    "Layout",
    "Manifest",
    "Record",
    "Shard",
    "channel_statistics",
    "code_counts",
    "latent_statistics",
    "open_shards",
    "shard_name",
    "verify",
]
