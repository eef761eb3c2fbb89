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
import torch.nn.functional as F
from torch import Tensor

from aligntok.errors import UserError
from aligntok.networks.ar import AutoregressiveTransformer
from aligntok.networks.cached import CachedTransformer

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
        layers, head, kept = cached.layers, cached.head, []
        assert all(layer.proj_in.bias is None and layer.proj_out.bias is None for layer in layers)

        def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
            if tensor is None:
                return None
            kept.append(tensor.to(dtype).contiguous())
            return kept[-1].data_ptr()

        self.dtype = head.weight.dtype
        codebook_size, width = head.weight.shape
        _, num_heads, length, _ = layers[0].keys.shape
        self.codebook_size = codebook_size
        self.network = _Network(
            depth=len(layers),
            width=width,
            num_heads=num_heads,
            hidden=layers[0].proj_out.weight.shape[1],
            length=length,
            codebook_size=codebook_size,
            norm=address(cached.norm.gain),
            head_bias=address(head.bias),
            head=address(head.weight, self.dtype),
            floor=float(cached.norm.floor),
            head_floor=float(layers[0].norm_qk.floor),
        )
        self.layers = (_Layer * len(layers))()
        for own, layer in zip(self.layers, layers, strict=True):
            for name in ("norm_attention", "norm_qk", "norm_mlp"):
                setattr(own, name, address(getattr(layer, name).gain))
            own.qkv_bias, own.proj_bias = address(layer.qkv.bias), address(layer.proj.bias)
            for name in ("qkv", "proj", "proj_in", "proj_out"):
                setattr(own, name, address(getattr(layer, name).weight, self.dtype))
            own.keys, own.values = layer.keys.data_ptr(), layer.values.data_ptr()
        self.cached, self.kept = cached, kept  # so that the addresses stay good
        self.rotary = cached.rotary.float().contiguous()

    def __call__(self, ids: Tensor, start: int, rows: slice) -> Tensor:
        """Return logits as ``CachedTransformer`` does, of one token for each of the first rows, ids (1, R)."""
        num_rows, _, length, _ = self.cached.layers[0].keys.shape
        assert not rows.start
        assert ids.shape[1] <= num_rows
        assert 0 <= start < length
        x = F.embedding(ids[0], self.cached.table)
        logits = x.new_empty(len(x), self.codebook_size)
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
        *_fields("floor head_floor", ctypes.c_float),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields("norm_attention norm_qk norm_mlp qkv_bias proj_bias", ctypes.c_void_p),
        *_fields("qkv proj proj_in proj_out keys values", ctypes.c_void_p),
    ]
