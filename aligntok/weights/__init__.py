"""Weights in files: reading, writing, rebuilding."""

from aligntok.weights.checkpoint import load_network, load_tokenizer, read_checkpoint
from aligntok.weights.vae import load_vae
from aligntok.weights.vavae import load_vavae

__all__ = ["load_network", "load_tokenizer", "load_vae", "load_vavae", "read_checkpoint"]
