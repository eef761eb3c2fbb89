"""Weights in files: reading, writing, rebuilding."""

from aligntok.weights.checkpoint import load_network, load_tokenizer, read_checkpoint

__all__ = ["load_network", "load_tokenizer", "read_checkpoint"]
