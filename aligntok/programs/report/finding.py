"""What the numbers say, in sentences that turn with the numbers."""

from __future__ import annotations

import re

from aligntok.programs.report.runs import ENCODER, Run, setting, wrote

SAME_DB = 0.05  # ours: a PSNR difference below this is not worth a word
SAME_SHARE = 0.0005  # an accuracy is shown to 0.1 %
KEPT = 0.9  # ours: from this share of the probe on, it is "kept"
NEAR = 1.1  # ours: a Fréchet distance up to this factor above another is near it
DASH = "\N{EN DASH}"  # where a number is missing


def headline(runs: list[Run]) -> str:
    """Return the one sentence above the report."""
    measured = [run for run in tokenizers(runs) if run.value("val/psnr") is not None]
    if not measured:
        return without_tokenizer(runs)
    if len({run.measured_on() for run in measured}) > 1:
        return "These runs were validated on different images: their numbers stand side by side but do not compare."
    second = of_stage(measured, "PerceptualAlignment")
    if len(second) == 1 and stage1_of(second[0], measured):
        return about_stage2(second[0], measured)
    if len(measured) == 1:
        return about_one(measured[0], measured)
    best = max(measured, key=lambda run: run.value("val/psnr") or 0)
    text = f"Of {len(measured)} tokenizers, {label(best, measured)} reconstructs best ({best.value('val/psnr'):.1f} dB)"
    probed = [run for run in measured if run.value("val/probe") is not None]
    if not probed:
        return text + "."
    top = max(probed, key=lambda run: run.value("val/probe") or 0)
    who = "and also has" if top is best else f"and {label(top, measured)} has"
    return f"{text}, {who} the best linear probe ({percent(top.value('val/probe'))})."


def more_findings(runs: list[Run]) -> list[str]:
    """Return what else is worth a sentence; nothing on tokenizers that do not compare."""
    generated = about_generators(runs)
    if generated and headline(runs) == generated[0]:
        generated = generated[1:]
    return [*about_tokenizers(runs), *generated]


def about_tokenizers(runs: list[Run]) -> list[str]:
    """Return what the headline does not say of the tokenizers."""
    measured = [run for run in tokenizers(runs) if run.value("val/psnr") is not None]
    if len({run.measured_on() for run in measured}) > 1:
        return []
    second = of_stage(measured, "PerceptualAlignment")
    sentences = [about_stage2(run, measured) for run in second if len(second) > 1 and stage1_of(run, measured)]
    for run in second if len(second) == 1 else []:
        first = stage1_of(run, measured)
        sentences += [*frechet(run, first, measured), *control_probe(run, measured), *pooled_probe(run, first)]
    return sentences + [
        about_stage3(run, measured) for run in of_stage(measured, "DecoderRefinement") if run.parent in measured
    ]


def without_tokenizer(runs: list[Run]) -> str:
    """Return the sentence for a folder where no tokenizer was measured."""
    for sentence in about_generators(runs):
        return sentence
    for run in of_stage(runs, "EncoderPretraining"):
        if run.value("val/accuracy") is not None:
            right = percent(run.value("val/accuracy"))
            return f"No tokenizer was measured yet; the encoder classifies {right} of the validation images correctly."
    return "No run has been measured yet."


def about_one(run: Run, runs: list[Run]) -> str:
    """Return the sentence on a single tokenizer."""
    text = f"{capital(label(run, runs))} reconstructs at {run.value('val/psnr'):.1f} dB"
    probe = run.value("val/probe")
    return (
        f"{text}, and a linear probe on its latents is right on {percent(probe)}." if probe is not None else f"{text}."
    )


def about_stage2(run: Run, runs: list[Run]) -> str:
    """Return stage 2 against stage 1, against stage 1 trained on, and what it costs the probe."""
    first, control = stage1_of(run, runs), control_of(run, runs)
    assert first is not None
    gain = difference(run, first, "val/psnr")
    text = f"{capital(label(run, runs))} reconstructs {better(gain)} {label(first, runs)}"
    if control is not None:
        over = difference(run, control, "val/psnr")
        joint = "and" if sign(gain) == sign(over) else "but"
        text += f", {joint} {better(over)} {control_words(control, run)}"
    before, after = first.value("val/probe"), run.value("val/probe")
    if before is None or after is None or before <= 0:
        return text + "."
    pair = f"({percent(before)} → {percent(after)})"
    share = f"{100 * after / before:.0f} %"
    if abs(after - before) < SAME_SHARE:
        return f"{text}; the linear probe stays at {percent(after)}."
    if after > before:
        return f"{text}; the linear probe rises {pair}."
    verb = "keeps" if after / before >= KEPT else "falls to"
    return f"{text}; the linear probe {verb} {share} of {label(first, runs)}'s accuracy {pair}."


