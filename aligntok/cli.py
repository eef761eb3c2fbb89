"""The command line: LightningCLI with shipped configs, layers of YAML, chained stages and short errors."""

from __future__ import annotations

import json
import re
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from pydoc import locate
from typing import Any

import lightning
import lightning.pytorch as pl
from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from omegaconf.errors import InterpolationKeyError

from aligntok.callbacks import ProgressBar, RunRecord, SaveCheckpoint
from aligntok.callbacks.trainer_io import AtomicCheckpointIO, MetricsCSV
from aligntok.errors import UserError
from aligntok.files import write_text
from aligntok.layers import read_configs, to_text, with_class
from aligntok.stages import Stage
from aligntok.weights.checkpoint import read_checkpoint

DESCRIPTION = """\
Train image tokenizers from pretrained vision encoders, and generators on their latents.

  aligntok fit --config stage1.yaml                              the first stage of AlignTok
  aligntok fit --config stage2.yaml --init_from STAGE1.ckpt      the next stage, from its weights
  aligntok fit --config stage2.yaml --ckpt_path last             go on where a run was cut off
  aligntok validate --config stage3.yaml --ckpt_path STAGE3.ckpt
  aligntok encode --config cache.yaml --tokenizer STAGE3.ckpt    cached latents of the training images
  aligntok sample --config dit.yaml --config sample.yaml --ckpt_path DIT.ckpt
                                                                 samples of a generator, PNG and .npz
  aligntok repair FOLDER                                         write again what is broken in such a folder
  aligntok import alitok AliTok.pth                              published weights as a checkpoint and a config
  aligntok evaluate SAMPLES --reference REFERENCE                FID and its companions of stored images
  aligntok report FOLDER                                         report.html of the runs in a folder

A config is a file, or the name of a shipped one; several --config are layers, later ones win."""


VERBS = {
    "fit": "Train a stage. Ends at trainer.max_steps; --ckpt_path last goes on with a run that was cut off.",
    "validate": "Measure a checkpoint on the validation images; writes validate.json into --output.",
    "test": "Measure a checkpoint on the test images (data.test, by default the validation images).",
    "predict": "Run a stage's predict_step over data.predict with a checkpoint.",
}


