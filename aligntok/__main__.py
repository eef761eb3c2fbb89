"""``aligntok`` and ``python -m aligntok``: one table of verbs, each imported when it is wanted."""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from aligntok import __version__, preemption
from aligntok.errors import UserError
from aligntok.layers import check_configs

VERBS = {  # verb: function that takes the words after it, and a line of help
    "new": ("aligntok.programs.new.new_command", "choose a config for a folder of images, and print why"),
    "plan": ("aligntok.cli.plan_command", "print what a fit takes: memory, FLOPs, files; --check opens all of them"),
    "fetch": ("aligntok.programs.fetch.fetch_command", "bring the published weights of configs beforehand"),
    "fit": ("aligntok.cli.fit_command", "train a stage; --ckpt_path last goes on with a run that was cut off"),
    "validate": ("aligntok.cli.validate_command", "measure a checkpoint on the validation images: validate.json"),
    "test": ("aligntok.cli.test_command", "measure a checkpoint on the test images, data.test: test.json"),
    "predict": ("aligntok.cli.predict_command", "run a stage's predict_step over data.predict"),
    "encode": ("aligntok.programs.encode.encode_command", "cache the latents or tokens of images in a folder"),
    "sample": ("aligntok.programs.sample.sample_command", "draw samples of a generator as files, PNG and .npz"),
    "repair": ("aligntok.programs.repair.repair_command", "write again what is broken in a folder of these two"),
    "import": (
        "aligntok.programs.import_weights.import_command",
        "turn published weights into a checkpoint and a config",
    ),
    "evaluate": ("aligntok.programs.evaluate.evaluate_command", "measure stored images: FID and its companions"),
    "demo": (
        "aligntok.programs.demo.demo_command",
        "show a generator or a tokenizer in the browser; needs aligntok[demo]",
    ),
    "chain": ("aligntok.programs.chain.chain_command", "run commands one after another; finished ones are skipped"),
    "submit": (
        "aligntok.programs.submit.submit_command",
        "write sbatch files for a fit or a chain, and submit them to Slurm",
    ),
    "report": ("aligntok.programs.report.report_command", "report.html of the runs in a folder"),
}

HELP = """\
usage: aligntok VERB [options]     aligntok VERB --help     aligntok --version

Train image tokenizers from pretrained vision encoders, and generators on their latents.

{verbs}

  aligntok fit --config stage1.yaml                              the first stage of AlignTok
  aligntok fit --config stage2.yaml --init_from STAGE1.ckpt      the next stage, from its weights
  aligntok encode --config cache.yaml --tokenizer STAGE3.ckpt    cached latents of the training images
  aligntok fit --config dit.yaml                                 a generator on them
  aligntok sample --config dit.yaml --config sample.yaml --ckpt_path DIT.ckpt

A config is a file, or the name of a shipped one; several --config are layers, later ones win."""

UNREAD = 141  # exit code, as a shell reports it: 128 + SIGPIPE
SAVE_THEMSELVES = ("fit", "encode", "sample", "chain")  # verbs that a signal ends where nothing is lost


def main(args: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2; 143: saved, not finished."""
    verb, *arguments = (sys.argv[1:] if args is None else args) or [""]
    with preemption.listening(ends=args is None) if verb in SAVE_THEMSELVES else nullcontext():
        return run(verb, arguments)


def run(verb: str, arguments: list[str]) -> int:
    """Run a verb and return the exit code."""
    try:
        if verb in ("-h", "--help"):
            print(HELP.format(verbs="\n".join(f"  {name:<10}{line}" for name, (_, line) in VERBS.items())))
        elif verb == "--version":
            print(f"aligntok {__version__}")
        elif verb in VERBS:
            for line in check_configs(arguments):  # a wrong name need not wait for torch
                print(line, file=sys.stderr)
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            module, _, command = VERBS[verb][0].rpartition(".")
            gc.disable()  # nothing that modules define is garbage, and to look through it takes a tenth of the import
            function = getattr(importlib.import_module(module), command)
            gc.enable()
            silence()  # after the import, in which Lightning sets its loggers to speak
            function(arguments)
        else:
            problem = f"there is no verb '{verb}'" if verb else "a verb is missing"
            raise UserError(f"{problem}: give one of {', '.join(VERBS)}, or see aligntok --help")
    except UserError as error:
        print(f"aligntok: error: {last_message(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if is_read():
            raise
        return UNREAD
    except OSError as error:  # of somebody else's writer, as TensorBoard's; ours name their file
        if not of_full_disk(error):
            raise
        print("aligntok: error: the disk is full: free some space, then go on (fit: --ckpt_path last)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return preemption.INTERRUPTED
    except preemption.Preempted as end:
        return int(str(end.code))
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's Trainer caught it, and ends with 1
            return preemption.INTERRUPTED
        raise
    return 0


def is_read() -> bool:
    """Whether somebody reads what is printed; else (``| head``) nothing is printed from now on."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def silence() -> None:
    """Drop the advice that does not concern our users."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # its tips; warnings stay
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*in eval mode at the start.*",
        ".*`srun` command is available.*",
        ".*You have overridden `on_before_batch_transfer`.*",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", module="PIL")  # what it thinks of a photo's metadata, or of its size
    threading.excepthook = report_of_thread


def report_of_thread(args: threading.ExceptHookArgs, show: Callable[[Any], object] = threading.excepthook) -> None:
    """Show the error of a thread; of a full disk, as TensorBoard's writer finds it, the run's next write tells."""
    if not of_full_disk(args.exc_value):
        show(args)


def of_full_disk(error: BaseException | None) -> bool:
    """Whether an error says that there is no room, or no more for this user."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def last_message(error: Exception) -> str:
    """Return the message; of an error that a data worker passed on, the last line of its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].split("UserError: ", 1)[-1]
    return text


if __name__ == "__main__":
    sys.exit(main())
