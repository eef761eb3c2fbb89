"""Weights in files: reading, writing, rebuilding."""

from aligntok.weights.checkpoint import load_tokenizer, read_checkpoint

__all__ = ["load_tokenizer", "read_checkpoint"]