DATA = "aligntok.data.LatentDataModule"  # the class of `data:` where it names none
FOREIGN = {
    "fit": ("verbose", "return_predictions"),
    "validate": ("return_predictions",),
    "test": ("return_predictions",),
    "predict": ("verbose",),
}


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Keeps the lines of a description."""


class RunCLI(LightningCLI):
    """LightningCLI with an output folder, ``--init_from``, and nothing silent."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser."""
        kwargs = {"dump_header": [f"aligntok, lightning=={lightning.__version__}"], **kwargs}
        return super().init_parser(**kwargs, parser_mode="omegaconf+")  # values of other keys: ${data.init_args.x}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, its configs merged into one."""
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # a config's root is its verb's
        try:
            self.config = parser.parse_args(merge_layers(sys.argv[1:]))
        except InterpolationKeyError as error:
            key = str(error.full_key).partition(".")[2]
            other = re.sub(r".*resolved to '\w+\.([\w.]+)'.*", r"\1", str(error.msg), flags=re.DOTALL)
            raise UserError(f"{key} follows {other}, which is missing: give one of the two") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what Lightning lacks."""
        parser.add_argument(
            "--output", type=str, default="runs/default", help="Folder of the run: checkpoints, curves, images."
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Checkpoint of the previous stage, whose weights this stage starts from (its EMA, where it kept one).",
        )
        parser.add_argument(
            "--ema",
            type=float | None,
            default=None,
            help="Decay of the average to measure, of those that the run kept; 0: the raw weights. Not in fit.",
        )
        parser.add_argument(
            "--callbacks",
            type=dict[str, Callback | None],
            default={},
            help="Callbacks by name; null removes one. In a list, without names: trainer.callbacks.",
        )
        parser.link_arguments("output", "trainer.default_root_dir")

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint's hyperparameters overrule command line and YAML."""

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a dataset of another library says of its files is a user's error too."""
        try:
            super().instantiate_classes()
        except OSError as error:
            raise UserError(f"{error.strerror or error}: {error.filename or 'see the paths in the config'}") from error
        except (RuntimeError, ValueError) as error:
            ours = cause_of_user(error)
            if ours is None and "Dataset not found" not in str(error):
                raise
            raise UserError(str(ours or f"data: {error}")) from error

    def before_instantiate_classes(self) -> None:
        """Resolve ``--ckpt_path``, and refuse to write over another run."""
        config = self.config[self.subcommand]
        config.weights_only = True  # our CheckpointIO does so anyway; said here, Lightning does not wonder
        last = Path(config.output) / "checkpoints" / "last.ckpt"
        if config.get("ckpt_path") == "last":
            config.ckpt_path = str(last) if last.is_file() else None
            if config.ckpt_path is None and self.subcommand != "fit":
                raise UserError(
                    f"--ckpt_path last: there is no {last}. Name a checkpoint, or the run's folder with --output"
                )
            if config.ckpt_path is None:
                print(f"--ckpt_path last: no {last} yet, the run starts from the beginning", flush=True)
        elif self.subcommand == "fit" and config.get("ckpt_path") is None and last.is_file():
            raise UserError(
                f"{config.output} already holds a run: go on with it by --ckpt_path last, or give another --output"
            )
        stage: Any = locate(config.model.class_path)
        starts = self.subcommand == "fit" and not config.get("ckpt_path") and not config.init_from
        if starts and getattr(stage, "needs_previous", False):
            raise UserError(f"{stage.__name__} starts from a previous stage: add --init_from CHECKPOINT of that stage")
        if config.ema is not None and self.subcommand == "fit":
            raise UserError("--ema is of validate, test and predict: fit goes on with all weights that the run kept")
        if config.get("ckpt_path"):
            read_checkpoint(config.ckpt_path, ema=config.ema)  # names what is wrong with it before anything is built
        elif self.subcommand != "fit" and not config.init_from:
            raise UserError(f"aligntok {self.subcommand} needs the weights: --ckpt_path CHECKPOINT")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Give the trainer the named callbacks, our checkpoint writer and the loggers of the run's folder.

        Their order is of no meaning: Lightning calls those that write checkpoints last.
        """
        config = self.config_init[self.subcommand]
        trainer, output = config.trainer, config.output
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        loggers: list[Logger] | bool = False
        if self.subcommand == "fit" and not trainer.fast_dev_run:
            loggers = [TensorBoardLogger(output, name="", version=""), MetricsCSV(output)]
        if trainer.logger not in (None, True):
            loggers = trainer.logger
        listed = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        callbacks = [callback for callback in (*config.callbacks.values(), *listed) if callback is not None]
        if self.subcommand != "fit":  # nothing to save, no learning rate to watch
            callbacks = [c for c in callbacks if not isinstance(c, (Checkpoint, LearningRateMonitor))]
            kwargs["enable_checkpointing"] = False
        elif trainer.enable_checkpointing is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks.append(SaveCheckpoint())
        if trainer.enable_progress_bar is not False and not any(isinstance(c, TQDMProgressBar) for c in callbacks):
            callbacks.append(ProgressBar())
        return super().instantiate_trainer(
            callbacks=[*callbacks, RunRecord()],
            plugins=[*plugins, AtomicCheckpointIO(config.ema)],
            logger=loggers,
            **kwargs,
        )

    def after_instantiate_classes(self) -> None:
        """Take the previous stage's weights."""
        config = self.config[self.subcommand]
        if config.init_from and not config.get("ckpt_path"):
            if not isinstance(self.model, Stage):
                raise UserError(f"--init_from has no effect on {type(self.model).__name__}: it is no stage of aligntok")
            self.model.init_from(config.init_from)

    def after_validate(self) -> None:
        """Keep the measures."""
        self.keep_measures("validate")

    def after_test(self) -> None:
        """Keep the measures."""
        self.keep_measures("test")

    def keep_measures(self, verb: str) -> None:
        """Write the measures to ``validate.json`` or ``test.json`` in the output folder."""
        if self.trainer.is_global_zero:
            values = {name: round(float(value), 6) for name, value in sorted(self.trainer.callback_metrics.items())}
            record = {"checkpoint": self._get(self.config, "ckpt_path"), "metrics": values}
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            conditions = [c.conditions for c in callbacks if getattr(c, "conditions", "")]
            if conditions:
                record["conditions"] = conditions[0]
            write_text(Path(self._get(self.config, "output")) / f"{verb}.json", json.dumps(record, indent=1))


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder; an earlier attempt's becomes ``config.1.yaml`` and so on."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it when the work starts."""
        if stage != "fit":
            return
        folder = Path(trainer.default_root_dir)
        path = folder / "config.yaml"
        if trainer.is_global_zero and not self.already_saved:
            text = self.parser.dump(self.config, skip_none=False)
            if path.is_file() and path.read_text() != text:
                path.rename(folder / f"config.{len(list(folder.glob('config.*.yaml'))) + 1}.yaml")
            write_text(path, text)
        self.already_saved = True


