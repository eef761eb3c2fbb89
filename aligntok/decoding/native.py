"""The step of a cached transformer in C++, for few rows on a CPU; compiled where it first runs, in a second.

A second form of the network's block, as torch's 700 operations a step leave the memory idle between them: AliTok-B's
step takes 1.3 to 1.7 times as long with them (benchmarks/README.md).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.decoding.cached import CachedTransformer
from aligntok.errors import UserError
from aligntok.networks.ar import AutoregressiveTransformer

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
LANES = 16  # the most of the source
MOST_ROWS = 8  # beyond, arithmetic takes longer than reading the weights, and torch's products are as fast
POINTERS = {  # of the source's structure Layer, to these tensors of a block
    "norm_attention": "norm_attention.gain",
    "norm_q": "attention.q_norm.gain",
    "norm_k": "attention.k_norm.gain",
    "norm_mlp": "norm_mlp.gain",
    "qkv_bias": "attention.qkv.bias",
    "proj_bias": "attention.proj.bias",
    "qkv": "attention.qkv.weight",
    "proj": "attention.proj.weight",
    "proj_in": "mlp.proj_in.weight",
    "proj_out": "mlp.proj_out.weight",
}


class _Network(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("depth", "width", "num_heads", "hidden", "length", "codebook_size")),
        *((name, ctypes.c_void_p) for name in ("norm", "head_bias", "head")),
        *((name, ctypes.c_float) for name in ("eps_norm", "head_eps_norm")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*POINTERS, "keys", "values")]


def fits(network: AutoregressiveTransformer, num_rows: int, dtype: torch.dtype) -> bool:
    """Whether there is a native step for so many rows of a network on a CPU."""
    return num_rows <= MOST_ROWS and dtype in TYPES and network.width % LANES == network.hidden % LANES == 0


class NativeStep:
    """Continues sequences by a token each, with the weights, keys and values of a cached transformer.

    Args:
        cached: Of a network that ``fits``, not packed.

    Raises:
        UserError: If the compiler is missing or fails, at the first call.
    """

    def __init__(self, cached: CachedTransformer) -> None:
        network: Any = cached.network
        self.cached, self.dtype = cached, cached.caches[0][0].dtype
        self.rotary = network.rotary.float().contiguous()
        self.alive: list[Tensor] = []  # what the addresses point to

        def address(tensor: Tensor) -> int:
            is_weight = tensor.ndim == 2
            self.alive.append(tensor.to(self.dtype if is_weight else torch.float32).contiguous())
            return self.alive[-1].data_ptr()

        self.network = _Network(
            depth=len(network.blocks),
            width=network.width,
            num_heads=network.num_heads,
            hidden=network.hidden,
            length=network.sequence_length,
            codebook_size=network.codebook_size,
            norm=address(network.norm.gain),
            head_bias=address(network.head.bias),
            head=address(network.head.weight),
            eps_norm=float(network.norm.eps_norm),
            head_eps_norm=float(network.blocks[0].attention.q_norm.eps_norm),
        )
        self.layers = (_Layer * len(network.blocks))()
        for layer, block, (keys, values) in zip(self.layers, network.blocks, cached.caches, strict=True):
            for name, path in POINTERS.items():
                setattr(layer, name, address(attrgetter(path)(block)))
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()

    def __call__(self, ids: Tensor, start: int, rows: slice) -> Tensor:
        """Return logits as ``CachedTransformer`` does, of one token for each of the first rows, ids (R, 1)."""
        network: Any = self.cached.network
        assert not rows.start
        assert 0 <= start < network.sequence_length
        x: Tensor = network.embed(ids[:, 0]).float()  # (R, width)
        logits = x.new_empty(len(x), network.codebook_size)
        rotary, threads = self.rotary[start].data_ptr(), torch.get_num_threads()
        step = build(len(x), TYPES[self.dtype])
        step(self.network, self.layers, rotary, start, threads, x.data_ptr(), logits.data_ptr())
        return logits


@functools.cache
def build(num_rows: int, weight: str) -> Any:
    """Compile the source for this CPU and return its function. No file stays: another node may have another CPU."""
    compiler = os.environ.get("CXX") or "g++"
    options = [*FLAGS.split(), f"-DROWS={num_rows}", f"-DWEIGHT={weight}", str(SOURCE), "-o"]
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "step.so")
        try:
            subprocess.run([*shlex.split(compiler), *options, library], check=True, capture_output=True, text=True)
            function = ctypes.CDLL(library).step
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-3:]
            raise UserError(
                f"compile=true on a CPU: {compiler} made no library in {folder}: {' '.join(said)}. Install g++ 9 or"
                " newer, set CXX to a compiler with OpenMP, TMPDIR to a folder without noexec, or compile to false"
            ) from None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.POINTER(_Network), ctypes.POINTER(_Layer), pointer, number, number, pointer, pointer]
    function.restype = None
    return function
