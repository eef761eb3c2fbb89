"""Networks that only measure: never trained, never averaged, never written into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network still: eval mode, no gradients to its weights, shared by copies, absent from ``state_dict``.

    Gradients still flow through it to its input. Checkpoints stay small and load strictly: its weights come from where
    the network was built.

    A network whose published weights may have to be downloaded is given as the function that builds it; ``load`` or the
    first use calls it. Such a network is no submodule, so it is in no parameter count and no average either.

    >>> judge = Frozen(lambda: nn.Linear(2, 2))
    >>> len(list(judge.parameters()))
    0
    >>> judge.on(torch.device("cpu"))
    Linear(in_features=2, out_features=2, bias=True)

    Args:
        network: The network to hold, or a function that builds it.
    """

    network: Any

    def __init__(self, network: nn.Module | Callable[[], nn.Module]) -> None:
        super().__init__()
        self.build: Callable[[], nn.Module] | None = None
        if isinstance(network, nn.Module):
            self.network = network.eval().requires_grad_(False)
        else:
            self.build = network
        self.register_load_state_dict_pre_hook(_bring_own_weights)  # type: ignore[no-untyped-call]  # torch's is untyped

    def load(self) -> None:
        """Build the network now, if that was left for later."""
        if self.build is not None:
            self.__dict__["network"] = self.build().eval().requires_grad_(False)  # past torch, which would register it
            self.build = None

    def on(self, device: torch.device) -> Any:
        """Return the network, on this device."""
        self.load()
        weight = next(self.network.parameters(), None)
        return self.network if weight is None or weight.device == device else self.network.to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        self.load()
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode whatever ``mode`` says."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Stay without gradients whatever ``requires_grad`` says."""
        return super().requires_grad_(False)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Add nothing to ``destination``."""
        return {} if destination is None else destination

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        """Return itself: what never changes needs no second copy."""
        return self


def load_frozen(module: nn.Module) -> None:
    """Build the frozen networks inside a module that were left for later: a missing file then stops a run early.

    Raises:
        UserError: Published weights are nowhere and cannot be downloaded; says which file to put where.
    """
    for part in module.modules():
        if isinstance(part, Frozen):
            part.load()


def _bring_own_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a strict load of the owner pass: offer the weights that are already there."""
    own: dict[str, Tensor] = nn.Module.state_dict(module)
    state_dict.update({prefix + key: value for key, value in own.items()})
