"""``aligntok`` and ``python -m aligntok``."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

PROGRAMS = {  # verb: function, imported when it is wanted
    "encode": "aligntok.programs.encode.encode_command",
    "sample": "aligntok.programs.sample.sample_command",
    "repair": "aligntok.programs.repair.repair_command",
    "import": "aligntok.programs.import_weights.import_command",
    "evaluate": "aligntok.programs.evaluate.evaluate_command",
    "report": "aligntok.programs.report.report_command",
}


def main(args: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    from aligntok.errors import UserError

    arguments = sys.argv[1:] if args is None else args
    try:
        silence()
        if arguments and arguments[0] in PROGRAMS:
            module, _, command = PROGRAMS[arguments[0]].rpartition(".")
            getattr(importlib.import_module(module), command)(arguments[1:])
        else:
            from aligntok.cli import run
            from aligntok.programs.repair import refuse_writers

            refuse_writers(arguments)
            run(args)
    except UserError as error:
        print(f"aligntok: error: {last_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def silence() -> None:
    """Drop the advice that does not concern our users."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("lightning.pytorch", "lightning.fabric"):  # its tips; warnings stay
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*in eval mode at the start.*",
        ".*You have overridden `on_before_batch_transfer`.*",
    ):
        warnings.filterwarnings("ignore", message)


def last_message(error: Exception) -> str:
    """Return the message; of an error that a data worker passed on, the last line of its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].split("UserError: ", 1)[-1]
    return text


if __name__ == "__main__":
    sys.exit(main())
