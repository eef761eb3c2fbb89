"""The repeated blocks of networks: each is compiled on its own, recomputed on its own, sharded on its own."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm.models.eva
import timm.models.vision_transformer
import torch
import torchvision.models.convnext
from torch import nn
from torch.utils.checkpoint import checkpoint

from aligntok.errors import check
from aligntok.networks.frozen import Frozen

LIBRARY_BLOCKS = (timm.models.vision_transformer.Block, timm.models.eva.EvaBlock, torchvision.models.convnext.CNBlock)
COMPILERS = ("cc", "gcc", "clang", "cl")
RECOMPILE_LIMIT = 64  # shapes of its input that a block is compiled for; beyond torch's own 8 it would run uncompiled


def compile_blocks(module: nn.Module) -> int:
    """Compile the repeated blocks inside a module, in place, and return how many there are.

    Blocks are those of DiT, of the autoregressive transformer, of timm's vision transformers (DINOv3's too) and
    torchvision's ConvNeXt, the levels of convolutional encoders and decoders, LPIPS' VGG, and every module of yours
    whose class says ``compiled_as_one = True``. They are compiled when they first run: blocks of equal shape share the
    work, so that it takes a minute where a whole network takes ten. Names of weights, checkpoints and copies stay as
    they were.
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


def checkpoint_blocks(module: nn.Module) -> int:
    """Let the blocks that train keep no activations, in place, and return how many there are.

    In the backward pass each runs forward once more, with the same dropout: a third more computing, and memory for one
    block instead of all. Blocks are those of ``compile_blocks``, without those whose weights are frozen. Loss,
    gradients and names of weights stay as they were.

    >>> from aligntok.networks import DiT
    >>> checkpoint_blocks(DiT(latent_shape=(4, 2, 2), num_classes=3, width=16, depth=2, num_heads=2))
    2

    Reference:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    """
    blocks = list(training_blocks(module))
    for block in blocks:
        block.forward = partial(recomputed, block.forward)  # inside the hooks, by which shards come and go
    return len(blocks)


def recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Call ``forward``; its activations are computed again when a gradient needs them."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


def training_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of ``outermost_blocks`` in which something learns."""
    for block in outermost_blocks(module):
        if any(parameter.requires_grad for parameter in block.parameters()):
            yield block


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
