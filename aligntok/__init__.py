"""aligntok: pretrained vision encoders become image tokenizers, and generators learn on their latents."""

__version__ = "0.2.0"
