"""``aligntok`` and ``python -m aligntok``."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def main(args: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    from aligntok.errors import UserError

    arguments = sys.argv[1:] if args is None else args
    try:
        if arguments[:1] == ["report"]:
            from aligntok.programs.report import report_command

            report_command(arguments[1:])
            return 0
        from aligntok.cli import repair_command, run

        silence()
        if arguments[:1] == ["repair"]:
            repair_command(arguments[1:])
        elif arguments[:1] == ["import"]:
            from aligntok.importing import import_command

            import_command(arguments[1:])
        elif arguments[:1] == ["evaluate"]:
            from aligntok.evaluate import evaluate_command

            evaluate_command(arguments[1:])
        else:
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