def about_stage3(run: Run, runs: list[Run]) -> str:
    """Return stage 3 against the run whose decoder it refines."""
    assert run.parent is not None
    text = f"{capital(label(run, runs))}, which trains the decoder alone, reconstructs "
    text += f"{better(difference(run, run.parent, 'val/psnr'))} {label(run.parent, runs)}"
    before, after = run.parent.value("val/probe"), run.value("val/probe")
    if before is None or after is None:
        return text + "."
    if abs(after - before) < SAME_SHARE:
        return f"{text}; the latents do not move, so the probe stays at {percent(after)}."
    return f"{text}; the linear probe reads {percent(after)} after {percent(before)}."


def frechet(run: Run, first: Run | None, runs: list[Run]) -> list[str]:
    """Return the Fréchet distances against stage 1, one sentence each."""
    sentences = []
    for name in sorted(run.metrics) if first else []:
        if name.startswith("val/rf") and first and (pair := (first.value(name), run.value(name))) and None not in pair:
            verb = "falls" if pair[1] < pair[0] else "rises" if pair[1] > pair[0] else "stays the same"  # type: ignore[operator]
            sentences.append(
                f"{frechet_name(name)} (lower is better) {verb} from {label(first, runs)} to {label(run, runs)}: "
                f"{pair[0]:.3g} → {pair[1]:.3g}."
            )
    return sentences


def about_generators(runs: list[Run]) -> list[str]:
    """Return what a single generator draws, and at how many steps; of several, which has the lowest distance."""
    generators = [run for run in runs if run.is_generator]
    names = generation_distances(generators)
    measured = [run for run in generators if names and run.value(names[0]) is not None]
    if len(measured) == 1:
        return [about_generator(measured[0], names[0], runs), *about_steps(measured[0], names[0])]
    if not measured or len({run.measured_on() for run in measured}) > 1:
        return []
    first, second, *_ = sorted(measured, key=lambda run: run.value(names[0]) or 0.0)
    return [
        f"Of {len(measured)} generators {origin(first, runs)} has the lowest {frechet_name(names[0])}:"
        f" {first.value(names[0]):.3g}, then {origin(second, runs)} with {second.value(names[0]):.3g}."
    ]


def about_generator(run: Run, name: str, runs: list[Run]) -> str:
    """Return how many samples are what was asked for, and the Fréchet distance ``name``."""
    steps = f" at {run.sampling_steps:,} sampling steps" if run.sampling_steps else ""
    distance = f"{frechet_name(name)} is {run.value(name):.3g}{steps}"
    agreement = run.value("val/class_agreement")
    if agreement is None:
        return f"Samples of {origin(run, runs)}: {distance}."
    classifier = setting(run.callback("GenerationQuality"), "classifier", "init_args", "path")
    judge = next((other for other in runs if other.value("val/accuracy") and wrote(other, classifier)), None)
    known = f", which is right on {percent(judge.value('val/accuracy'))} of the validation images" if judge else ""
    return (
        f"Of {run.num_samples} samples of {origin(run, runs)}, {percent(agreement)} are what was asked for, by a"
        f" classifier trained on real images{known}; {distance}."
    )


def about_steps(run: Run, name: str) -> list[str]:
    """Return how few sampling steps do."""
    tried = run.sweep(name)
    if len(tried) < 2:
        return []
    steps, best = min(tried, key=lambda point: point[1])
    fewest, near = next(point for point in tried if point[1] <= NEAR * best)
    if fewest == steps:
        return [
            f"Of {len(tried)} numbers of sampling steps, {steps:,} has the lowest {frechet_name(name)} ({best:.3g})."
        ]
    return [
        f"{fewest:,} sampling steps come within {100 * (NEAR - 1):.0f} % of the lowest {frechet_name(name)}:"
        f" {near:.3g} against {best:.3g} at {steps:,}."
    ]


def generation_distances(runs: list[Run]) -> list[str]:
    """Return the names of the Fréchet distances of samples."""
    names = {name for run in runs for name in (*run.metrics, *(key for row in run.rows for key in row))}
    return sorted(name for name in names if re.match(r"val/g(fid$|fd_)", name) and not re.search(r"_steps\d+$", name))


def origin(run: Run, runs: list[Run]) -> str:
    """Return a generator's name and whose latents it learned."""
    return label(run, runs) + (f" on the latents of {label(run.tokenizer, runs)}" if run.tokenizer else "")


