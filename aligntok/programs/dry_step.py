"""A training step on tensors without memory: its FLOPs, and the bytes that it would hold, on any machine in seconds."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from aligntok.networks.codebook import HOST_DEVICES
from aligntok.networks.frozen import Frozen
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.stages import Stage

CPU, aten = torch.device("cpu"), torch.ops.aten
FORMULAS = {  # torch's; its attention on the CPU has none, and is counted as that on a GPU
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
IN_FLOAT32 = (  # by autocast on a GPU, and not on a CPU: of torch's list what networks use
    *("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax"),
    *("cosine_similarity", "mse_loss", "l1_loss", "cross_entropy"),
)


class StepCost(NamedTuple):
    """What a training step takes on one device.

    Attributes:
        flops: Of forward and backward pass, by torch's formulas: matmuls, convolutions, attention.
        activations: Bytes at the peak, beside weights, gradients, optimizer and averages.
    """

    flops: int
    activations: int


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts FLOPs, and the bytes of what lives at the same time.

    >>> with Meter() as meter: _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> meter.flops, meter.peak  # float32: 6 + 12 + 8 numbers
    (48, 104)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.live = self.peak = 0
        self.known: dict[int, Any] = {}  # storages, by address

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = FORMULAS.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: Tensor, counts: bool = True) -> None:
        """Count a tensor's storage as long as it lives, once."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes() if counts else 0
        if address not in self.known:

            def forget(_: Any) -> None:
                self.live -= size
                del self.known[address]

            self.known[address] = weakref.ref(storage, forget)
            self.live += size
            self.peak = max(self.peak, self.live)


class DryStage:
    """A stage that was built on the meta device, and its training step at any batch, without memory.

    Args:
        stage: Its parameters are replaced; no other use is left for it.
        batch: Makes a batch of so many images, a dict of tensors.
    """

    def __init__(self, stage: Stage, batch: Callable[[int], dict[str, Tensor]]) -> None:
        self.stage, self.batch, self.mode = stage.train(), batch, FakeTensorMode(allow_non_fake_inputs=True)
        self.weights = [*stage.parameters(), *stage.buffers()]
        late = [m.network for m in stage.modules() if isinstance(m, Frozen) and "network" in m.__dict__]
        replaced: dict[int, Tensor] = {}  # some are in two modules
        for module in [part for root in (stage, *late) for part in root.modules()]:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and not isinstance(tensor, FakeTensor):
                        tensors[name] = replaced.setdefault(id(tensor), self.fake(tensor))
            if isinstance(module, VectorQuantizer):
                module.may_start = False  # k-means looks at values
        self.weights = list(replaced.values())

    def fake(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape on the CPU, for all that torch knows."""
        with torch.no_grad():
            fake = FakeTensor(self.mode, tensor.detach().to("meta"), CPU)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def cost(self, count: int, step: int, bf16: bool, gpu: bool = True) -> StepCost:
        """Return what a step takes.

        Args:
            count: Images.
            step: Optimizer step: losses may come and go over a run.
            bf16: Whether under autocast to bfloat16.
            gpu: Whether with a GPU's autocast, or with a CPU's.
        """
        meter, size = Meter(), sum(p.nbytes for p in self.stage.parameters() if p.requires_grad)
        for weight in self.weights:
            meter.note(weight, counts=False)
        with at_step(self.stage, step), as_on_a_gpu(gpu), self.mode, meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss: Any = self.stage.training_step(self.batch(count), 0)
            forward, meter.peak = meter.peak, 0
            loss.backward()
        self.stage.zero_grad()
        return StepCost(meter.flops, max(forward, meter.peak - size))  # the last gradients live until the forward ends


@contextmanager
def at_step(stage: Stage, step: int) -> Iterator[None]:
    """Let a stage that no trainer runs believe that it is at a step, and log nothing."""
    kind, log = type(stage), lambda *args, **kwargs: None
    stand_in = {"global_step": step, "device": CPU, "log": log, "log_dict": log}
    stage.__class__ = type(kind.__name__, (kind,), stand_in)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy to the meta device; autocast without its device
            yield
    finally:
        stage.__class__ = kind


@contextmanager
def as_on_a_gpu(precision: bool = True) -> Iterator[None]:
    """Let the CPU go the ways of a GPU.

    The search for codes looks at values on a CPU, and here are none. Autocast to bfloat16 computes norms and losses in
    float32 on a GPU alone, with ``precision`` also here: by other functions in the place of torch's, for torch has no
    autocast of a GPU that is not there.
    """
    theirs = {name: getattr(F, name) for name in IN_FLOAT32 * precision}
    HOST_DEVICES.discard("cpu")
    for name, function in theirs.items():
        setattr(F, name, partial(in_float32, function))
    try:
        yield
    finally:
        HOST_DEVICES.add("cpu")
        for name, function in theirs.items():
            setattr(F, name, function)


def in_float32(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; under autocast with its bfloat16 tensors in float32."""
    if torch.is_autocast_enabled("cpu"):
        args, kwargs = tree_map(
            lambda x: x.float() if getattr(x, "dtype", None) == torch.bfloat16 else x, (args, kwargs)
        )
    return function(*args, **kwargs)