def cause_of_user(error: BaseException | None) -> UserError | None:
    """Return the user's error that another one came from, if there is any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


class Parser(LightningArgumentParser):
    """Prints errors without the usage block."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a user's error, shortened; a parser within a parser passes it on as it is."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(short_message(message)) from ex


def short_message(message: str) -> str:
    """Return jsonargparse's message in a line or two: the key and the innermost problem."""
    text = " ".join(message.split())
    unknown = re.search(
        r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|Key '([^']+)' is not expected", text
    )
    if unknown:
        key = next(name for name in unknown.groups() if name)
        where = [name for name in re.findall(r'Parser key "([\w.]+)"', text[: unknown.start()]) if name != key]
        return f"unknown key '{key}'" + (f" in {'.'.join(where)}" if where else "") + ": see --help, or --print_config"
    required = re.search(r"(?:class_path '([\w.]+)': [^:]*)?are required: ([\w.]+(?:, [\w.]+)*)", text)
    if required:
        keys = re.sub(r"\b(fit|validate|test|predict)\.", "", required[2])
        where = re.findall(r'Parser key "([\w.]+)"', text[: required.start()])
        keys = f"{'.'.join(where)} ({required[1]}) needs {keys}" if required[1] else f"{keys} is missing"
        return f"{keys}. Add the missing layers (stage, size, data), or start from a recipe such as stage1.yaml"
    return text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"


def run(args: list[str] | None = None) -> RunCLI:
    """Parse and run one command.

    Raises:
        UserError: What the user can mend.
    """
    sys.argv[1:] = sys.argv[1:] if args is None else args  # where processes that Lightning launches look for them
    return RunCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={
            "description": DESCRIPTION,
            "formatter_class": HelpFormatter,
            **{verb: {"description": text} for verb, text in VERBS.items()},
        },
        auto_configure_optimizers=False,
        trainer_defaults={"enable_model_summary": False},
    )


def merge_layers(arguments: list[str]) -> list[str]:
    """Return a command with all its configs as one, before the rest: the command line overrules YAML in any order."""
    names: list[str] = []
    others: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-c", "--config"):
            names.append(next(rest, ""))
        elif argument.startswith("--config="):
            names.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    if not names:
        return arguments
    config = read_configs(*names)
    if isinstance(config.get("data"), dict):
        config["data"] = with_class(config["data"], DATA)
    for key in FOREIGN.get(arguments[0], ()):
        config.pop(key, None)  # of another command, in a run's saved config.yaml
    return [arguments[0], "--config", to_text(config), *others]
