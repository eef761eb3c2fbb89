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
import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from aligntok.callbacks import ProgressBar, RunRecord, SaveCheckpoint
from aligntok.callbacks.trainer_io import AtomicCheckpointIO, MetricsCSV
from aligntok.data import LatentDataModule
from aligntok.errors import UserError
from aligntok.files import write_text
from aligntok.layers import LAYERS, find_config, is_shipped
from aligntok.stages import Stage
from aligntok.weights.checkpoint import read_checkpoint

DESCRIPTION = """\
Train image tokenizers from pretrained vision encoders, and generators on their latents.

  aligntok fit --config stage1.yaml                              the first stage of AlignTok
  aligntok fit --config stage2.yaml --init_from STAGE1.ckpt      the next stage, from its weights
  aligntok fit --config stage2.yaml --ckpt_path last             go on where a run was cut off
  aligntok validate --config stage3.yaml --ckpt_path STAGE3.ckpt
  aligntok predict --config stage3.yaml --config cache.yaml --ckpt_path STAGE3.ckpt --output FOLDER
                                                                 cached latents of the training images
  aligntok repair FOLDER                                         write again what is broken in such a folder
  aligntok import alitok AliTok.pth                              published weights as a checkpoint and a config
  aligntok evaluate SAMPLES --reference REFERENCE                FID and its companions of stored images
  aligntok report FOLDER                                         report.html of the runs in a folder

A config is a file, or the name of a shipped one; several --config are layers, later ones win."""


VERBS = {
    "fit": "Train a stage. Ends at trainer.max_steps; --ckpt_path last goes on with a run that was cut off.",
    "validate": "Measure a checkpoint on the validation images; writes validate.json into --output.",
    "test": "Measure a checkpoint on the test images (data.test, by default the validation images).",
    "predict": "Walk over data.predict with a checkpoint; cache.yaml writes a cache of latents into --output.",
}


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Keeps the lines of a description."""


class ConfigLayers(ActionConfigFile):  # type: ignore[misc]  # jsonargparse's types are not read
    """``--config``: a file here, else a shipped one; its ``layers:``, other configs, come before it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply each layer in turn."""
        for layer in expand_layers(values, {option.dest for option in parser._actions}):
            self.apply_config(parser, cfg, self.dest, layer)


class RunCLI(LightningCLI):
    """LightningCLI with an output folder, ``--init_from``, and nothing silent."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with our ``--config``."""
        parser = self.parser_class(**{"dump_header": [f"aligntok, lightning=={lightning.__version__}"], **kwargs})
        parser.add_argument(
            "-c", "--config", action=ConfigLayers, help="A YAML file or the name of a shipped one; repeatable."
        )
        return parser

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
            wanted = " or ".join(stage.previous_stages)
            raise UserError(f"{stage.__name__} starts from {wanted}: add --init_from CHECKPOINT of that stage")
        if config.ema is not None and self.subcommand == "fit":
            raise UserError("--ema is of validate, test and predict: fit goes on with all weights that the run kept")
        if config.get("ckpt_path"):
            read_checkpoint(config.ckpt_path, ema=config.ema)  # names what is wrong with it before anything is built
        elif self.subcommand != "fit" and not config.init_from:
            raise UserError(f"aligntok {self.subcommand} needs the weights: --ckpt_path CHECKPOINT")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Give the trainer our checkpoint writer and the loggers of the run's folder."""
        config = self._get(self.config_init, "trainer")
        output = self._get(self.config_init, "output")
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        loggers: list[Logger] | bool = False
        if self.subcommand == "fit" and not config.fast_dev_run:
            loggers = [TensorBoardLogger(output, name="", version=""), MetricsCSV(output, name="", version="")]
        if config.logger not in (None, True):
            loggers = config.logger
        return super().instantiate_trainer(
            plugins=[*plugins, AtomicCheckpointIO(self._get(self.config, "ema"))], logger=loggers, **kwargs
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        """Add the bar, the record, and checkpoints where the config names none."""
        given = config.get("callbacks") or []
        if self.subcommand != "fit":  # nothing to save, no learning rate to watch
            given = [c for c in given if not isinstance(c, (Checkpoint, LearningRateMonitor))]
            config["enable_checkpointing"] = False
        extra: list[Callback] = [RunRecord()]
        if not any(isinstance(c, Checkpoint) for c in given) and config.get("enable_checkpointing") is not False:
            extra.append(SaveCheckpoint())
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, TQDMProgressBar) for c in given):
            extra.append(ProgressBar())
        config["callbacks"] = [*given, *extra]
        return super()._instantiate_trainer(config, callbacks)

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
    """Writes ``config.yaml`` into the run's folder, and ``predict.yaml`` for what ``predict`` writes there.

    An earlier attempt's becomes ``config.1.yaml`` and so on.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it when the work starts."""
        if stage not in ("fit", "predict"):
            return
        folder = Path(trainer.default_root_dir)
        name = "config" if stage == "fit" else "predict"
        path = folder / f"{name}.yaml"
        if trainer.is_global_zero and not self.already_saved:
            text = self.parser.dump(self.config, skip_none=False)
            if path.is_file() and path.read_text() != text:
                number = len(list(folder.glob(f"{name}.*.yaml"))) + 1
                path.rename(folder / f"{name}.{number}.yaml")
            write_text(path, text)
        self.already_saved = True


