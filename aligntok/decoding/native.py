"""The step of a cached transformer in C++, for few rows on a CPU; compiled where it first runs, in a second."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
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


def fits(network: AutoregressiveTransformer, num_rows: int, dtype: torch.dtype) -> bool:
    """Whether there is a native step for so many rows of a network."""
    cpu = network.rotary.device.type == "cpu"
    widths = {size for block in network.blocks for size in block.mlp.proj_out.weight.shape}  # type: ignore[union-attr]
    return cpu and num_rows <= MOST_ROWS and dtype in TYPES and not any(size % LANES for size in widths)


class NativeStep:
    """Continues sequences by a token each, with the weights, keys and values of a cached transformer.

    Args:
        cached: Of a network that ``fits``, not packed.

    Raises:
        UserError: If the compiler is missing or fails, at the first call.
    """

    def __init__(self, cached: CachedTransformer) -> None:
        network: Any = cached.network
        keys, _ = cached.caches[0]
        self.dtype = keys.dtype
        alive: list[Tensor] = []  # what the addresses below point to

        def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
            if tensor is None:
                return None
            alive.append(tensor.detach().to(dtype).contiguous())
            return alive[-1].data_ptr()

        self.network = _Network(
            depth=len(network.blocks),
            width=network.width,
            num_heads=network.num_heads,
            hidden=network.blocks[0].mlp.proj_out.weight.shape[1],
            length=network.sequence_length,
            codebook_size=network.codebook_size,
            norm=address(network.norm.gain),
            head_bias=address(network.head.bias),
            head=address(network.head.weight, self.dtype),
            eps_norm=float(network.norm.eps_norm),
            head_eps_norm=float(network.blocks[0].attention.q_norm.eps_norm),
        )
        self.layers = (_Layer * len(network.blocks))()
        for layer, block, (keys, values) in zip(self.layers, network.blocks, cached.caches, strict=True):
            attention, mlp = block.attention, block.mlp
            assert mlp.proj_in.bias is None
            assert mlp.proj_out.bias is None
            layer.norm_attention, layer.norm_mlp = address(block.norm_attention.gain), address(block.norm_mlp.gain)
            layer.norm_q, layer.norm_k = address(attention.q_norm.gain), address(attention.k_norm.gain)
            layer.qkv_bias, layer.proj_bias = address(attention.qkv.bias), address(attention.proj.bias)
            for part, names in ((attention, ("qkv", "proj")), (mlp, ("proj_in", "proj_out"))):
                for name in names:
                    setattr(layer, name, address(getattr(part, name).weight, self.dtype))
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self.cached, self.alive = cached, alive
        self.rotary = network.rotary.float().contiguous()

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
        library = Path(folder) / "step.so"
        try:
            subprocess.run([*shlex.split(compiler), *options, str(library)], check=True, capture_output=True, text=True)
            function = ctypes.CDLL(str(library)).step
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


def _fields(names: str, kind: Any) -> Iterable[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Network(ctypes.Structure):
    _fields_ = [
        *_fields("depth width num_heads hidden length codebook_size", ctypes.c_int64),
        *_fields("norm head_bias head", ctypes.c_void_p),
        *_fields("eps_norm head_eps_norm", ctypes.c_float),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields("norm_attention norm_q norm_k norm_mlp qkv_bias proj_bias", ctypes.c_void_p),
        *_fields("qkv proj proj_in proj_out keys values", ctypes.c_void_p),
    ]
