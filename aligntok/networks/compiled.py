"""The parts of networks that ``torch.compile`` makes faster, each compiled on its own so that compiling is short."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from typing import Any

import timm.models.vision_transformer
import torch
import torchvision.models.convnext
from torch import nn

from aligntok.errors import check
from aligntok.networks.frozen import Frozen

LIBRARY_BLOCKS = (timm.models.vision_transformer.Block, torchvision.models.convnext.CNBlock)
COMPILERS = ("cc", "gcc", "clang", "cl")
RECOMPILE_LIMIT = 64  # shapes of its input that a block is compiled for; beyond torch's own 8 it would run uncompiled


def compile_blocks(module: nn.Module) -> int:
    """Compile the repeated blocks inside a module, in place, and return how many there are.

    Blocks are those of DiT, of the autoregressive transformer, of timm's vision transformers and torchvision's
    ConvNeXt, the levels of convolutional encoders and decoders, LPIPS' VGG, and every module of yours whose class says
    ``compiled_as_one = True``. They are compiled when they first run: blocks of equal shape share the work, so that
    it takes a minute where a whole network takes ten. Names of weights, checkpoints and copies stay as they were.
    Discriminators are left out: their graph is gone through twice, for images and for weights. So are networks that
    ``load_frozen`` has not built yet.

    >>> from aligntok.networks import DiT
    >>> compile_blocks(DiT(latent_shape=(4, 2, 2), num_classes=3, width=16, depth=2, num_heads=2))
    2

    Raises:
        UserError: This machine has no C compiler, which torch.compile calls.

    Reference:
        https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    given = shlex.split(os.environ.get("CC", ""))[:1]
    found = any(shutil.which(name) for name in given or COMPILERS)
    check(found, "torch.compile needs a C compiler: install gcc, set CC to one, or switch compile off")
    allow_recompilations()
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks where the buckets of gradients end
    blocks = list(outermost_blocks(module))
    for block in blocks:
        block.compile()
    return len(blocks)


def allow_recompilations() -> None:
    """Let torch compile a function for more shapes than its own limit."""
    config: Any = torch._dynamo.config
    recent = hasattr(config, "recompile_limit")  # torch from 2.7
    name = "recompile_limit" if recent else "cache_size_limit"
    setattr(config, name, max(RECOMPILE_LIMIT, getattr(config, name)))


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks inside a module, itself perhaps, but no block inside a block."""
    if getattr(module, "compiled_as_one", False) or isinstance(module, LIBRARY_BLOCKS):
        yield module
        return
    children = [*module.children()]
    if isinstance(module, Frozen) and not children and module.build is None:  # built late, and not among the children
        children = [module.network]
    for child in children:
        yield from outermost_blocks(child)
