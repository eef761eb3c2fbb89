"""The step of a cached transformer in C++, for few rows on a CPU; compiled in a second, where it first runs."""

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
LANES = 16  # of the source
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
        x = F.embedding(ids[0], self.cached.table)
        logits = torch.empty(len(x), self.codebook_size)
        rotary, threads = self.rotary[start].data_ptr(), torch.get_num_threads()
        step = compiled(len(x), TYPES[self.dtype])
        step(self.network, self.layers, rotary, start, threads, x.data_ptr(), logits.data_ptr())
        return logits


@functools.cache
def compiled(num_rows: int, weight: str) -> Any:
    """Return the function `step` of the source, for this CPU: not kept, as other nodes may have another one."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "step.so"
        options = [*FLAGS.split(), f"-DROWS={num_rows}", f"-DWEIGHT={weight}", str(SOURCE), "-o", str(library)]
        try:
            subprocess.run([*shlex.split(compiler), *options], check=True, capture_output=True, text=True)
        except OSError as error:
            raise _failed(compiler, error.strerror) from None
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line]
            raise _failed(compiler, lines[0] if lines else f"exit status {error.returncode}") from None
        function = ctypes.CDLL(str(library)).step
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.POINTER(_Network), ctypes.POINTER(_Layer), pointer, number, number, pointer, pointer]
    function.restype = None
    return function


def _failed(compiler: str, reason: str | None) -> UserError:
    return UserError(
        f"compile=true on a CPU: the C++ compiler {compiler} failed: {reason}. Install g++, set CXX to a compiler with"
        " OpenMP, or set compile to false"
    )


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
