"""Plain torch networks: read, tested and used without Lightning."""

from aligntok.networks.adapters import GaussianAdapter, LinearAdapter, MLPAdapter
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.blocks import checkpoint_blocks, compile_blocks
from aligntok.networks.conv import ConvDecoder, ConvEncoder
from aligntok.networks.discriminators import BlurDiscriminator, PatchDiscriminator
from aligntok.networks.dit import DiT, WideHead
from aligntok.networks.encoders import VisionEncoder
from aligntok.networks.frozen import Frozen
from aligntok.networks.quantizers import Quantized, VectorQuantizer
from aligntok.networks.query_encoder import QueryEncoder
from aligntok.networks.text import StaticTextEncoder, Text, TextEncoder
from aligntok.networks.text_dit import TextDiT
from aligntok.networks.text_models import PretrainedTextEncoder
from aligntok.networks.token_decoder import TokenDecoder
from aligntok.networks.tokenizer import Tokenizer, TokenizerSpec
from aligntok.networks.transformer_decoder import TransformerDecoder

__all__ = [
    "AutoregressiveTransformer",
    "BlurDiscriminator",
    "ConvDecoder",
    "ConvEncoder",
    "DiT",
    "Frozen",
    "GaussianAdapter",
    "LinearAdapter",
    "MLPAdapter",
    "PatchDiscriminator",
    "PretrainedTextEncoder",
    "Quantized",
    "QueryEncoder",
    "StaticTextEncoder",
    "Text",
    "TextDiT",
    "TextEncoder",
    "TokenDecoder",
    "Tokenizer",
    "TokenizerSpec",
    "TransformerDecoder",
    "VectorQuantizer",
    "VisionEncoder",
    "WideHead",
    "checkpoint_blocks",
    "compile_blocks",
]
