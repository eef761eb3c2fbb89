"""Checkpoints of earlier versions, made into what this version would have written: the only place that knows them."""

from __future__ import annotations

from typing import Any

STAGE_KEY = "aligntok_stage"
CHAIN_KEY = "tokenizer_chain"
OLD_DISCRIMINATOR, DISCRIMINATOR = "adversarial.", "loss.adversarial."
SWITCHES = {"checkpoint_activations", "gradient_checkpointing", "compile_blocks"}  # of a network; today of a run
MOVED_ARGUMENTS = {  # of a stage; today they are arguments of one of its parts
    "optimization": ("learning_rate", "optimizer", "max_nonfinite_steps"),
    "objective": ("time_sampling", "uniform_from", "cosine_weight"),
}


def migrate(checkpoint: dict[str, Any]) -> None:
    """Rename what has another name today, and add what was not written yet; today's checkpoints stay as they are."""
    for states in ("state_dict", "current_model_state"):  # the discriminator's weights have moved into the loss
        for key in [key for key in checkpoint.get(states, {}) if key.startswith(OLD_DISCRIMINATOR)]:
            checkpoint[states][DISCRIMINATOR + key.removeprefix(OLD_DISCRIMINATOR)] = checkpoint[states].pop(key)
    if "hyper_parameters" in checkpoint:
        checkpoint["hyper_parameters"] = regrouped(without_switches(checkpoint["hyper_parameters"]))
    if CHAIN_KEY not in checkpoint:  # the name of the stage told it
        stage = checkpoint.get(STAGE_KEY)
        learned = ["adapter", "quantizer", "decoder"]
        if stage != "LatentAlignment":
            learned.insert(0, "encoder")
        measured, causal = stage == "DecoderRefinement", stage == "CausalTokenization"
        checkpoint[CHAIN_KEY] = {"learned": learned, "measured": measured, "causal": causal}


def regrouped(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stage of ours with those in parts that are today parts' arguments."""
    if not str(arguments.get("_class_path")).startswith("aligntok.stages."):
        return arguments
    for part, names in MOVED_ARGUMENTS.items():
        found = {name: arguments.pop(name) for name in names if name in arguments}
        if found:
            arguments[part] = found
    guide = arguments.pop("guide", None)
    if guide is not None:
        guidance = arguments["guidance"] or {"class_path": "aligntok.flow.Guidance", "init_args": {}}
        arguments["guidance"] = guidance | {"init_args": guidance["init_args"] | {"guide": guide}}
    return arguments


def without_switches(recipe: Any) -> Any:
    """Return a recipe of classes and arguments without those that our networks no longer have."""
    if isinstance(recipe, list):
        return [without_switches(value) for value in recipe]
    if not isinstance(recipe, dict):
        return recipe
    parts = {key: without_switches(value) for key, value in recipe.items()}
    if str(parts.get("class_path")).startswith("aligntok.networks."):
        parts["init_args"] = {key: value for key, value in parts.get("init_args", {}).items() if key not in SWITCHES}
    return parts


def split_groups(
    checkpoint: dict[str, Any], names: dict[str, list[str]], halves: dict[str, dict[str, list[str]]]
) -> None:
    """Split an optimizer's groups where all weights decayed into those that decay and those that no longer do.

    Each weight keeps its moments.

    Args:
        checkpoint: Its optimizers and schedulers are changed.
        names: Of the parameters in each old group, in the optimizer's order.
        halves: For each old group, the names of the new ones and of the parameters in them.
    """
    for state, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
        old = {group["name"]: (index, group) for index, group in enumerate(state["param_groups"])}
        if old.keys() != names.keys():
            continue  # it is split already
        state["param_groups"], sources = [], []
        for group, parts in halves.items():
            index, saved = old[group]
            numbers = dict(zip(names[group], saved["params"], strict=True))
            for part, chosen in parts.items():
                decay = {} if part == group else {"weight_decay": 0.0}
                state["param_groups"].append({**saved, "name": part, "params": [numbers[n] for n in chosen], **decay})
                sources.append(index)
        for key in ("base_lrs", "_last_lr", "lr_lambdas"):
            scheduler[key] = [scheduler[key][index] for index in sources]
