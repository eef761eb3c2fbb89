"""Networks that only measure: never trained, never averaged, never written into a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network still: eval mode, no gradients to its weights, shared by copies, absent from ``state_dict``.

    Gradients still flow through it to its input. Its weights come from where the network was built (a hub, a file) or
    from whoever owns it, so that checkpoints stay small and load strictly.

    Args:
        network: The network to hold.
    """

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_load_state_dict_pre_hook(_bring_own_weights)  # type: ignore[no-untyped-call]  # torch's is untyped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
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
        """Return itself: what never changes needs no second copy (an averaged model shares it)."""
        return self


def _bring_own_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a strict load of the owner pass: offer the weights that are already there."""
    own: dict[str, Tensor] = nn.Module.state_dict(module)
    state_dict.update({prefix + key: value for key, value in own.items()})