def control_probe(run: Run, runs: list[Run]) -> list[str]:
    """Return the probe against stage 1 trained on."""
    control = control_of(run, runs)
    gap = difference(run, control, "val/probe") if control else None
    if control is None or gap is None:
        return []
    than = control_words(control, run)
    if abs(gap) < SAME_SHARE:
        return [f"The probe of {label(run, runs)} equals that of {than}."]
    side = "above" if gap > 0 else "below"
    return [f"The probe of {label(run, runs)} lies {100 * abs(gap):.1f} points {side} that of {than}."]


def pooled_probe(run: Run, first: Run | None) -> list[str]:
    """Return what the probe sees of latents averaged over the grid."""
    pair = (first.value("val/probe_pooled") if first else None, run.value("val/probe_pooled"))
    if pair[0] is None or pair[1] is None:
        return []
    return [f"On latents averaged over the grid the probe goes {percent(pair[0])} → {percent(pair[1])}."]


def tokenizers(runs: list[Run]) -> list[Run]:
    """Return the runs that train a tokenizer."""
    return [run for run in runs if run.stage != ENCODER and not run.is_generator]


def of_stage(runs: list[Run], stage: str) -> list[Run]:
    """Return the runs of a stage."""
    return [run for run in runs if run.stage == stage]


def is_control(run: Run) -> bool:
    """Tell whether it is a stage 1 that goes on from a stage 1."""
    return run.stage == "LatentAlignment" and run.init_from is not None


def stage1_of(run: Run, runs: list[Run]) -> Run | None:
    """Return the stage 1 that a run started from, or the only one there is where its config does not say."""
    if run.parent is not None:
        return run.parent if run.parent.stage == "LatentAlignment" and run.parent in runs else None
    firsts = [other for other in of_stage(runs, "LatentAlignment") if not is_control(other)]
    return firsts[0] if len(firsts) == 1 and run.init_from is None else None


def control_of(run: Run, runs: list[Run]) -> Run | None:
    """Return the run that went on with stage 1 from where this one began, the nearest in length."""
    siblings = [other for other in runs if other is not run and other.parent is run.parent]
    if run.parent is None:
        siblings = [other for other in siblings if other.init_from == run.init_from]
    controls = [other for other in siblings if is_control(other)]
    return min(controls, key=lambda other: abs(other.steps - run.steps), default=None)


def control_words(control: Run, run: Run) -> str:
    """Return what a control is, in words."""
    if control.steps == run.steps:
        return "training stage 1 for as many more steps"
    return f"training stage 1 for {control.steps:,} more steps (against {run.steps:,})"


def label(run: Run, runs: list[Run]) -> str:
    """Return the stage's number where that is clear, else the run's name."""
    numbers = {"LatentAlignment": 1, "PerceptualAlignment": 2, "DecoderRefinement": 3, "CausalTokenization": 1}
    if run.parent is not None and run.parent.stage == "CausalTokenization":
        numbers["DecoderRefinement"] = 2
    same = [other for other in runs if other.stage == run.stage and is_control(other) == is_control(run)]
    if run.stage not in numbers or len(same) > 1 or is_control(run):
        return f"“{run.name}”"
    return f"stage {numbers[run.stage]}"


def difference(run: Run, other: Run, name: str) -> float | None:
    """Return by how much a measure of the first is above that of the second."""
    mine, theirs = run.value(name), other.value(name)
    return None if mine is None or theirs is None else mine - theirs


def sign(gain: float | None) -> int:
    """Return the direction of a PSNR difference, 0 where it is none worth a word."""
    return 0 if gain is None or abs(gain) < SAME_DB else 1 if gain > 0 else -1


def better(gain: float | None) -> str:
    """Return a PSNR difference in words."""
    assert gain is not None
    if sign(gain) == 0:
        return f"as well (within {SAME_DB} dB) as"
    size = f"{abs(gain):.1f}" if abs(gain) >= 2 * SAME_DB else f"{abs(gain):.2f}"
    return f"{size} dB {'better' if gain > 0 else 'worse'} than"


def frechet_name(name: str) -> str:
    """Return the name of a Fréchet distance for people: ``val/gfd_digits`` is gFD (digits)."""
    kind, _, features = name.removeprefix("val/").partition("_")
    return kind[0] + kind[1:].upper() + (f" ({features})" if features else "")


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return DASH if share is None else f"{100 * share:.1f} %"


def capital(text: str) -> str:
    """Return the text with a capital letter in front."""
    return text[:1].upper() + text[1:]
