"""Checkpoints of earlier versions: their keys become today's, so that they load and resume."""

from __future__ import annotations

from typing import Any

from aligntok.stages.optimization import NO_DECAY, Optimization, ParameterGroup

OLD_DISCRIMINATOR, DISCRIMINATOR = "adversarial.", "loss.adversarial."


def rename_discriminator(checkpoint: dict[str, Any]) -> None:
    """Move the discriminator's weights to where the loss holds them, also those beside an average."""
    for states in ("state_dict", "current_model_state"):
        if states in checkpoint:
            checkpoint[states] = {
                DISCRIMINATOR + key.removeprefix(OLD_DISCRIMINATOR) if key.startswith(OLD_DISCRIMINATOR) else key: value
                for key, value in checkpoint[states].items()
            }


def split_groups(checkpoint: dict[str, Any], optimization: Optimization, groups: dict[str, ParameterGroup]) -> None:
    """Split an optimizer's groups where all weights decayed into those that decay and those that no longer do.

    Each weight keeps its moments. The order of parameters within a group is that of ``groups``.
    """
    for state, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
        old = {group["name"]: (index, group) for index, group in enumerate(state["param_groups"])}
        if old.keys() != groups.keys():
            continue  # it is split already
        parts, sources = [], []
        for name, group in groups.items():
            index, saved = old[name]
            numbers = dict(zip(group.parameters, saved["params"], strict=True))
            for part, names in optimization.halves(name, group).items():
                decay = {"weight_decay": 0.0} if part.endswith(NO_DECAY) else {}
                parts.append({**saved, "name": part, "params": [numbers[n] for n in names], **decay})
                sources.append(index)
        state["param_groups"] = parts
        for key in ("base_lrs", "_last_lr", "lr_lambdas"):
            scheduler[key] = [scheduler[key][index] for index in sources]
