"""The files of a cache: safetensors shards, and a manifest beside them."""

from aligntok.cache.manifest import Manifest, Record
from aligntok.cache.reader import CacheReader
from aligntok.cache.shards import LATENT_LAYOUT, TOKEN_LAYOUT, Layout, shard_name
from aligntok.cache.statistics import channel_statistics, code_counts, latent_statistics
from aligntok.cache.writer import CacheWriter

__all__ = [
    "LATENT_LAYOUT",
    "TOKEN_LAYOUT",
    "CacheReader",
    "CacheWriter",
    "Layout",
    "Manifest",
    "Record",
    "channel_statistics",
    "code_counts",
    "latent_statistics",
    "shard_name",
]
