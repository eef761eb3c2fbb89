"""The parts of networks that ``torch.compile`` makes faster, each compiled on its own so that compiling is short."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import timm.models.vision_transformer
import torch
import torchvision.models.convnext
from torch import nn

from aligntok.errors import check
from aligntok.networks.frozen import Frozen

LIBRARY_BLOCKS = (timm.models.vision_transformer.Block, torchvision.models.convnext.CNBlock)
COMPILERS = ("cc", "gcc", "clang", "cl")
MOST_VERSIONS = 64  # of one block for inputs of different shapes; beyond torch's own 8 it would run uncompiled


def compile_blocks(module: nn.Module) -> int:
    """Compile the repeated blocks inside a module, in place, and return how many there are.

    Blocks are those of DiT, of the autoregressive transformer, of timm's vision transformers and torchvision's
    ConvNeXt, the levels of convolutional encoders and decoders, LPIPS' VGG, and every module of yours whose class says
    ``compiled_as_one = True``. They are compiled when they first run: blocks of equal shape share the work, so that
    it takes a minute where a whole network takes ten. Names of weights, checkpoints and copies stay as they were.
    Discriminators are left out: their graph is gone through twice, for images and for weights.

    >>> from aligntok.networks import DiT
    >>> compile_blocks(DiT(latent_shape=(4, 2, 2), num_classes=3, width=16, depth=2, num_heads=2))
    2

    Raises:
        UserError: This machine has no C compiler, which torch.compile calls.

    Reference:
        https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    found = any(shutil.which(name) for name in (os.environ.get("CC", COMPILERS[0]), *COMPILERS))
    check(found, "torch.compile needs a C compiler: install gcc, set CC to one, or switch compile off")
    torch._dynamo.config.recompile_limit = max(MOST_VERSIONS, torch._dynamo.config.recompile_limit)
    blocks = list(outermost_blocks(module))
    for block in blocks:
        block.compile()
    return len(blocks)


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks inside a module, itself perhaps, but no block inside a block."""
    if getattr(module, "compiled_as_one", False) or isinstance(module, LIBRARY_BLOCKS):
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child)
    if isinstance(module, Frozen) and not module._modules:  # built late, and not among the children
        module.load()
        yield from outermost_blocks(module.network)
