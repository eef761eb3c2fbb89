"""The next token on a GPU: a CUDA graph that reads the newest token, draws the next and writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aligntok.decoding.attention import attend
from aligntok.decoding.cached import CachedTransformer
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.blocks import allow_recompilations
from aligntok.networks.layers import KeyValueCache

WARM_UPS = 3  # steps before a capture: they compile, choose kernels and allocate
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, keys and position, as of ``TokenSampler.draw``


class GraphSampler:
    """Samples sequences by replaying a graph for each token; the host takes part in nothing else.

    The block and what follows the blocks are compiled (``torch.compile``), once for all blocks and positions; attention
    is ``attend``. Nothing in the graph depends on the position but by a tensor on the device, which it counts up.

    Args:
        network: Copied; ``__call__`` reads its weights anew, into the same memory.
        starts: Rows of the embedding table that start the sequences, (R,) int64: all classes, then as many null
            classes, or none. A later call has as many.
        joins: Step from which the null classes are computed.
        dtype: As of ``CachedTransformer``.
        scales: Guidance scale of each step.
        draw: From guided logits to tokens.
    """

    def __init__(
        self,
        network: AutoregressiveTransformer,
        starts: Tensor,
        count: int,
        joins: int,
        dtype: torch.dtype,
        scales: Sequence[float],
        draw: Draw,
    ) -> None:
        device, rows, self.joins, self.draw = network.rotary.device, len(starts), joins, draw
        self.cached = CachedTransformer(copy.deepcopy(network), rows, dtype, pack=False)
        self.sequence = starts[:, None].repeat(1, len(scales) + 1)  # (R, N + 1): the start, then the tokens
        self.keys = torch.zeros(count, 2, dtype=torch.int64, device=device)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        allow_recompilations()  # each number of rows is a shape of its own
        self.apply_block, self.finish = (torch.compile(part, dynamic=False) for part in (apply_block, finish))
        self.steps = {}
        for size in {count} if joins == len(scales) else {rows} if joins == 0 else {count, rows}:
            self.steps[size] = self.captured(partial(self.step, size))

    def __call__(self, network: AutoregressiveTransformer, starts: Tensor, keys: Tensor) -> Tensor:
        """Return tokens (B, N) int64, in memory that the next call writes."""
        self.cached.load(network)
        self.sequence.copy_(starts[:, None])
        self.keys.copy_(keys)
        self.position.zero_()
        count = len(keys)
        for i in range(len(self.scales)):
            if i == self.joins > 0:
                self.cached(self.sequence[count:, :i], 0, slice(count, None))
            self.steps[count if i < self.joins else len(starts)]()
        return self.sequence[:count, 1:]

    def step(self, size: int) -> None:
        """Draw the next token of the first sequences, this many."""
        network: Any = self.cached.network
        x = network.embed(self.sequence[:size].index_select(1, self.position)).float()  # (R, 1, width)
        rotary = network.rotary[self.position]
        for block, (keys, values) in zip(network.blocks, self.cached.caches, strict=True):
            x = self.apply_block(block, x, rotary, keys[:size], values[:size], self.position)
        self.finish(network, x, self.sequence, self.keys, self.scales, self.position, self.draw)
        self.position.add_(1)  # outside, as the kernels before read it

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats a step: on a GPU its graph."""
        if self.position.device.type == "cpu":
            return step
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.position.zero_()
                step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may read ahead in their threads
            step()
        return graph.replay


def apply_block(block: Any, x: Tensor, rotary: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Apply a block to the newest tokens (R, 1, width)."""
    y: Tensor = block(x, rotary, KeyValueCache(keys, values, position, attend))
    return y


def finish(
    network: Any, x: Tensor, sequence: Tensor, keys: Tensor, scales: Tensor, position: Tensor, draw: Draw
) -> None:
    """Draw tokens from what the blocks gave, and write them into all sequences (R, N + 1)."""
    logits, count = network.head(network.norm(x[:, -1])).float(), len(keys)  # (R, codebook_size)
    if len(logits) > count:
        null = logits[count:]
        logits = null + (logits[:count] - null) * scales[position]
    tokens = draw(logits, keys, position)
    sequence.index_copy_(1, position + 1, tokens.repeat(len(sequence) // count)[:, None])


_kept: WeakKeyDictionary[AutoregressiveTransformer, tuple[Hashable, GraphSampler]] = WeakKeyDictionary()


def graph_sampler(network: AutoregressiveTransformer, key: Hashable, make: Callable[[], GraphSampler]) -> GraphSampler:
    """Return what the last call with this network and an equal key made, or make it anew.

    For each network the last one is kept, with its copy of the weights, its keys and values: until the network is
    freed, is sampled with another key, or is forgotten by ``release``.
    """
    if network not in _kept or _kept[network][0] != key:
        release(network)  # before the next takes memory
        _kept[network] = (key, make())
    return _kept[network][1]


def release(network: AutoregressiveTransformer) -> None:
    """Free what sampling from a network has kept."""
    _kept.pop(network, None)