def cause_of_user(error: BaseException | None) -> UserError | None:
    """Return the user's error that another one came from, if there is any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def expand_layers(name: str, known_keys: set[str], shipped_first: bool = False) -> list[str]:
    """Return the configs that ``name`` stands for: paths, or the text of a config without its ``layers:``.

    Args:
        name: A path or the name of a shipped config.
        known_keys: Keys of this command; those of another command in a run's saved ``config.yaml`` are left out.
        shipped_first: Look among the shipped configs before the current folder.
    """
    path = find_config(name, shipped_first)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} is empty or no mapping of keys to values")
    layers = content.pop(LAYERS, [])
    foreign = {"init_from", "ckpt_path", "ema", "weights_only", "verbose", "return_predictions"} - known_keys
    own = {key: value for key, value in content.items() if key not in foreign}
    expanded = [config for layer in layers for config in expand_layers(layer, known_keys, is_shipped(path))]
    if not layers and own == content:
        return [str(path)]
    return [*expanded, yaml.safe_dump(own, sort_keys=False)] if own else expanded


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
    if "are required:" in text:
        keys = re.sub(r"\b(fit|validate|test|predict)\.", "", text)
        return f"{keys}. Add the missing layers (stage, size, data), or start from a recipe such as stage1.yaml"
    return text if len(text) < 400 else f"{text[:150]} ... {text[-250:]}"


def run(args: list[str] | None = None) -> RunCLI:
    """Parse and run one command.

    Raises:
        UserError: What the user can mend.
    """
    sys.argv[1:] = configs_first(sys.argv[1:] if args is None else args)  # where LightningCLI looks for them
    return RunCLI(
        pl.LightningModule,
        LatentDataModule,
        subclass_mode_model=True,
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


def repair_command(args: list[str]) -> None:
    """Run again the command that wrote a folder: it does again what is missing or broken, and only that.

    Raises:
        UserError: There is no such folder, or what it holds cannot be mended.
    """
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError("aligntok repair takes one folder that `aligntok predict` wrote: aligntok repair FOLDER")
    config = Path(args[0]) / "predict.yaml"
    if not config.is_file():
        raise UserError(f"there is no {config}: only what `aligntok predict` wrote can be repaired")
    run(["predict", "--config", str(config), "--output", args[0]])


def configs_first(args: list[str]) -> list[str]:
    """Return the arguments with every ``--config`` before the others: the command line overrules YAML in any order."""
    configs: list[str] = []
    others: list[str] = []
    rest = iter(args[1:])
    for arg in rest:
        if arg in ("-c", "--config"):
            configs += [arg, next(rest, "")]
        elif arg.startswith("--config="):
            configs.append(arg)
        else:
            others.append(arg)
    return [*args[:1], *configs, *others]
